"""What does the fake engine compute? A next token that depends on every word of the KV memory, and can be foretold.

The KV of a token is one 64-bit word, a function of token and position. The next token is a digest of the words as they
lie in the request's blocks, so a block that was not copied, or was copied to the wrong place, changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from instance.vllm.handshake import Compatibility

FAKE_VERSION = "fake-1"
VOCABULARY = 32_000
WORD_BYTES = 8
FINISH_STOP = 0
FINISH_LENGTH = 1

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1


class FakeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of a submission to the fake engine."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    stop_token: int | None = None
    movable: bool = True
    ready_polls: int = 0
    """So many times the destination says "not yet" before it could commit it (a grammar that compiles)."""
    arrived_s: float = 0.0
    """By whatever clock all who submit share (vLLM's `arrival_time`): queues are in its order, also after a move. Those
    that came at once are in the order in which the engine got them."""


class FakeMove(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of a description: all a destination needs to make the request."""

    request: FakeRequest
    external_id: str
    priority: int
    output: tuple[int, ...]


class FakeState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The small state of a stopped request."""

    output: tuple[int, ...]
    computed_tokens: int
    generator: int
    num_preemptions: int
    priority: int = 0


Payload = TypeVar("Payload", FakeRequest, FakeMove, FakeState)


def encode_fake(request: FakeRequest) -> bytes:
    return msgspec.msgpack.encode(request)


def decode_fake(data: bytes, kind: type[Payload]) -> Payload | None:
    """None: these bytes are none of that kind."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def fake_compatibility(block_size: int) -> Compatibility:
    """What two fake engines must have in common: the arithmetic, and the size of a block."""
    return Compatibility(
        engine_version=FAKE_VERSION,
        model="fake",
        weights=f"vocabulary {VOCABULARY}",
        model_config="",
        dtype="uint64",
        quantization="",
        kv_dtype="uint64",
        kv_layout=f"{WORD_BYTES} bytes a token",
        block_size=block_size,
        max_model_len=0,
        tensor_parallel_size=1,
        model_runner="fake",
    )


def mix(value: int) -> int:
    """splitmix64's finaliser: 64 bits in, 64 well-mixed bits out (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_words(values: Words) -> Words:
    """`mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Words = values ^ (values >> np.uint64(31))
    return result


def kv_words(tokens: Sequence[int], first_position: int) -> Words:
    """The KV of these tokens: shape [len(tokens)]."""
    positions = np.arange(first_position, first_position + len(tokens), dtype=np.uint64)
    return mix_words(np.asarray(tokens, dtype=np.uint64) + (positions << np.uint64(32)))


def weights(num_positions: int) -> Words:
    """Odd weights by position, so that two blocks in each other's place change the digest: shape [num_positions]."""
    return mix_words(np.arange(num_positions, dtype=np.uint64)) | np.uint64(1)


def digest(words: Words, position_weights: Words) -> int:
    """Sum over the context, modulo 2**64."""
    return int((words * position_weights[: len(words)]).sum(dtype=np.uint64))


def first_generator(seed: int) -> int:
    return mix(seed & _MASK)


def state_after(move: FakeMove) -> FakeState:
    """Of a request that has put out so much, with nothing computed: the sampler has drawn once a token."""
    generator = first_generator(move.request.seed)
    for _ in move.output:
        generator = next_generator(generator)
    return FakeState(move.output, 0, generator, 0, move.priority)


def next_generator(generator: int) -> int:
    return mix(generator ^ 1)


def sample(context_digest: int, generator: int) -> int:
    return mix(context_digest ^ generator) % VOCABULARY


def finish_of(request: FakeRequest, token: int, num_output_tokens: int) -> int | None:
    """The finish reason (vLLM's numbers) if this token is the last."""
    if token == request.stop_token:
        return FINISH_STOP
    return FINISH_LENGTH if num_output_tokens >= request.max_tokens else None


def expected_output(request: FakeRequest) -> tuple[int, ...]:
    """What an undisturbed engine answers: the slow, obvious version, without blocks."""
    total = len(request.prompt) + request.max_tokens
    position_weights = weights(total)
    context_digest = digest(kv_words(request.prompt, 0), position_weights)
    generator = first_generator(request.seed)
    output: list[int] = []
    while True:
        token = sample(context_digest, generator)
        output.append(token)
        if finish_of(request, token, len(output)) is not None:
            return tuple(output)
        generator = next_generator(generator)
        position = len(request.prompt) + len(output) - 1
        word = kv_words((token,), position)
        context_digest = (context_digest + digest(word, position_weights[position:])) & _MASK
