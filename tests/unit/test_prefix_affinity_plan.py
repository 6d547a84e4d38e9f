"""Does bench.prefix_affinity send each arm the same requests, which share their beginnings and nothing else?"""

from __future__ import annotations

import pytest

from bench.prefix_affinity import ARMS, HEEDED, NUM_GROUPS, PREFIX_TOKENS, UNHEEDED, Answered, plan_of, share_of


def test_a_plan_follows_from_its_seed_and_keeps_its_rate() -> None:
    plan = plan_of(3, 200.0, 4.0)
    assert plan == plan_of(3, 200.0, 4.0) != plan_of(4, 200.0, 4.0)
    assert len(plan) == pytest.approx(800, rel=0.15)
    arrivals = [planned.arrival_s for planned in plan]
    assert arrivals == sorted(arrivals) and arrivals[-1] < 200.0


def test_requests_share_one_of_eight_beginnings_and_no_end() -> None:
    plan = plan_of(3, 60.0, 4.0)
    assert len({planned.prompt[:PREFIX_TOKENS] for planned in plan}) == NUM_GROUPS
    assert len({planned.prompt[PREFIX_TOKENS:] for planned in plan}) == len(plan)
    assert {planned.prompt[0] for planned in plan_of(4, 60.0, 4.0)} != {planned.prompt[0] for planned in plan}


def test_the_arms_differ_in_that_alone() -> None:
    assert ARMS[HEEDED].heeds_prefixes and not ARMS[UNHEEDED].heeds_prefixes


def test_the_share_is_of_tokens_not_of_requests() -> None:
    assert share_of([Answered(0.1, 1000, 900), Answered(0.1, 100, 0)]) == pytest.approx(900 / 1100)
    assert share_of([]) == 0.0
