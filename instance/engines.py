"""Which engine does a spec ask for, and how is it made? vLLM is imported here only when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from instance.engine import Engine
from instance.errors import StartError
from instance.fake import FakeEngine
from instance.fake_scheduler import FakeConfig
from instance.seal import carrier_token
from instance.spec import Carrier, EngineKind, InstanceSpec
from migration.transports import CarrierParams, KVStore, RankMover, open_receiver, open_sender
from migration.transports.nccl import why_unavailable

PUSH_TIMEOUT_S = 30.0
_OTHERWISE = "use --carrier shm or --carrier tcp"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    make: Callable[[], Engine]
    """To be called on the engine's thread. Raises StartError (one line)."""
    min_step_s: float
    """0 unless the engine only models its time."""


def choose_engine(spec: InstanceSpec) -> EngineChoice:
    """Raises StartError when the spec's flags cannot be read, or contradict each other."""
    if spec.carrier is Carrier.NCCL and spec.carrier_checksum:
        raise StartError(f"the carrier nccl knows no checksums: leave --carrier-checksum out, or {_OTHERWISE}")
    match spec.engine:
        case EngineKind.VLLM:
            return EngineChoice(lambda: _make_vllm(spec), min_step_s=0.0)
        case EngineKind.FAKE:
            return _choose_fake(spec)


def _make_vllm(spec: InstanceSpec) -> Engine:
    # Here and not above: seconds of imports, and only the process that hosts this engine may pay them.
    from instance.vllm.flags import FlagError, with_memory_share  # noqa: PLC0415
    from instance.vllm.host import VllmEngine  # noqa: PLC0415
    from instance.vllm.rank import Carriage  # noqa: PLC0415

    # Known at once, and not after minutes of loading. vLLM is imported by now: it sets how torch looks for devices.
    if spec.carrier is Carrier.NCCL and (reason := why_unavailable()) is not None:
        raise StartError(f"the carrier nccl cannot be used here: {reason}; mend that, or {_OTHERWISE}")
    try:
        argv = with_memory_share(spec.engine_argv, spec.num_sharing)
    except FlagError as error:
        raise StartError(str(error)) from error
    carriage = Carriage(
        spec.carrier, spec.host, carrier_token(spec.token), spec.carrier_checksum, spec.copy_bytes_per_s
    )
    engine: Engine = VllmEngine.from_argv(argv, carriage)
    return engine


class _FakeFlags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(f"the fake engine's flags: {message}")


def _choose_fake(spec: InstanceSpec) -> EngineChoice:
    parser = _FakeFlags(prog="fake", add_help=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--num-gpu-blocks-override", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--step-time-ms", type=float, default=0.0, help="pace of the engine's loop")
    parser.add_argument("--pipelined", action="store_true")
    parser.add_argument("--fail-at-step", type=int)
    flags = parser.parse_args(list(spec.engine_argv or ("fake",)))
    config = FakeConfig(
        num_blocks=flags.num_gpu_blocks_override,
        block_size=flags.block_size,
        max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        is_pipelined=flags.pipelined,
        fail_at_step=flags.fail_at_step,
    )
    if min(config.num_blocks, config.block_size, config.max_model_len, config.max_num_seqs) < 1:
        raise StartError("the fake engine's flags: blocks, block size, length and sequences must be at least 1")
    return EngineChoice(lambda: FakeEngine(config, lambda store: _socket_mover(store, spec)), flags.step_time_ms / 1e3)


def _socket_mover(store: KVStore, spec: InstanceSpec) -> RankMover:
    if spec.carrier is Carrier.NCCL:
        raise StartError(f"the carrier nccl needs KV memory on a GPU, and the fake engine has none: {_OTHERWISE}")
    token, params = (
        carrier_token(spec.token).encode(),
        CarrierParams(checksum=spec.carrier_checksum, bytes_per_s=spec.copy_bytes_per_s or None),
    )
    try:
        receiver = open_receiver(store, f"{spec.carrier.value}://{spec.host}", token, params)
    except (ValueError, OSError) as error:
        raise StartError(f"the carrier {spec.carrier.value} cannot listen on {spec.host}: {error}") from error
    sender = open_sender(store, token, params)
    return RankMover(sender, receiver, push_timeout_s=PUSH_TIMEOUT_S, num_threads=spec.max_migrations_out + 1)
