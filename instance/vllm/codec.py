"""How do an engine's values become bytes, and what is a request's small state? msgspec throughout, never pickle."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import torch
from vllm import envs
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from instance.messages import OutputEntry

STATE_VERSION = 3

PREFILL_FIELDS = (
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_cached_tokens",
    "num_local_cached_tokens",
    "num_external_cached_tokens",
    "num_cache_creation_tokens",
)
"""Of vLLM's PrefillStats, in the order in which they travel."""

CUDA_GENERATOR_BYTES = 16

# Tensors and arrays travel inside the one byte string: no side buffers, however large they are.
_INLINE = 1 << 62


class CodecError(ValueError):
    """These bytes cannot be read, or this value cannot be written without pickle."""


class Adapter(msgspec.Struct, frozen=True, array_like=True):
    """Which LoRA adapter, exactly."""

    name: str
    path: str
    digest: str
    """Of its files, and of the type they are computed in."""


class DescribedRequest(msgspec.Struct, frozen=True, array_like=True):
    """What `Description.payload` holds."""

    version: int
    external_id: str
    core: bytes
    """`encode_request` of the request as it was submitted."""
    output_token_ids: list[int]
    priority: int
    adapter: Adapter | None


class RequestState(msgspec.Struct, frozen=True, array_like=True):
    """What `StoppedRequest.state` holds: everything of a request that is neither in its submission nor in its
    blocks."""

    version: int
    output_token_ids: list[int]
    computed_tokens: int
    has_run: bool
    """False: it was never scheduled, and is an ordinary new request at the destination."""
    num_preemptions: int
    stop_reason: int | str | None
    prefill_stats: tuple[int, ...] | None
    """vLLM's PrefillStats, field by field; None once they have been reported (they are reported once)."""
    num_nans_in_logits: int
    priority: int
    generator: bytes | None
    """State of the sampler's torch generator (a seeded request on the V1 runner)."""
    draft_token_ids: list[int]
    """Guesses (speculative decoding) that its next step verifies; not tokens of the request yet."""


VersionedT = TypeVar("VersionedT", DescribedRequest, RequestState)


def encode_request(request: EngineCoreRequest) -> bytes:
    """Raises `CodecError` for what would need pickle."""
    return _encode(request)


def decode_request(payload: bytes) -> EngineCoreRequest:
    """Raises `CodecError`."""
    return _decode(payload, EngineCoreRequest)


def encode_output(output: EngineCoreOutput) -> tuple[bytes, ...]:
    """Empty when the output holds nothing but its tokens, its finish and its stop reason."""
    is_plain = all(
        value is None
        for value in (
            output.new_logprobs,
            output.new_prompt_logprobs_tensors,
            output.pooling_output,
            output.events,
            output.kv_transfer_params,
            output.ec_transfer_params,
            output.trace_headers,
            output.prefill_stats,
            output.routed_experts,
            output.mm_cache_miss_hashes,
            output.new_sampling_mask,
            output.spec_decode_metrics,
            output.prompt_token_id_logprobs,
        )
    )
    return () if is_plain and not output.num_nans_in_logits else (_encode(output),)


def decode_output(entry: OutputEntry) -> EngineCoreOutput:
    """Raises `CodecError`."""
    if entry.extra:
        return _decode(entry.extra[0], EngineCoreOutput)
    try:
        finish = None if entry.finish_reason is None else FinishReason(entry.finish_reason)
    except ValueError as error:
        raise CodecError(str(error)) from error
    return EngineCoreOutput(
        request_id=entry.request_id,
        new_token_ids=list(entry.token_ids),
        finish_reason=finish,
        stop_reason=entry.stop_reason,
    )


def encode_described(described: DescribedRequest) -> bytes:
    return msgspec.msgpack.encode(described)


def decode_described(payload: bytes) -> DescribedRequest:
    """Raises `CodecError`."""
    return _of_this_version(payload, DescribedRequest)


def encode_state(state: RequestState) -> bytes:
    return msgspec.msgpack.encode(state)


def decode_state(payload: bytes) -> RequestState:
    """Raises `CodecError`."""
    return _of_this_version(payload, RequestState)


def why_malformed(state: RequestState, device_type: str) -> str | None:
    """One line that says why vLLM on such a device could not take this state in, or None."""
    if state.prefill_stats is not None and len(state.prefill_stats) != len(PREFILL_FIELDS):
        return f"it has {len(state.prefill_stats)} prefill statistics, not {len(PREFILL_FIELDS)}"
    if state.generator is None:
        return None
    if device_type == "cuda":  # not tried out: this process may use no GPU itself
        is_sound = len(state.generator) == CUDA_GENERATOR_BYTES
        return None if is_sound else f"its generator has {len(state.generator)} bytes, not {CUDA_GENERATOR_BYTES}"
    try:
        torch.Generator().set_state(torch.frombuffer(bytearray(state.generator), dtype=torch.uint8))
    except (RuntimeError, ValueError) as error:
        return f"its generator is none: {str(error).splitlines()[0]}"
    return None


def _of_this_version(payload: bytes, kind: type[VersionedT]) -> VersionedT:
    try:
        value = msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CodecError(f"no {kind.__name__}: {error}") from error
    if value.version != STATE_VERSION:
        raise CodecError(f"{kind.__name__} of version {value.version}, not {STATE_VERSION}")
    return value


def _refuse_pickle() -> None:
    if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
        raise CodecError("unset VLLM_ALLOW_INSECURE_SERIALIZATION: with it vLLM's codec would pickle")


def _encode(value: Any) -> bytes:
    _refuse_pickle()
    try:
        buffers = MsgpackEncoder(size_threshold=_INLINE).encode(value)
    except TypeError as error:
        raise CodecError(f"{type(value).__name__} cannot be sent: {error}") from error
    if len(buffers) != 1:
        raise CodecError(f"{type(value).__name__} holds a tensor that is not in main memory")
    return bytes(buffers[0])


def _decode(payload: bytes, kind: Any) -> Any:
    _refuse_pickle()
    try:
        return MsgpackDecoder(kind, share_mem=False).decode(payload)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise CodecError(f"no {kind.__name__}: {error}") from error
