"""How does vLLM come to life for us? From the user's flags to a core, its ranks' endpoints, and the facts that never
change."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor

from instance.errors import StartError
from instance.types import EngineFacts
from instance.vllm import compat
from instance.vllm.environment import prepare_environment
from instance.vllm.flags import FlagError, engine_config, has_our_hooks, parse_serve_argv
from instance.vllm.rank import Rank, RemoteRank
from instance.vllm.warmup import warm_up


@dataclass(frozen=True, slots=True)
class Started:
    """A core that can be stepped."""

    core: EngineCore
    facts: EngineFacts
    ranks: tuple[Rank, ...]
    """Empty when the engine can move nothing."""


def start_core(argv: tuple[str, ...], carriers: tuple[str, ...], host: str, token: str) -> Started:
    """See `VllmEngine.from_argv`. Raises `StartError` (one line)."""
    prepare_environment()
    try:
        config = engine_config(parse_serve_argv(argv))
        core = EngineCore(config, Executor.get_class(config), log_stats=False)
    except FlagError as error:
        raise StartError(str(error)) from error
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise StartError(f"vLLM does not start: {' '.join(str(error).split())[:500]}") from error
    refused = _why_refused(config, core)
    ranks: tuple[Rank, ...] = ()
    layout = ""
    if refused is None:
        ranks, layout = _open_ranks(core, carriers[0], host, token)
    if config.model_config.runner_type == "generate":
        warm_up(core)
    return Started(core, _facts(config, core, layout, refused), ranks)


def _why_refused(config: Any, core: EngineCore) -> str | None:
    refused = compat.why_unsupported() or compat.why_scheduler_unsupported(core.scheduler)
    if refused is None and not has_our_hooks(config):
        refused = "the flags set a scheduler or worker extension of their own"
    return refused or compat.why_engine_unmovable(config, core.scheduler)


def _open_ranks(core: EngineCore, carrier: str, host: str, token: str) -> tuple[tuple[Rank, ...], str]:
    """Start every rank's data endpoint, once; returns the ranks and the layout they all have."""
    local = getattr(core.model_executor, "driver_worker", None)
    address = None if local is not None else f"ipc://@kvferry-{uuid.uuid4().hex}"
    answers = core.collective_rpc("ferry_open", args=(carrier, host, token, address))
    layout = "+".join(sorted({layout for _, layout in answers}))
    if local is not None:
        return (local.worker.ferry_endpoint,), layout
    return tuple(RemoteRank(url, f"{address}-{i}", token) for i, (url, _) in enumerate(answers)), layout


def _facts(config: Any, core: EngineCore, layout: str, refused: str | None) -> EngineFacts:
    scheduler: Any = core.scheduler
    model, version = config.model_config, compat.engine_version()
    kind = (
        version,
        model.model,
        model.revision,
        json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str),
        str(model.dtype),
        str(model.quantization),
        str(config.cache_config.cache_dtype),
        layout,
        scheduler.block_size,
        config.parallel_config.tensor_parallel_size,
        bool(config.use_v2_model_runner),
    )
    return EngineFacts(
        model=model.model,
        kv_fingerprint=hashlib.sha256(repr(kind).encode()).hexdigest(),
        block_size=scheduler.block_size,
        total_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_active_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        engine_version=version,
        migration_refused_because=refused,
    )
