"""How does ours do where Llumnix was measured? Its paper's experiments as simulated days, and what came of them.

Sixteen instances of LLaMA-7B on A10s, its generated requests, at the highest rates of its figures (Sun et al., OSDI'24,
section 6). *Serving*: five traces, ours and Llumnix as the paper states it. *Priority*: one request in ten urgent, in
bursts; the same requests when nobody heeds that are what it is compared with. *Scaling*: long requests on as many
instances as production's rule asks for; several bands of that rule trace what each arm pays for which tail. *Sweep*:
ours against ours without moves, at loads from a third of what a fleet of four holds to more than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.sim.compare import Job, Question, Scaled
from orchestrator.sim.day import Day
from orchestrator.sim.paired import Ratio, ratio

NUM_REQUESTS = 10_000
"""Of each day of its evaluation."""
SEED = 21
"""No rule of the policy and no parameter of it was chosen by a day of this seed."""
SERVING = {"S-S": 36.0, "M-M": 7.8, "L-L": 3.0, "S-L": 4.3, "L-S": 18.0}
"""Requests a second: the highest of its figures."""
OURS, THEIRS, PLAIN, INFAAS = "ours", "llumnix", "dispatch", "infaas++"

PRIORITY_RATE = 26.0
PRIORITY_SHARE = 0.5
"""Of the requests of other days, so that all of it takes 20 minutes on two processors."""
PRIORITY_CVS = (2.0, 4.0, 6.0, 8.0)
URGENT_SHARE = 0.1
URGENT_HEADROOM_BLOCKS = 751
"""The paper keeps 12,016 of 13,616 tokens free beside an urgent request: with 1,600 decoding is at its fastest."""

SCALING_RATE = 2.0
SCALING_SHARE = 0.3
"""Of the requests of other days: they come as slowly as nowhere else."""
BANDS = tuple(Scaled(low, high) for low, high in ((160.0, 960.0), (320.0, 960.0)))
"""Production's, and one that wants more instances."""
MATCHED_P99_S = 5.0
"""At this P99 of TTFT the paper's figure has its arms cost 20.7 % apart."""

SWEEP_LOADS = (0.3, 0.7, 0.9, 1.1)
SWEEP_SEEDS, SWEEP_REQUESTS, SWEEP_INSTANCES = 4, 200, 4
BAR = 1.02
"""An interval must not lie above it."""
CAPACITY = {"S-S": 2.5, "M-M": 0.56, "L-L": 0.20, "S-L": 0.27, "L-S": 1.2}
"""Requests a second and instance that fill it (`bench.never_worse`, all at once)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One day of the suite."""

    part: str
    row: str
    arm: str
    """Its name in that part's table."""
    job: Job


def jobs(num_requests: int = NUM_REQUESTS, seed: int = SEED) -> list[Asked]:
    """Every day, the longest first: two processors are then busy until the end."""
    days = [*_serving(num_requests, seed), *_priority(num_requests, seed), *_scaling(num_requests, seed)]
    days += _sweep(max(20, SWEEP_REQUESTS * num_requests // NUM_REQUESTS))
    return sorted(days, key=lambda one: -one.job[0].num_requests / one.job[0].requests_per_s)


def _serving(num_requests: int, seed: int) -> list[Asked]:
    return [
        Asked("serving", name, arm, (Question(name, rate, num_requests=num_requests), arm, seed))
        for name, rate in SERVING.items()
        for arm in (THEIRS, OURS)
    ]


def _priority(num_requests: int, seed: int) -> list[Asked]:
    asked, count = [], max(1, int(PRIORITY_SHARE * num_requests))
    for cv in PRIORITY_CVS:
        question = Question("S-S", PRIORITY_RATE, cv, count, urgent_share=URGENT_SHARE)
        heeded = replace(question, urgent_headroom_blocks=URGENT_HEADROOM_BLOCKS)
        ignored = replace(question, urgent_priority=0)
        asked.append(Asked("priority", f"CV {cv:g}", "nobody urgent", (ignored, OURS, seed)))
        asked.append(Asked("priority", f"CV {cv:g}", OURS, (heeded, OURS, seed)))
    return asked


def _scaling(num_requests: int, seed: int) -> list[Asked]:
    count = max(1, int(SCALING_SHARE * num_requests))
    return [
        Asked("scaling", f"{band.low_steps:g} to {band.high_steps:g}", arm, (question, arm, seed))
        for band in BANDS
        for question in [Question("L-L", SCALING_RATE, num_requests=count, scaled=band)]
        for arm in (INFAAS, OURS)
    ]


def _sweep(count: int) -> list[Asked]:
    return [
        Asked("sweep", f"{name} {load:g}", arm, (question, arm, seed))
        for name, capacity in CAPACITY.items()
        for load in SWEEP_LOADS
        for question in [Question(name, load * capacity * SWEEP_INSTANCES, 1.0, count, num_instances=SWEEP_INSTANCES)]
        for seed in range(SEED, SEED + SWEEP_SEEDS)
        for arm in (PLAIN, OURS)
    ]


@dataclass(frozen=True, slots=True)
class Lasted:
    """A day of the suite, and what came of it."""

    asked: Asked
    day: Day


class Told:
    """All days of one suite."""

    def __init__(self, days: Sequence[Lasted]) -> None:
        self._days = days

    def days(self, part: str, row: str, arm: str) -> list[Day]:
        """By seed."""
        found = [one for one in self._days if (one.asked.part, one.asked.row, one.asked.arm) == (part, row, arm)]
        return [one.day for one in sorted(found, key=lambda one: one.asked.job[2])]

    def rows(self, part: str) -> list[str]:
        """In the order of the suite."""
        return list(dict.fromkeys(one.row for one in jobs_in_order(part)))

    def figures(self) -> dict[str, float]:
        serving = [self.serving(row) for row in self.rows("serving")]
        priority = [self.priority(row) for row in self.rows("priority")]
        sweep = [one for row in self.rows("sweep") for one in self.sweep(row)]
        return {
            "p99_ttft_gain_over_llumnix_geomean": _geometric_mean([gain for gain, _ in serving]),
            "worst_mean_e2e_ratio": max(mean for _, mean in serving),
            "high_gain": _geometric_mean([gain for gain, _, _ in priority]),
            "high_gain_worst": min(gain for gain, _, _ in priority),
            "normal_p99_cost": max(cost for _, cost, _ in priority),
            "normal_p99_ttft_cost": max(cost for _, _, cost in priority),
            "instance_hours_saving_matched": self.saving(),
            "never_worse_rows": float(len(sweep)),
            "never_worse_violations": float(sum(one.low > BAR for one in sweep)),
        }

    def serving(self, row: str) -> tuple[float, float]:
        """(P99 of TTFT, theirs over ours; mean latency, ours over theirs)."""
        theirs, ours = (self.days("serving", row, arm) for arm in (THEIRS, OURS))
        tails = [[day.scores[""].ttft_s.p99 for day in days] for days in (ours, theirs)]
        means = [[day.scores[""].latency_s.mean for day in days] for days in (theirs, ours)]
        return ratio(*tails).mean, ratio(*means).mean

    def priority(self, row: str) -> tuple[float, float, float]:
        """(Mean latency of urgent requests when nobody heeds them, over ours; by how much P99 of normal ones' latency
        is longer with ours, as a share of it; the same of their TTFT)."""
        ignored, heeded = (self.days("priority", row, arm) for arm in ("nobody urgent", OURS))
        urgent = [[day.scores["urgent"].latency_s.mean for day in days] for days in (heeded, ignored)]
        latency = [[day.scores["normal"].latency_s.p99 for day in days] for days in (ignored, heeded)]
        ttft = [[day.scores["normal"].ttft_s.p99 for day in days] for days in (ignored, heeded)]
        return ratio(*urgent).mean, ratio(*latency).mean - 1.0, ratio(*ttft).mean - 1.0

    def costs(self, arm: str) -> list[tuple[float, float]]:
        """(P99 of TTFT in s, mean instances) of each band, by the first."""
        days = [self.days("scaling", row, arm)[0] for row in self.rows("scaling")]
        return sorted((day.scores[""].ttft_s.p99, day.fleet.mean_instances) for day in days)

    def saving(self) -> float:
        """Share of INFaaS++'s instance-hours that ours needs less where both have a P99 of TTFT of MATCHED_P99_S, or
        the next one that both have; NaN: their tails lie apart."""
        theirs, ours = self.costs(INFAAS), self.costs(OURS)
        low, high = max(theirs[0][0], ours[0][0]), min(theirs[-1][0], ours[-1][0])
        if not low <= high:
            return math.nan
        at_s = min(max(MATCHED_P99_S, low), high)
        return 1.0 - _between(ours, at_s) / _between(theirs, at_s)

    def sweep(self, row: str) -> tuple[Ratio, Ratio]:
        """Ours over ours without moves: P99 of TTFT, mean latency."""
        plain, ours = (self.days("sweep", row, arm) for arm in (PLAIN, OURS))
        tails = [[day.scores[""].ttft_s.p99 for day in days] for days in (plain, ours)]
        means = [[day.scores[""].latency_s.mean for day in days] for days in (plain, ours)]
        return ratio(*tails), ratio(*means)


def jobs_in_order(part: str) -> list[Asked]:
    parts = {"serving": _serving(1, 1), "priority": _priority(1, 1), "scaling": _scaling(1, 1), "sweep": _sweep(1)}
    return parts[part]


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """On the line through these, which ascend, at a place between the first and the last; the first by log."""
    for (before, low), (after, high) in pairwise(points):
        if before <= at <= after:
            share = 0.0 if after == before else math.log(at / before) / math.log(after / before)
            return low + share * (high - low)
    return points[0][1] if at <= points[0][0] else points[-1][1]


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
