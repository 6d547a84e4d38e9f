"""How does vLLM come to life for us? From the user's flags to a core, its ranks' endpoints, and the facts that never
change."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor

from instance.errors import StartError
from instance.types import EngineFacts
from instance.vllm import compat, speculation
from instance.vllm.environment import prepare_environment
from instance.vllm.flags import FlagError, engine_config, has_our_hooks, parse_serve_argv
from instance.vllm.handshake import Adapter, Compatibility, encode
from instance.vllm.rank import Carriage, Rank, RemoteRank
from instance.vllm.warmup import warm_up
from instance.vllm.weights import combined, files_digest

MAX_LAYOUT_CHARS = 1024
"""A longer one (a model of very many unlike layers) is compared by its digest."""


@dataclass(frozen=True, slots=True)
class Started:
    """A core that can be stepped."""

    core: EngineCore
    facts: EngineFacts
    ranks: tuple[Rank, ...]
    """Empty when the engine can move nothing."""


def start_core(argv: tuple[str, ...], carriage: Carriage) -> Started:
    """See `VllmEngine.from_argv`. Raises `StartError` (one line)."""
    prepare_environment()
    try:
        namespace = parse_serve_argv(argv)
        config = engine_config(namespace)
        core = EngineCore(config, Executor.get_class(config), log_stats=False)
    except FlagError as error:
        raise StartError(str(error)) from error
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise StartError(f"vLLM does not start: {' '.join(str(error).split())[:500]}") from error
    refused = _why_refused(config, core)
    ranks: tuple[Rank, ...] = ()
    fingerprint = ""
    if refused is None:
        ranks, layout = _open_ranks(core, carriage)
        fingerprint = encode(_handshake(config, core, _adapters(namespace), layout))
    if config.model_config.runner_type == "generate":
        warm_up(core)
    return Started(core, _facts(config, core, fingerprint, refused), ranks)


def _why_refused(config: Any, core: EngineCore) -> str | None:
    refused = compat.why_unsupported() or compat.why_scheduler_unsupported(core.scheduler)
    if refused is None and not has_our_hooks(config):
        refused = "the flags set a scheduler or worker extension of their own"
    return refused or compat.why_engine_unmovable(config, core.scheduler) or speculation.why_engine_unmovable(config)


def _open_ranks(core: EngineCore, carriage: Carriage) -> tuple[tuple[Rank, ...], str]:
    """Start every rank's data endpoint, once; returns the ranks and the layout they all have. Raises `StartError` (one
    line)."""
    local = getattr(core.model_executor, "driver_worker", None)
    address = None if local is not None else f"ipc://@kvferry-{uuid.uuid4().hex}"
    carrier, host, token = carriage.carrier, carriage.host, carriage.token
    arguments = (carrier.value, host, token, (carriage.checksum, carriage.bytes_per_s), address)
    try:
        answers = core.collective_rpc("ferry_open", args=arguments)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: from a rank in another process
        reason = " ".join(str(error).split())[:500]
        raise StartError(f"the carrier {carrier.value} cannot be opened on {host}: {reason}") from error
    layout = "+".join(sorted({layout for _, layout in answers}))
    if local is not None:
        return (local.worker.ferry_endpoint,), layout
    return tuple(RemoteRank(url, f"{address}-{i}", token) for i, (url, _) in enumerate(answers)), layout


def _handshake(config: Any, core: EngineCore, adapters: tuple[Adapter, ...], layout: str) -> Compatibility:
    model = config.model_config
    described = {name: value for name, value in model.hf_config.to_dict().items() if name != "_name_or_path"}
    return Compatibility(
        engine_version=compat.engine_version(),
        model=model.model if model.revision is None else f"{model.model}@{model.revision}",
        weights=_weights(model, core),
        model_config=_digest(json.dumps(described, sort_keys=True, default=str)),
        dtype=str(model.dtype),
        quantization=str(model.quantization or ""),
        kv_dtype=str(config.cache_config.cache_dtype),
        kv_layout=layout if len(layout) < MAX_LAYOUT_CHARS else _digest(layout),
        block_size=core.scheduler.block_size,
        max_model_len=model.max_model_len,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        model_runner="V2" if config.use_v2_model_runner else "V1",
        speculation=speculation.describe(config),
        adapters=adapters,
    )


def _weights(model: Any, core: EngineCore) -> str:
    """Of the files, where there are any: what ranks hold may have been packed for the processor and thrown away. What
    was never in a file is sampled where it was loaded."""
    try:
        digest = None if core.vllm_config.load_config.load_format == "dummy" else files_digest(_folder(model))
    except OSError as error:
        raise StartError(f"the weights of {model.model} cannot be read: {error}") from error
    return digest or combined(core.collective_rpc("ferry_weights_digest"))


def _folder(model: Any) -> str:
    """Where the weights lie: the folder itself, or the hub's copy on this machine."""
    if Path(model.model).expanduser().exists():
        return str(model.model)
    try:
        return str(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):  # streamed from elsewhere
        return str(model.model)


def _adapters(namespace: Any) -> tuple[Adapter, ...]:
    """Those the engine is started with."""
    try:
        known = [
            Adapter(module.name, files_digest(module.path) or "no files") for module in namespace.lora_modules or ()
        ]
    except OSError as error:
        raise StartError(f"a LoRA adapter cannot be read: {error}") from error
    return tuple(sorted(known))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _facts(config: Any, core: EngineCore, fingerprint: str, refused: str | None) -> EngineFacts:
    scheduler: Any = core.scheduler
    return EngineFacts(
        model=config.model_config.model,
        kv_fingerprint=fingerprint,
        block_size=scheduler.block_size,
        total_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_active_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        engine_version=compat.engine_version(),
        migration_refused_because=refused,
    )
