"""May a request of that engine run on this one? What both must agree on, as bytes and back, and which of it differs.

It travels as `kv_fingerprint`: `migration` carries it and does not look into it. No vLLM here: the fake engine and
every test can speak it too.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

HANDSHAKE_VERSION = 2
MAX_HANDSHAKE_BYTES = 64 << 10
MAX_ADAPTERS = 256
MAX_REASON_CHARS = 1000

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class HandshakeError(ValueError):
    """These are no hand-shake of this version; the text is one line."""


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A LoRA adapter the engine was started with."""

    name: Text
    digest: Text


class Compatibility(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What two engines must have in common for KV and state of a request to mean the same in both."""

    engine_version: Text
    model: Text
    """As the user named it, with its revision."""
    weights: Text
    """See `weights.py`. Equal weights are all that makes equal KV of equal tokens."""
    model_config: Text
    """Digest of the model's own configuration: rope scaling and the like change KV, too."""
    dtype: Text
    quantization: Text
    kv_dtype: Text
    kv_layout: Text
    block_size: Count
    max_model_len: Count
    """Where a request's context ends, and with it the request."""
    tensor_parallel_size: Count
    model_runner: Text
    """vLLM's V1 or V2 runner: they keep a request's state differently."""
    speculation: Text = ""
    """How it guesses tokens ahead: decides which tokens share a step, and so the last bits of their logprobs."""
    adapters: Annotated[tuple[Adapter, ...], msgspec.Meta(max_length=MAX_ADAPTERS)] = ()
    version: int = HANDSHAKE_VERSION


_SAID = (
    ("engine_version", "runs vLLM {}"),
    ("model", "serves model {}"),
    ("weights", "has weights of digest {}"),
    ("model_config", "has a model configuration of digest {}"),
    ("dtype", "computes in {}"),
    ("quantization", "has quantization {}"),
    ("kv_dtype", "keeps KV as {}"),
    ("kv_layout", "has KV layout {}"),
    ("block_size", "has blocks of {} tokens"),
    ("max_model_len", "has a context of {} tokens"),
    ("tensor_parallel_size", "runs at tensor parallelism {}"),
    ("model_runner", "has model runner {}"),
    ("speculation", "guesses {}"),
    ("adapters", "has LoRA adapters {}"),
)


def encode(compatibility: Compatibility) -> str:
    """Raises HandshakeError when it is larger than MAX_HANDSHAKE_BYTES."""
    text = msgspec.json.encode(compatibility)
    if len(text) > MAX_HANDSHAKE_BYTES:
        raise HandshakeError(f"a hand-shake of {len(text)} bytes, at most {MAX_HANDSHAKE_BYTES} are sent")
    return text.decode()


def decode(text: str) -> Compatibility:
    """Raises HandshakeError for anything but one hand-shake of this version."""
    if len(text) > MAX_HANDSHAKE_BYTES:
        raise HandshakeError(f"a hand-shake of {len(text)} characters, at most {MAX_HANDSHAKE_BYTES} are read")
    try:
        compatibility = msgspec.json.decode(text, type=Compatibility)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise HandshakeError(f"no hand-shake of this version: {str(error)[:200]}") from error
    if compatibility.version != HANDSHAKE_VERSION:
        raise HandshakeError(f"a hand-shake of version {compatibility.version}, not {HANDSHAKE_VERSION}")
    return compatibility


def why_incompatible(source: Compatibility, destination: Compatibility) -> str | None:
    """One line with every difference and both values of each ("the source runs vLLM 0.32.0, this instance 0.31.1"), or
    None."""
    reasons = [
        f"the source {said.format(_shown(here))}, this instance {_shown(there)}"
        for name, said in _SAID
        if (here := getattr(source, name)) != (there := getattr(destination, name))
    ]
    return "; ".join(reasons)[:MAX_REASON_CHARS] or None


def why_refused(text: str, own: str) -> str | None:
    """The same for a source's encoded hand-shake and our own. Never raises for what the source says."""
    if text == own:
        return None
    try:
        source = decode(text)
    except HandshakeError as error:
        return f"the source's hand-shake cannot be read: {error}"
    return why_incompatible(source, decode(own))


def _shown(value: object) -> str:
    match value:
        case ():
            return "none"
        case tuple():
            return ", ".join(f"{adapter.name} ({adapter.digest})" for adapter in value)
        case _:
            return str(value)[:200] or "none"
