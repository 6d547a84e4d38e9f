"""Which of vLLM's private names do we lean on, and are they still what we think they are?

`scheduler.py`, `worker.py` and `host.py` touch vLLM's internals (a mix-in cannot do otherwise); each name they touch
is listed
here and checked once, at start. An engine of an unknown version, or one where a name is missing, serves but moves no
request.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator
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
            "_free_request",
        ),
        (
            ("finish_requests", ("request_ids", "finished_status")),
            ("update_from_output", ("scheduler_output", "model_runner_output")),
            ("_preempt_request", ("request", "timestamp", "drop_stale_output")),
            ("_reserve_prefill_lookahead", ("request", "num_computed_tokens", "num_new_tokens")),
        ),
    ),
    _Needed("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    _Needed("vllm.v1.core.sched.request_queue", "SchedulingPolicy", ("PRIORITY",)),
    _Needed(
        "vllm.v1.core.sched.request_queue",
        "PriorityRequestQueue",
        ("peek_request", "add_request"),
        (("remove_requests", ("requests",)),),
    ),
    _Needed(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        ("prefix_cache_lookup_enabled", "create_kv_cache_blocks", "get_block_ids", "free", "reset_prefix_cache"),
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
    _Needed(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator",
        (),
        (
            ("find_longest_cache_hit", ("block_hashes", "max_cache_hit_length")),
            ("remove_skipped_blocks", ("request_id", "processed_computed_tokens")),
        ),
    ),
    _Needed("vllm.v1.core.block_pool", "BlockPool", ("get_new_blocks", "free_blocks", "get_num_free_blocks")),
    _Needed("vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager"),
    _Needed("vllm.v1.core.single_type_kv_cache_manager", "SlidingWindowManager"),
    _Needed(
        "vllm.multimodal.inputs", "MultiModalFeatureSpec", (), (("__init__", ("data", "modality", "mm_position")),)
    ),
    _Needed("vllm.multimodal.inputs", "PlaceholderRange", ("get_num_embeds",)),
    _Needed(
        "vllm.config.model",
        "ModelConfig",
        (
            "is_multimodal_model",
            "uses_mrope",
            "is_mm_prefix_lm",
            "is_multimodal_raw_input_only_model",
            "requires_raw_input_tokens",
        ),
    ),
    _Needed("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
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
        (
            "post_step",
            "collective_rpc",
            "preprocess_add_request",
            "add_request",
            "abort_requests",
            "add_lora",
            "shutdown",
        ),
        (("__init__", ("vllm_config", "executor_class", "log_stats")),),
    ),
    _Needed(
        "vllm.v1.structured_output",
        "StructuredOutputManager",
        (),
        (("accept_tokens", ("request", "new_token_ids")), ("validate_tokens", ("request", "spec_tokens"))),
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
                    "lora_request",
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
    "policy",
    "running",
    "waiting",
    "kv_holding_waiting",
    "deferred_waiting",
    "requests",
    "finished_req_ids",
    "prev_step_scheduled_req_ids",
    "reset_preempted_req_ids",
    "_inflight_prefills",
    "max_num_active_reqs",
    "num_spec_tokens",
    "use_v2_model_runner",
    "need_mamba_block_aligned_split",
    "structured_output_manager",
    "kv_cache_manager",
    "lora_config",
    "deferred_frees",
    "encoder_cache_manager",
    "max_num_encoder_input_tokens",
    "is_encoder_decoder",
)
PRIORITY_HEAP = "_heap"
"""Of a PriorityRequestQueue, for `unordered`."""
_NEEDED_OF_ENCODER_CACHE = ("cache_size", "cached", "request_cached_ids")
_NEEDED_OF_COORDINATOR_MANAGER = (
    "req_to_blocks",
    "new_block_ids",
    "block_size",
    "block_pool",
    "max_admission_blocks_per_request",
)
_NEEDED_OF_BLOCK_POOL = ("cached_block_hash_to_block", "hash_block_size", "enable_caching")
_NEEDED_OF_HASH_MAP = ("_cache", "insert", "pop")
"""Of a BlockHashToBlockMap, which `cached.NotingMap` stands in for."""
_MOVABLE_MANAGERS = ("FullAttentionManager", "SlidingWindowManager")
"""Kinds of KV-cache groups whose blocks stand by position and never change once full."""


# What our modules import besides, and private names that one feature or the front end leans on. A missing one shows
# when that module is loaded or that feature used; `problems` (make compat) looks at all of them beforehand.
_NEEDED_ELSEWHERE = (
    _Needed("vllm", "envs"),
    _Needed("vllm.engine.arg_utils", "AsyncEngineArgs", ("from_cli_args", "create_engine_config")),
    _Needed("vllm.entrypoints.launchers.api_server.app_state", "init_app_state"),
    _Needed("vllm.entrypoints.launchers.app", "build_app"),
    _Needed("vllm.entrypoints.launchers.cli_args", "make_arg_parser"),
    _Needed("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args"),
    _Needed("vllm.entrypoints.launchers.launcher", "NoSignalServer"),
    _Needed("vllm.entrypoints.launchers.launcher", "validate_api_server_args"),
    _Needed("vllm.entrypoints.launchers.utils.server_utils", "get_uvicorn_log_config"),
    _Needed("vllm.exceptions", "GracefulHTTPError"),
    _Needed("vllm.exceptions", "VLLMError"),
    _Needed("vllm.exceptions", "VLLMValidationError"),
    _Needed("vllm.platforms", "current_platform", ("is_cpu",)),
    _Needed("vllm.reasoning", "ReasoningParserManager"),
    _Needed("vllm.renderers", "renderer_from_config"),
    _Needed("vllm.sampling_params", "SamplingParams"),
    _Needed("vllm.sampling_params", "SamplingType", ("RANDOM_SEED",)),
    _Needed("vllm.sampling_params", "StructuredOutputsParams", ("_backend",)),
    _Needed("vllm.tool_parsers", "ToolParserManager"),
    _Needed("vllm.tracing", "init_tracer"),
    _Needed("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    _Needed(
        "vllm.v1.core.block_pool",
        "BlockHashToBlockMap",
        (),
        (("insert", ("key", "block")), ("pop", ("key", "block_id"))),
    ),
    _Needed("vllm.v1.core.kv_cache_utils", "BlockHash"),
    _Needed("vllm.v1.core.kv_cache_utils", "make_block_hash_with_group_id"),
    _Needed("vllm.v1.core.kv_cache_utils", "get_request_block_hasher"),
    _Needed("vllm.v1.core.kv_cache_utils", "init_none_hash"),
    _Needed("vllm.v1.core.kv_cache_utils", "resolve_none_hash_seed"),
    _Needed("vllm.utils.hashing", "get_hash_fn_by_name"),
    _Needed("vllm.v1.engine", "EngineCoreOutput"),
    _Needed("vllm.v1.engine", "EngineCoreOutputs"),
    _Needed("vllm.v1.engine", "EngineCoreRequest"),
    _Needed("vllm.v1.engine", "FinishReason"),
    _Needed("vllm.v1.engine.async_llm", "AsyncLLM", ("_run_output_handler",)),
    _Needed("vllm.v1.engine.core_client", "EngineCoreClient"),
    _Needed("vllm.v1.engine.exceptions", "EngineDeadError"),
    _Needed("vllm.v1.engine.input_processor", "InputProcessor"),
    _Needed("vllm.v1.engine.output_processor", "OutputProcessor"),
    _Needed("vllm.v1.engine.output_processor", "RequestOutputCollector"),
    _Needed("vllm.v1.engine.parallel_sampling", "ParentRequest"),
    _Needed("vllm.v1.executor", "Executor", ("get_class",)),
    _Needed("vllm.v1.metrics.loggers", "StatLoggerManager"),
    _Needed("vllm.v1.metrics.stats", "PrefillStats"),
    _Needed("vllm.v1.metrics.stats", "SchedulerStats"),
    _Needed("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("_init_mrope_positions",)),
)


def engine_version() -> str:
    return str(vllm.__version__)


def why_unsupported(version: str | None = None) -> str | None:
    """One line that says why no request can be moved with this vLLM, or None. Imports vLLM's engine modules."""
    version = engine_version() if version is None else version
    if version.split(".")[:2] != SUPPORTED_VERSION.split("."):
        return f"vLLM {version} is not {SUPPORTED_VERSION}.x, the version whose internals kvferry knows"
    for needed in _NEEDED:
        for missing in _missing(needed):
            return f"vLLM {version} lacks {missing}"
    return None


def problems() -> list[str]:
    """Everything this vLLM lacks of what we use, whatever its version: one line each."""
    needed = (*_NEEDED, *_NEEDED_ELSEWHERE)
    return list(dict.fromkeys(missing for one in needed for missing in _missing(one)))


def named() -> tuple[frozenset[tuple[str, str]], frozenset[str]]:
    """All that this module names: what is imported, as (module, name), and attributes of vLLM's objects."""
    needed = (*_NEEDED, *_NEEDED_ELSEWHERE)
    attributes = {name for one in needed for name in (*one.attributes, *(method for method, _ in one.parameters))}
    living = {*_NEEDED_OF_SCHEDULER, PRIORITY_HEAP, *_NEEDED_OF_ENCODER_CACHE, *_NEEDED_OF_COORDINATOR_MANAGER}
    living |= {*_NEEDED_OF_BLOCK_POOL, *_NEEDED_OF_HASH_MAP}
    return frozenset((one.module, one.name) for one in needed), frozenset(attributes | living)


def why_scheduler_unsupported(scheduler: Any) -> str | None:
    """The same for a living scheduler."""
    for name in _NEEDED_OF_SCHEDULER:
        if not hasattr(scheduler, name):
            return f"vLLM's scheduler lacks {name}"
    encoder_cache = scheduler.encoder_cache_manager
    for name in () if scheduler.is_encoder_decoder else _NEEDED_OF_ENCODER_CACHE:
        if not hasattr(encoder_cache, name):
            return f"vLLM's {type(encoder_cache).__name__} lacks {name}"
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name in _NEEDED_OF_COORDINATOR_MANAGER:
            if not hasattr(manager, name):
                return f"vLLM's {type(manager).__name__} lacks {name}"
    return None


def why_cache_untold(scheduler: Any) -> str | None:
    """One line that says why it cannot be known what this scheduler's prefix cache holds, or None. Moves need none of
    this."""
    pool: Any = getattr(scheduler.kv_cache_manager, "block_pool", None)
    for name in _NEEDED_OF_BLOCK_POOL:
        if not hasattr(pool, name):
            return f"vLLM's {type(pool).__name__} lacks {name}"
    found = pool.cached_block_hash_to_block
    for name in _NEEDED_OF_HASH_MAP:
        if not hasattr(found, name):
            return f"vLLM's {type(found).__name__} lacks {name}"
    for group in scheduler.kv_cache_manager.coordinator.single_type_managers:
        if not hasattr(group, "kv_cache_group_id"):
            return f"vLLM's {type(group).__name__} lacks kv_cache_group_id"
    return None if pool.enable_caching else "prefix caching is off"


def unordered(queue: Any) -> Iterable[Any]:
    """What waits in one of the scheduler's queues, in any order. Iterating a priority queue sorts it every time; where
    its heap has another name, that is what it costs."""
    heap: Iterable[Any] = getattr(queue, PRIORITY_HEAP, queue)
    return heap


def why_engine_unmovable(config: Any, scheduler: Any) -> str | None:
    """One line that says why this engine, though of a known version, can move no request at all, or None."""
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    kinds = sorted({type(group).__name__ for group in groups} - {*_MOVABLE_MANAGERS})
    sizes = sorted({group.block_size for group in groups})
    facts = (
        (config.model_config.runner_type != "generate", "it runs a pooling model"),
        (config.model_config.is_encoder_decoder, "it runs an encoder-decoder model"),
        (bool(kinds), f"its model has KV of a kind that kvferry does not move yet ({', '.join(kinds)})"),
        (len(sizes) != 1, f"its KV-cache groups have blocks of several sizes ({', '.join(map(str, sizes))})"),
        (config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism is on"),
        (config.parallel_config.decode_context_parallel_size > 1, "decode context parallelism is on"),
        (config.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism is on"),
        (config.kv_transfer_config is not None, "a KV connector is configured"),
    )
    return next((reason for is_so, reason in facts if is_so), None)


def _missing(needed: _Needed) -> Iterator[str]:
    try:
        owner = getattr(importlib.import_module(needed.module), needed.name)
    except (ImportError, AttributeError):
        yield f"{needed.module}.{needed.name}"
        return
    for attribute in needed.attributes:
        if not hasattr(owner, attribute):
            yield f"{needed.name}.{attribute}"
    for method, parameters in needed.parameters:
        function = getattr(owner, method, None)
        if function is None:
            yield f"{needed.name}.{method}"
            continue
        known = inspect.signature(function).parameters
        for parameter in parameters:
            if parameter not in known:
                yield f"the parameter {parameter} of {needed.name}.{method}"
