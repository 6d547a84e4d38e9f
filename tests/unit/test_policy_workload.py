"""Does bench.policy_live send each arm the same heavy-tailed requests, and mark the urgent ones in one arm only?"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean

import pytest

from bench.policy_live_runs import URGENT_SHARE, with_urgent
from bench.policy_workload import Workload
from orchestrator.sim.workload import Zipf

WORKLOAD = Workload(requests_per_s=5.0, duration_s=400.0)


def test_lengths_have_their_mean_a_heavy_tail_and_a_cap() -> None:
    drawn = Zipf(mean=128, alpha=1.5, cap=10_000).draw(Random(1), 20_000)
    assert fmean(drawn) == pytest.approx(128, rel=0.1)
    assert sorted(drawn)[len(drawn) // 2] < 64, "half of them are short"
    assert max(Zipf(mean=128, alpha=1.5, cap=1024).draw(Random(1), 20_000)) == 1024


def test_a_plan_follows_from_its_seed_and_keeps_its_rate() -> None:
    plan = WORKLOAD.plan(seed=3)
    assert plan == WORKLOAD.plan(seed=3) != WORKLOAD.plan(seed=4)
    assert len(plan) == pytest.approx(2000, rel=0.15)
    arrivals = [request.arrival_s for request in plan]
    assert arrivals == sorted(arrivals)


def test_the_same_tenth_is_urgent_in_both_arms_and_only_one_says_so() -> None:
    plan = WORKLOAD.plan(seed=3)
    told, urgent = with_urgent(plan, 3, told=True)
    untold, same = with_urgent(plan, 3, told=False)
    assert urgent == same and untold == plan
    assert len(urgent) == pytest.approx(URGENT_SHARE * len(plan), rel=0.3)
    assert [replace(request, priority="") for request in told] == list(plan)
    assert {request.index for request in told if request.priority == "high"} == urgent
