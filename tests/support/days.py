"""Which simulated days can be made by hand? Any: figures follow from one number, so that tables can be reckoned."""

from __future__ import annotations

import math

from orchestrator.sim.day import Counts, Day
from orchestrator.sim.measures import SHARES, Curve, FleetMeasures
from orchestrator.sim.score import Figure, Score
from orchestrator.sim.series import Series

NAN = math.nan
OUTCOMES = {"committed": 5, "cancelled": 1}


def figure(mean: float) -> Figure:
    return Figure(mean, NAN, mean, 10 * mean, 100)


def score(seconds: float, num_failed: int = 0) -> Score:
    times = (figure(seconds), figure(seconds / 10), figure(seconds / 10), figure(seconds), figure(10 * seconds))
    return Score(*times, num_failed, num_preemptions=2, lost_s=1.5, lost_tokens=300, attainment=0.875)


def day(arm: str, seed: int = 1, seconds: float = 1.0, rate: float = 2.0, num_failed: int = 0) -> Day:
    curve = Curve([seconds * share for share in SHARES], [3 * seconds * share for share in SHARES], 8, num_failed)
    return Day(
        arm=arm,
        seed=seed,
        scores={"": score(seconds, num_failed)},
        counts=Counts(2, 5, 1, 10**9, 99, 1_000, 250),
        virtual_s=60.0,
        requests_per_s=rate,
        fleet=FleetMeasures(7200.0, 2.0, figure(0.01), OUTCOMES, 10**9, figure(0.01), figure(0.1)),
        curves={"": curve},
        series=Series(
            [0.0, 1.0, 2.0], [2, 2, 3], [-5.0, NAN, 1.0], [10.0, NAN, 2.0], [400.0, NAN, 3.0], [9, 8, 7], [1, 2, 3],
            [0, 0, 1], [0, 1, 5], [0.0, 0.1, 0.0],
        ),
    )  # fmt: skip
