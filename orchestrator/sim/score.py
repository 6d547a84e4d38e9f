"""How well was a simulated fleet served? Figures of those who asked, without the first ones; pure.

Confidence intervals are of batch means: neighbours in time share their queue, so single requests are not independent,
but the means of long stretches nearly are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.sim.arrivals import Lived

NUM_BATCHES = 20
WARM_UP_SHARE = 0.1
_T_95 = 2.093
"""Student's t at 97.5 %, NUM_BATCHES - 1 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Of one measure of many requests, in its unit."""

    mean: float
    half_width: float
    """Of the mean's 95 % interval; NaN where there are too few."""
    p50: float
    p99: float
    n: int


@dataclass(frozen=True, slots=True)
class Score:
    """Of one kind of requests, or of all."""

    ttft_s: Figure
    tpot_s: Figure
    latency_s: Figure
    num_failed: int


def score(lived: Sequence[Lived], warm_up_share: float = WARM_UP_SHARE) -> Score:
    """Of these, in order of arrival, without the first ones, which found an empty fleet."""
    counted = lived[int(len(lived) * warm_up_share) :]
    done = [one for one in counted if one.is_over and not one.error]
    return Score(
        ttft_s=figure(done, lambda one: one.ttft_s),
        tpot_s=figure(done, lambda one: one.tpot_s),
        latency_s=figure(done, lambda one: one.latency_s),
        num_failed=len(counted) - len(done),
    )


def by_kind(lived: Sequence[Lived], warm_up_share: float = WARM_UP_SHARE) -> dict[str, Score]:
    """The same for each kind, and under "" for all."""
    kinds = sorted({one.arrival.kind for one in lived} - {""})
    counted = lived[int(len(lived) * warm_up_share) :]
    found = {"": score(counted, 0.0)}
    return found | {kind: score([one for one in counted if one.arrival.kind == kind], 0.0) for kind in kinds}


def figure(lived: Sequence[Lived], measure: Callable[[Lived], float]) -> Figure:
    values = [value for one in lived if math.isfinite(value := measure(one))]
    if not values:
        return Figure(math.nan, math.nan, math.nan, math.nan, 0)
    p50, p99 = np.percentile(values, [50, 99])
    return Figure(statistics.fmean(values), half_width(values), float(p50), float(p99), len(values))


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by the means of NUM_BATCHES stretches of equal length; NaN for fewer values
    than that."""
    size = len(values) // NUM_BATCHES
    if not size:
        return math.nan
    means = [statistics.fmean(values[index * size : (index + 1) * size]) for index in range(NUM_BATCHES)]
    return _T_95 * statistics.stdev(means) / math.sqrt(NUM_BATCHES)


def littles_law_gap(lived: Sequence[Lived]) -> float:
    """By what share the mean number of requests in the fleet, integrated over time, differs from their rate times their
    mean latency (L = lambda W). Zero but for rounding when every request's life was told whole."""
    done = [one for one in lived if one.is_over and not one.error]
    if not done:
        return 0.0
    changes = sorted([(one.sent_s, 1) for one in done] + [(one.last_s, -1) for one in done])
    began_s, ended_s = changes[0][0], changes[-1][0]
    area, present, last_s = 0.0, 0, began_s
    for at_s, change in changes:
        area += present * (at_s - last_s)
        present, last_s = present + change, at_s
    span_s = ended_s - began_s
    if span_s <= 0:
        return 0.0
    expected = len(done) / span_s * statistics.fmean(one.latency_s for one in done)
    return abs(area / span_s - expected) / expected if expected else 0.0
