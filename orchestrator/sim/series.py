"""How did a simulated fleet look, second by second? Samples of its instances, and what they say together. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_POINTS = 600
"""Of a series in a result."""


@dataclass(frozen=True, slots=True)
class Glimpse:
    """One instance at a moment."""

    freeness: float
    """In decode steps (`policy/load.py`); -inf: it takes no requests."""
    free_blocks: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A fleet at a moment."""

    at_s: float
    """Since the first request was sent."""
    instances: Mapping[str, Glimpse]
    num_moves: int
    """Committed by then."""
    fragmentation: float
    """Share of all blocks (`fragmentation.py`)."""


@dataclass(frozen=True, slots=True)
class Series:
    """Of a fleet, as columns of equal length: one entry a point, NaN where there is nothing to say."""

    at_s: list[float]
    instances: list[int]
    freeness_min: list[float]
    """Over the instances that take requests, as are the next two."""
    freeness_median: list[float]
    freeness_max: list[float]
    free_blocks: list[int]
    """Of all instances, as are the next two."""
    running: list[int]
    waiting: list[int]
    moves: list[int]
    """Committed by then."""
    fragmentation: list[float]


@dataclass(frozen=True, slots=True)
class InstanceSeries:
    """Of one instance, as columns; NaN or nothing while it is not there."""

    instance: str
    freeness: list[float]
    free_blocks: list[float]
    running: list[float]
    waiting: list[float]


def series_of(moments: Sequence[Moment]) -> Series:
    chosen = thinned(moments)
    serving = [[one.freeness for one in each.instances.values() if one.freeness > -math.inf] for each in chosen]
    return Series(
        at_s=[round(each.at_s, 3) for each in chosen],
        instances=[len(each.instances) for each in chosen],
        freeness_min=[round(min(of, default=math.nan), 3) for of in serving],
        freeness_median=[round(statistics.median(of), 3) if of else math.nan for of in serving],
        freeness_max=[round(max(of, default=math.nan), 3) for of in serving],
        free_blocks=[sum(one.free_blocks for one in each.instances.values()) for each in chosen],
        running=[sum(one.num_running for one in each.instances.values()) for each in chosen],
        waiting=[sum(one.num_waiting for one in each.instances.values()) for each in chosen],
        moves=[each.num_moves for each in chosen],
        fragmentation=[round(each.fragmentation, 5) for each in chosen],
    )


def series_of_each(moments: Sequence[Moment]) -> list[InstanceSeries]:
    """By name, at the times of `series_of`."""
    chosen = thinned(moments)
    names = sorted({name for each in chosen for name in each.instances}, key=lambda name: (len(name), name))
    found = []
    for name in names:
        own = [each.instances.get(name) for each in chosen]
        found.append(
            InstanceSeries(
                name,
                [math.nan if one is None or one.freeness == -math.inf else round(one.freeness, 3) for one in own],
                [math.nan if one is None else one.free_blocks for one in own],
                [math.nan if one is None else one.num_running for one in own],
                [math.nan if one is None else one.num_waiting for one in own],
            )
        )
    return found


def thinned(moments: Sequence[Moment]) -> list[Moment]:
    """Every n-th, so that there are MAX_POINTS at most."""
    step = max(1, math.ceil(len(moments) / MAX_POINTS))
    return list(moments[::step])
