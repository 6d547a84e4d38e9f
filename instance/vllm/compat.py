"""Which of vLLM's private names do we lean on, and are they still what we think they are?

`scheduler.py`, `worker.py` and `host.py` touch vLLM's internals (a mix-in cannot do otherwise); each name they touch
is listed
here and checked once, at start. An engine of an unknown version, or one where a name is missing, serves but moves no
request.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import vllm

SUPPORTED_VERSION = "0.32"


@dataclass(frozen=True, slots=True)
class _Needed:
    """A vLLM object and what we use of it."""

    module: str
    name: str
    attributes: tuple[str, ...] = ()
    parameters: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(method, parameters we pass by name or position)."""


_NEEDED = (
    _Needed(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        (
            "schedule",
            "has_requests",
            "_holds_kv_blocks",
            "_enqueue_waiting_request",
            "_inflight_prefill_reserved_blocks",
        ),
        (
            ("finish_requests", ("request_ids", "finished_status")),
            ("_preempt_request", ("request", "timestamp", "drop_stale_output")),
            ("_reserve_prefill_lookahead", ("request", "num_computed_tokens", "num_new_tokens")),
        ),
    ),
    _Needed("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    _Needed(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        ("get_computed_blocks", "truncate_computed_blocks", "get_block_ids", "free", "reset_prefix_cache"),
        (
            (
                "allocate_slots",
                (
                    "request",
                    "num_new_tokens",
                    "num_new_computed_tokens",
                    "new_computed_blocks",
                    "num_external_computed_tokens",
                    "delay_cache_blocks",
                    "reserved_blocks",
                ),
            ),
            ("cache_blocks", ("request", "num_computed_tokens")),
        ),
    ),
    _Needed("vllm.v1.core.block_pool", "BlockPool", ("get_new_blocks", "free_blocks", "get_num_free_blocks")),
    _Needed(
        "vllm.v1.request",
        "Request",
        ("append_output_token_ids", "is_finished", "num_tokens", "num_output_tokens", "use_structured_output"),
    ),
    _Needed(
        "vllm.v1.request",
        "RequestStatus",
        ("WAITING", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "RUNNING", "PREEMPTED", "FINISHED_ABORTED"),
    ),
    _Needed(
        "vllm.v1.engine.core",
        "EngineCore",
        ("post_step", "collective_rpc", "preprocess_add_request", "add_request", "abort_requests", "shutdown"),
        (("__init__", ("vllm_config", "executor_class", "log_stats")),),
    ),
    _Needed(
        "vllm.v1.structured_output", "StructuredOutputManager", (), (("accept_tokens", ("request", "new_token_ids")),)
    ),
    _Needed(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState",
        (),
        (
            (
                "__init__",
                (
                    "req_id",
                    "prompt_token_ids",
                    "mm_features",
                    "sampling_params",
                    "generator",
                    "block_ids",
                    "num_computed_tokens",
                    "output_token_ids",
                ),
            ),
        ),
    ),
    _Needed("vllm.v1.worker.gpu_input_batch", "InputBatch", ("remove_request",)),
    _Needed(
        "vllm.v1.kv_cache_interface",
        "KVCacheTensor",
        (),
        (("__init__", ("layers", "layer_stride", "block_stride", "offset")),),
    ),
    _Needed("vllm.v1.kv_cache_interface", "KVCacheConfig", (), (("__init__", ("num_blocks", "kv_cache_tensors")),)),
    _Needed("vllm.v1.serial_utils", "MsgpackEncoder", (), (("__init__", ("size_threshold",)),)),
    _Needed("vllm.v1.serial_utils", "MsgpackDecoder", (), (("__init__", ("t", "share_mem")),)),
)

# Attributes that exist only on living objects: looked up on the engine that was just started.
_NEEDED_OF_SCHEDULER = (
    "running",
    "waiting",
    "kv_holding_waiting",
    "deferred_waiting",
    "requests",
    "finished_req_ids",
    "reset_preempted_req_ids",
    "_inflight_prefills",
    "max_num_active_reqs",
    "use_v2_model_runner",
    "need_mamba_block_aligned_split",
    "structured_output_manager",
    "kv_cache_manager",
    "deferred_frees",
)
_NEEDED_OF_COORDINATOR_MANAGER = ("req_to_blocks", "new_block_ids", "block_size", "block_pool")


def engine_version() -> str:
    return str(vllm.__version__)


def why_unsupported(version: str | None = None) -> str | None:
    """One line that says why no request can be moved with this vLLM, or None. Imports vLLM's engine modules."""
    version = engine_version() if version is None else version
    if version.split(".")[:2] != SUPPORTED_VERSION.split("."):
        return f"vLLM {version} is not {SUPPORTED_VERSION}.x, the version whose internals kvferry knows"
    for needed in _NEEDED:
        missing = _missing(needed)
        if missing is not None:
            return f"vLLM {version} lacks {missing}"
    return None


def why_scheduler_unsupported(scheduler: Any) -> str | None:
    """The same for a living scheduler."""
    for name in _NEEDED_OF_SCHEDULER:
        if not hasattr(scheduler, name):
            return f"vLLM's scheduler lacks {name}"
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name in _NEEDED_OF_COORDINATOR_MANAGER:
            if not hasattr(manager, name):
                return f"vLLM's {type(manager).__name__} lacks {name}"
    return None


def why_engine_unmovable(config: Any, scheduler: Any) -> str | None:
    """One line that says why this engine, though of a known version, can move no request at all, or None."""
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    facts = (
        (config.model_config.runner_type != "generate", "it runs a pooling model"),
        (config.model_config.is_encoder_decoder, "it runs an encoder-decoder model"),
        (groups != 1, f"its model has {groups} KV-cache groups (hybrid attention), and kvferry moves one so far"),
        (config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism is on"),
        (config.parallel_config.decode_context_parallel_size > 1, "decode context parallelism is on"),
        (config.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism is on"),
        (config.speculative_config is not None, "speculative decoding is on"),
        (config.kv_transfer_config is not None, "a KV connector is configured"),
    )
    return next((reason for is_so, reason in facts if is_so), None)


def _missing(needed: _Needed) -> str | None:
    try:
        owner = getattr(importlib.import_module(needed.module), needed.name)
    except (ImportError, AttributeError):
        return f"{needed.module}.{needed.name}"
    for attribute in needed.attributes:
        if not hasattr(owner, attribute):
            return f"{needed.name}.{attribute}"
    for method, parameters in needed.parameters:
        function = getattr(owner, method, None)
        if function is None:
            return f"{needed.name}.{method}"
        known = inspect.signature(function).parameters
        for parameter in parameters:
            if parameter not in known:
                return f"the parameter {parameter} of {needed.name}.{method}"
    return None
