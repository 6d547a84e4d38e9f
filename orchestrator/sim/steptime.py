"""How long does a simulated step take? A published fit of measured steps, or one of our own; pure.

The formula is that of `step_time_models.json` (fits of profiles of Vidur and LLMServingSim): a linear part in the
tokens of the step with one bend, attention of those that decode, attention of each chunk of a prompt, the head, and
the processor's part. Milliseconds there, seconds here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_INSTANT_S = 1e-9
"""Times that differ by less are the same: they are differences of a clock that may have run for hours."""

Chunk = tuple[int, int]
"""(tokens that this step computes of a prompt, tokens of it computed before)."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Seconds of a step's attention."""

    decode_s: float = 0.0
    """Of any step that decodes."""
    sequence_s: float = 0.0
    """Of each request that decodes."""
    context_s: float = 0.0
    """Of each token of context that a decoding request reads."""
    chunk_s: float = 0.0
    token_s: float = 0.0
    """Of each token of a chunk."""
    square_s: float = 0.0
    """Of each pair of tokens of one chunk."""
    cross_s: float = 0.0
    """Of each pair of a token of a chunk and one computed before it."""
    before_s: float = 0.0
    """Of each token computed before a chunk."""

    def seconds(self, chunks: Sequence[Chunk], num_decoding: int, context_tokens: int) -> float:
        decoding_s = self.decode_s + self.sequence_s * num_decoding + self.context_s * context_tokens
        return (decoding_s if num_decoding else 0.0) + sum(
            self.chunk_s
            + self.token_s * num_new
            + self.square_s * num_new * num_new
            + self.cross_s * num_new * num_before
            + self.before_s * num_before
            for num_new, num_before in chunks
        )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step, by what it computes. Tokens of the step: those of its chunks, and one a decoding request."""

    base_s: float = 0.004
    token_s: float = 0.0002
    bend_tokens: float = math.inf
    """Beyond so many tokens each takes `bent_token_s` more."""
    bent_token_s: float = 0.0
    request_s: float = 0.0
    """Of each request in the step, whatever it does there."""
    attention: Attention = field(default_factory=Attention)
    mixed: Attention | None = None
    """Of steps that have both chunks and requests that decode; None: as the others."""

    def step_s(self, chunks: Sequence[Chunk], num_decoding: int, context_tokens: int) -> float:
        """Of a step that computes these chunks, and one token for each of `num_decoding` requests, which read
        `context_tokens` together."""
        num_tokens = num_decoding + sum(num_new for num_new, _ in chunks)
        linear_s = self.base_s + self.token_s * num_tokens
        if num_tokens > self.bend_tokens:
            linear_s += self.bent_token_s * (num_tokens - self.bend_tokens)
        attention = self.mixed if self.mixed is not None and chunks and num_decoding else self.attention
        return (
            linear_s
            + self.request_s * (num_decoding + len(chunks))
            + attention.seconds(chunks, num_decoding, context_tokens)
        )

    def steps_s(self, first_s: float, num_decoding: int, num_steps: int) -> float:
        """Of so many steps in which nothing happens but that `num_decoding` requests get a token each; the first one
        takes `first_s`. Their context grows by one token each a step, so the sum is in closed form."""
        grown = num_decoding * (num_steps * (num_steps - 1) // 2)
        return num_steps * first_s + self.attention.context_s * grown

    def steps_within(self, first_s: float, num_decoding: int, seconds: float) -> int:
        """How many such steps have ended after so many seconds, the end of the last one included.

        Raises:
            ValueError: a step takes no time.
        """
        if first_s <= 0.0:
            raise ValueError("a step must take time")
        num_steps = int(seconds / first_s)  # no fewer than there are: steps only get longer
        while num_steps and self.steps_s(first_s, num_decoding, num_steps) > seconds + _INSTANT_S:
            num_steps -= 1
        while self.steps_s(first_s, num_decoding, num_steps + 1) <= seconds + _INSTANT_S:
            num_steps += 1
        return num_steps


LLUMNIX_A10 = StepTimes(
    base_s=36.5e-3,
    token_s=0.0,
    bend_tokens=152,
    bent_token_s=0.207e-3,
    attention=Attention(sequence_s=0.27e-3, context_s=0.87e-6, square_s=5.0e-9, cross_s=10.0e-9),
)
"""LLaMA-7B on an A10, by what Llumnix's paper shows of it (read off its plots): a decode step of 8k tokens of context
takes 52.0 ms for 32 requests and 43.5 ms for one, computing 256 .. 8k tokens anew 58 .. 1,995 ms."""


LLUMNIX_REQUEST_S = 2.0e-3
"""Of each request in a step, beside what its plot of steps shows: vLLM 0.2 schedules, samples and tells each in Python.
Fitted to one figure of its paper: with INFaaS++ a request of M-M at 7.8 a second waits 5.9 s in the mean for its first
token. Steps alone would leave its fleet idle at the rates at which it measured."""

LLUMNIX_FLEET = replace(
    LLUMNIX_A10,
    request_s=LLUMNIX_REQUEST_S,
    mixed=replace(LLUMNIX_A10.attention, decode_s=LLUMNIX_A10.base_s),
)
"""An instance of its evaluation. vLLM 0.2 computes prompts in steps of their own: where prompts come beside requests
that decode, that is one more step's base."""


def from_profile(profiles: Mapping[str, Any], name: str) -> StepTimes:
    """Of one entry of `step_time_models.json` (`{"models": {name: ...}}`). Raises ValueError where there is none of
    that name, or a part of it is missing."""
    known = profiles.get("models", {})
    if name not in known:
        raise ValueError(f"no step times named {name!r}; there: {', '.join(sorted(known)) or 'none'}")
    model = known[name]
    try:
        hinge, cpu = model["linear"]["hinge"], model.get("cpu", {})
        return StepTimes(
            base_s=1e-3 * (hinge["k0_ms"] + model.get("head_ms", 0.0) + cpu.get("base_ms", 0.0)),
            token_s=1e-3 * hinge["k1_ms_per_token"],
            bend_tokens=hinge["T0_tokens"],
            bent_token_s=1e-3 * hinge["k2_ms_per_token_above_T0"],
            request_s=1e-3 * (model.get("head_per_seq_ms", 0.0) + cpu.get("per_seq_ms", 0.0)),
            attention=_pure(model["attn_decode"], model["attn_prefill"]),
            mixed=_mixed(model["attn_mixed"]) if "attn_mixed" in model else None,
        )
    except KeyError as error:
        raise ValueError(f"the step times of {name!r} lack {error}") from error


def _pure(decode: Mapping[str, float], prefill: Mapping[str, float]) -> Attention:
    return Attention(
        decode_s=1e-3 * decode["per_step_ms"],
        sequence_s=1e-3 * decode["per_seq_ms"],
        context_s=1e-3 * decode["per_ctx_token_ms"],
        chunk_s=1e-3 * prefill["per_chunk_ms"],
        token_s=1e-3 * prefill["per_token_ms"],
        square_s=1e-3 * prefill["per_token2_ms"],
        cross_s=1e-3 * prefill["per_token_x_ctx_ms"],
        before_s=1e-3 * prefill["per_ctx_token_ms"],
    )


def _mixed(mixed: Mapping[str, float]) -> Attention:
    return Attention(
        decode_s=1e-3 * mixed["per_step_ms"],
        sequence_s=1e-3 * mixed["per_decode_seq_ms"],
        context_s=1e-3 * mixed["per_decode_ctx_token_ms"],
        token_s=1e-3 * mixed["per_prefill_token_ms"],
        square_s=1e-3 * mixed["per_prefill_token2_ms"],
        cross_s=1e-3 * mixed["per_prefill_token_x_ctx_ms"],
        before_s=1e-3 * mixed["per_prefill_ctx_token_ms"],
    )
