"""Which requests come from a published trace? Its own, with its own gaps, from a moment on that the seed picks.

A trace that ends before enough requests have come begins anew, one mean gap later. Another seed begins elsewhere in it:
that is another day, but its requests may be among those of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, groupby, pairwise
from pathlib import Path
from random import Random

from orchestrator.sim.asked import Asked, Drawn, Half, Wanted, half_of, paced
from orchestrator.sim.published import number, reading, rows, tokens


def read_trace(path: Path) -> list[Asked]:
    """With the columns `arrival_s`, `input_tokens` and `output_tokens`, and `hash_ids` where it has them, in order of
    arrival. Raises ConfigError."""
    with reading(path, "trace of requests"):
        trace = [
            Asked(
                number(row, "arrival_s"),
                tokens(row, "input_tokens"),
                tokens(row, "output_tokens"),
                prefix_ids=_prefix_ids(row.get("hash_ids", ())),
            )
            for row in rows(path)
        ]
        if len(trace) < 2:
            raise ValueError("it has fewer than two requests")
        if any(later.at_s < one.at_s for one, later in pairwise(trace)):
            raise ValueError("arrival_s does not ascend")
    return trace


def _prefix_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, int) for one in value):
        raise ValueError(f"hash_ids is {value!r}")
    return tuple(value)


def half_of_trace(trace: list[Asked], half: Half) -> list[Asked]:
    return trace[half_of([one.at_s for one in trace], half)]


def spread(trace: Sequence[Asked], rng: Random, tick_s: float) -> list[Asked]:
    """A trace whose times were rounded down to ticks: each tick's requests at times drawn uniformly within it, in
    their order. Drawn, not even: as many Poisson arrivals would lie so, and requests in equal gaps are easier to serve
    than any that really came (how many come a tick is as scattered as with Poisson's, too)."""
    found: list[Asked] = []
    for tick, group in groupby(trace, lambda one: round(one.at_s / tick_s)):
        members = list(group)
        within = sorted(rng.random() for _ in members)
        found += [replace(one, at_s=(tick + share) * tick_s) for one, share in zip(members, within, strict=True)]
    return found


def trace_day(path: Path, half: Half, rng: Random, wanted: Wanted, tick_s: float = 0.0) -> Drawn:
    """`tick_s`: what its times were rounded to; 0: they were not. Raises ConfigError."""
    trace = half_of_trace(read_trace(path), half)
    if tick_s:
        trace = spread(trace, rng, tick_s)
    return paced(endless(trace, rng.randrange(len(trace))), wanted)


def endless(trace: Sequence[Asked], start: int) -> Iterator[Asked]:
    """From that request on, over and over. What comes again has new `prefix_ids`: it shares with what comes with it,
    not with itself."""
    size = len(trace)
    lap_s = (trace[-1].at_s - trace[0].at_s) * size / max(1, size - 1)
    num_ids = 1 + max((max(one.prefix_ids, default=-1) for one in trace), default=-1)
    for position in count(start):
        one = trace[position % size]
        again = (position - start) // size
        ids = tuple(each + again * num_ids for each in one.prefix_ids) if again else one.prefix_ids
        yield replace(one, at_s=one.at_s + position // size * lap_s, prefix_ids=ids)
