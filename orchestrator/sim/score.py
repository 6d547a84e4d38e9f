"""How well was a simulated fleet served? Figures of those who asked, without the first ones; pure.

Confidence intervals are of batch means: neighbours in time share their queue, so single requests are not independent,
but the means of long stretches nearly are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from migration.types import RequestId
from orchestrator.policy.targets import NO_TARGETS, Targets
from orchestrator.sim.arrivals import Lived
from orchestrator.sim.gaps import Gaps, together
from orchestrator.sim.losses import Loss

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
    itl_s: Figure
    """Of gaps, not of requests: `gaps.py` says how. NaN where nobody has counted them."""
    longest_gap_s: Figure
    """Of each request."""
    latency_s: Figure
    num_failed: int
    num_preemptions: int = 0
    lost_s: float = 0.0
    """By preemptions, of all these requests together."""
    lost_tokens: int = 0
    attainment: float = math.nan
    """Share of the requests, those that failed among them, whose targets were met; NaN where none has any."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What is known of requests beside their lives."""

    gaps: Mapping[str, Gaps] | None = None
    """By kind, of those that count."""
    losses: Mapping[RequestId, Loss] | None = None
    targets: Targets = NO_TARGETS
    """Of requests that bring none."""


NOTHING_BESIDE = Beside()


def score(lived: Sequence[Lived], warm_up_share: float = WARM_UP_SHARE, beside: Beside = NOTHING_BESIDE) -> Score:
    """Of these, in order of arrival, without the first ones, which found an empty fleet."""
    counted = lived[num_warm_up(len(lived), warm_up_share) :]
    done = [one for one in counted if one.is_over and not one.error]
    known = beside.losses or {}
    losses = [loss for one in counted if (loss := known.get(one.request_id)) is not None]
    return Score(
        ttft_s=figure(done, lambda one: one.ttft_s),
        tpot_s=figure(done, lambda one: one.tpot_s),
        itl_s=_of_gaps(together((beside.gaps or {}).values())),
        longest_gap_s=figure(done, lambda one: one.longest_gap_s),
        latency_s=figure(done, lambda one: one.latency_s),
        num_failed=len(counted) - len(done),
        num_preemptions=sum(loss.num_preemptions for loss in losses),
        lost_s=sum(loss.seconds for loss in losses),
        lost_tokens=sum(loss.tokens for loss in losses),
        attainment=attainment(counted, beside.targets),
    )


def by_kind(
    lived: Sequence[Lived], warm_up_share: float = WARM_UP_SHARE, beside: Beside = NOTHING_BESIDE
) -> dict[str, Score]:
    """The same for each kind, and under "" for all."""
    kinds = sorted({one.arrival.kind for one in lived} - {""})
    counted = lived[num_warm_up(len(lived), warm_up_share) :]
    found = {"": score(counted, 0.0, beside)}
    for kind in kinds:
        of_it = {name: gaps for name, gaps in (beside.gaps or {}).items() if name == kind}
        own = [one for one in counted if one.arrival.kind == kind]
        found[kind] = score(own, 0.0, replace(beside, gaps=of_it))
    return found


def num_warm_up(num_requests: int, share: float = WARM_UP_SHARE) -> int:
    """How many of the first ones do not count."""
    return int(num_requests * share)


def attainment(lived: Sequence[Lived], targets: Targets = NO_TARGETS) -> float:
    """Share of those that want something who got it: the first token in time, each further one in time on average, and
    a whole answer. `targets` are those of requests that bring none; NaN where nobody wants anything."""
    wanted = [(one, own) for one in lived if (own := one.arrival.targets or targets)]
    return sum(_is_met(one, own) for one, own in wanted) / len(wanted) if wanted else math.nan


def _is_met(one: Lived, wanted: Targets) -> bool:
    if one.error or not one.is_over:
        return False
    has_ttft = wanted.ttft_s is None or one.ttft_s <= wanted.ttft_s
    # A single token has no second one to come late.
    return has_ttft and (wanted.tpot_s is None or not one.tpot_s > wanted.tpot_s)


def _of_gaps(gaps: Gaps) -> Figure:
    return Figure(gaps.mean_s, math.nan, gaps.quantile_s(0.5), gaps.quantile_s(0.99), gaps.num)


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
