"""Which requests does the demo send, and when? Pure: the same random generator state gives the same plan.

A generated plan is a Poisson trickle of short chats with bursts of long answers in it; a trace's plan keeps the trace's
arrivals and lengths, scaled in time and cut to what the model holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from orchestrator.demo.prose import diary, question
from orchestrator.demo.trace import TraceRow


class Endpoint(Enum):
    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `seed` None means greedy (temperature 0)."""

    temperature: float
    top_p: float
    seed: int | None
    frequency_penalty: float
    num_logprobs: int | None
    """None: no logprobs are asked for."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the plan; `arrival_s` counts from the start of the run."""

    index: int
    arrival_s: float
    endpoint: Endpoint
    text: str
    max_tokens: int
    min_tokens: int
    """0 with `ignores_eos`: the answer has exactly `max_tokens` tokens."""
    ignores_eos: bool
    sampling: Sampling
    priority: str = ""
    """What its `x-kvferry-priority` header says; empty: it has none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the run can hold."""

    max_prompt_tokens: int = 768
    max_output_tokens: int = 640
    max_requests: int = 2000
    output_tokens_per_s: float = 900.0
    """Traces are cut so that the plan asks for no more than this, on average over the run."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The generated workload: a Poisson trickle, and bursts at jittered distances."""

    duration_s: float
    trickle_per_s: float = 1.0
    trickle_median_tokens: float = 110.0
    burst_every_s: float = 7.5
    mean_burst: float = 18.0
    burst_median_tokens: float = 330.0
    burst_width_s: float = 0.4
    prompt_median_tokens: float = 70.0


def shape_for(duration_s: float) -> Shape:
    """Short runs have their bursts closer together, so that there are some to drain into."""
    return Shape(duration_s=duration_s, burst_every_s=min(7.5, duration_s / 6))


CHAT_BELOW_TOKENS = 100
"""Prompts planned shorter than this are a chat question; longer ones a diary to go on with."""
MIN_OUTPUT_TOKENS = 8


def generate(rng: Random, shape: Shape, limits: Limits) -> tuple[PlannedRequest, ...]:
    """The default workload, in order of arrival; never more than `limits.max_requests`."""
    rows = [*_trickle(rng, shape), *_bursts(rng, shape)]
    rows.sort(key=lambda row: (row.arrival_s, row.input_tokens, row.output_tokens))
    return _plan(rng, rows[: limits.max_requests], limits)


def from_trace(rng: Random, rows: Sequence[TraceRow], duration_s: float, limits: Limits) -> tuple[PlannedRequest, ...]:
    """The head of a trace, squeezed into `duration_s`.

    Lengths are first scaled by one factor, so that the 95th percentile meets the limit (the trace stays as uneven as it
    was), then cut. As many leading rows are taken as the output budget allows; their span becomes `duration_s`.
    """
    given = _length_factor([row.input_tokens for row in rows], limits.max_prompt_tokens)
    wanted = _length_factor([row.output_tokens for row in rows], limits.max_output_tokens)
    budget = limits.output_tokens_per_s * duration_s
    taken: list[TraceRow] = []
    for row in rows[: limits.max_requests]:
        output = min(limits.max_output_tokens, max(MIN_OUTPUT_TOKENS, round(row.output_tokens * wanted)))
        budget -= output
        if budget < 0 and taken:
            break
        taken.append(TraceRow(row.arrival_s, max(1, round(row.input_tokens * given)), output))
    span_s = taken[-1].arrival_s - taken[0].arrival_s
    squeeze = duration_s / span_s if span_s > 0 else 0.0
    first_s = taken[0].arrival_s
    squeezed = [TraceRow((row.arrival_s - first_s) * squeeze, row.input_tokens, row.output_tokens) for row in taken]
    return _plan(rng, squeezed, limits)


def _length_factor(lengths: Sequence[int], limit: int) -> float:
    ordered = sorted(lengths)
    high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)))]
    return min(1.0, limit / high)


def _trickle(rng: Random, shape: Shape) -> list[TraceRow]:
    rows: list[TraceRow] = []
    now_s = rng.expovariate(shape.trickle_per_s)
    while now_s < shape.duration_s:
        rows.append(_row(rng, now_s, shape.prompt_median_tokens, shape.trickle_median_tokens))
        now_s += rng.expovariate(shape.trickle_per_s)
    return rows


def _bursts(rng: Random, shape: Shape) -> list[TraceRow]:
    rows: list[TraceRow] = []
    now_s = min(1.0, shape.duration_s / 10)
    while now_s < shape.duration_s - shape.burst_width_s:
        for _ in range(max(4, round(rng.gauss(shape.mean_burst, math.sqrt(shape.mean_burst))))):
            arrival_s = now_s + rng.random() * shape.burst_width_s
            rows.append(_row(rng, arrival_s, shape.prompt_median_tokens, shape.burst_median_tokens))
        now_s += shape.burst_every_s * rng.uniform(0.7, 1.3)
    return rows


def _row(rng: Random, arrival_s: float, prompt_median: float, output_median: float) -> TraceRow:
    return TraceRow(
        arrival_s,
        max(1, round(rng.lognormvariate(math.log(prompt_median), 0.9))),
        max(MIN_OUTPUT_TOKENS, round(rng.lognormvariate(math.log(output_median), 0.7))),
    )


def _plan(rng: Random, rows: Sequence[TraceRow], limits: Limits) -> tuple[PlannedRequest, ...]:
    return tuple(_planned(rng, index, row, limits) for index, row in enumerate(rows))


def _planned(rng: Random, index: int, row: TraceRow, limits: Limits) -> PlannedRequest:
    prompt_tokens = min(limits.max_prompt_tokens, row.input_tokens)
    max_tokens = min(limits.max_output_tokens, row.output_tokens)
    is_chat = prompt_tokens < CHAT_BELOW_TOKENS
    has_exact_length = rng.random() < 0.8
    return PlannedRequest(
        index=index,
        arrival_s=row.arrival_s,
        endpoint=Endpoint.CHAT if is_chat else Endpoint.COMPLETION,
        text=question(rng, max_tokens) if is_chat else diary(rng, prompt_tokens, max_tokens),
        max_tokens=max_tokens,
        min_tokens=0 if has_exact_length else max_tokens // 2,
        ignores_eos=has_exact_length,
        sampling=_sampling(rng),
    )


def _sampling(rng: Random) -> Sampling:
    is_greedy = rng.random() < 0.5
    return Sampling(
        temperature=0.0 if is_greedy else 0.8,
        top_p=1.0 if is_greedy else 0.95,
        seed=None if is_greedy else rng.randrange(1, 2**31),
        frequency_penalty=0.2 if rng.random() < 0.2 else 0.0,
        num_logprobs=2 if rng.random() < 0.15 else None,
    )
