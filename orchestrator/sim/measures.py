"""What did a simulated day cost its fleet, and how did its latencies lie? Moves, memory, instances; curves. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from instance.spec import MigrationSummary
from migration.types import Outcome
from orchestrator.sim.arrivals import Lived
from orchestrator.sim.score import Figure, num_warm_up
from orchestrator.sim.series import Moment

SHARES = (*(number / 100 for number in range(100)), 0.995, 0.999, 1.0)
"""Of requests: at these the curves are known."""


@dataclass(frozen=True, slots=True)
class FleetMeasures:
    """Of one day, from the first request sent to the last one answered."""

    instance_s: float
    """Seconds of all instances together, from when each was asked for until it was gone."""
    mean_instances: float
    fragmentation: Figure
    """Share of all blocks, of moments (`fragmentation.py`)."""
    outcomes: dict[str, int]
    """Migrations by outcome, as `migration.types.Outcome` has them."""
    moved_bytes: int
    """Copied by them, whatever their outcome."""
    stopped_s: Figure
    """Of committed moves of requests with their KV: from the stop at the source to the commit's answer."""
    downtime_s: Figure
    """Of the same: from the last token from the source to the first from the destination, as the client saw it and
    `gaps.py` reckons it. One that finds no room in the batch there waits for it meanwhile."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one kind of requests: at each of SHARES what so many of those answered had at most."""

    ttft_s: list[float]
    latency_s: list[float]
    num_done: int
    num_failed: int


def fleet_measures(
    moments: Sequence[Moment], instance_s: float, summaries: Sequence[MigrationSummary], downtimes_s: Sequence[float]
) -> FleetMeasures:
    committed = [one for one in summaries if one.outcome == Outcome.COMMITTED.value]
    return FleetMeasures(
        instance_s=instance_s,
        mean_instances=statistics.fmean(len(one.instances) for one in moments) if moments else math.nan,
        fragmentation=_figure([one.fragmentation for one in moments]),
        outcomes=dict(sorted(Counter(one.outcome for one in summaries).items())),
        moved_bytes=sum(one.num_bytes for one in summaries),
        stopped_s=_figure([one.stopped_s for one in committed if one.moved_tokens]),
        downtime_s=_figure(downtimes_s),
    )


def _figure(values: Sequence[float]) -> Figure:
    if not values:
        return Figure(math.nan, math.nan, math.nan, math.nan, 0)
    p50, p99 = np.percentile(values, [50, 99])
    return Figure(statistics.fmean(values), math.nan, float(p50), float(p99), len(values))


def curves(lived: Sequence[Lived]) -> dict[str, Curve]:
    """By kind, "" is all of them; without the first ones, as in `score.py`."""
    counted = lived[num_warm_up(len(lived)) :]
    kinds = sorted({one.arrival.kind for one in counted} - {""})
    return {kind: _curve([one for one in counted if kind in ("", one.arrival.kind)]) for kind in ("", *kinds)}


def _curve(counted: Sequence[Lived]) -> Curve:
    done = [one for one in counted if one.is_over and not one.error]

    def at_shares(measure: Callable[[Lived], float]) -> list[float]:
        values = [value for one in done if math.isfinite(value := measure(one))]
        return [round(float(value), 4) for value in np.quantile(values, SHARES)] if values else []

    latency_s = at_shares(lambda one: one.latency_s)
    return Curve(at_shares(lambda one: one.ttft_s), latency_s, len(done), len(counted) - len(done))
