"""Does the target follow the mean freeness, and only where every condition holds? Each test turns one condition."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from instance.messages import RequestLoad
from migration.types import InstanceId
from orchestrator.policy.autoscale import (
    MAX_SEEN,
    AutoscaleParams,
    Decision,
    FleetView,
    Limits,
    Trend,
    choose_victim,
    emptying_cost_blocks,
    mean_steps,
    plan_autoscale,
    steps_after,
)
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import InstanceView
from tests.support.reports import load_report, request_load

PARAMS = AutoscaleParams()
LIMITS = Limits(1, 4)
LONG_AGO = Trend(changed_s=-1e9)


def view(
    name: str,
    *requests: RequestLoad,
    used_blocks: int | None = None,
    num_running: int | None = None,
    head_of_line_blocks: int = 0,
    draining: bool = False,
    age_s: float = 0.2,
) -> InstanceView:
    """An instance of 1000 blocks of 16 tokens with these requests, or with so much in use."""
    used = sum(request.num_blocks for request in requests) if used_blocks is None else used_blocks
    load = load_report(
        name,
        free_blocks=1000 - used,
        num_running=len(requests) if num_running is None else num_running,
        num_waiting=1 if head_of_line_blocks else 0,
        head_of_line_blocks=head_of_line_blocks,
    )
    return InstanceView(InstanceId(name), load, requests, draining, 2, 2, age_s)


def full(name: str) -> InstanceView:
    """50 blocks are free, 10 requests run: 80 decode steps."""
    return view(name, used_blocks=950, num_running=10)


def idle(name: str) -> InstanceView:
    return view(name, used_blocks=0, num_running=0)


def fleet(*views: InstanceView, **changes: object) -> FleetView:
    plain = FleetView(views, num_unheard=0, num_pending=0, num_retiring=0, newest_age_s=1e9)
    return replace(plain, **changes)  # type: ignore[arg-type]


def after_a_period(
    seen: FleetView, target: int, limits: Limits = LIMITS, trend: Trend = LONG_AGO
) -> tuple[Decision, Trend]:
    """The decision when the same is seen at 0 s and again when the period is over."""
    first, trend = plan_autoscale(seen, target, limits, trend, PARAMS, 0.0)
    assert first.target == target, "one look is not enough"
    lasting_s = PARAMS.period_s * (PARAMS.calm_periods if trend.above_since_s is not None else 1)
    almost, trend = plan_autoscale(seen, target, limits, trend, PARAMS, lasting_s - 1.0)
    assert almost.target == target, "nor is it for long enough"
    return plan_autoscale(seen, target, limits, trend, PARAMS, lasting_s)


def test_a_fleet_that_stays_full_gets_one_more_and_the_decision_says_why_and_how_old_its_signals_are() -> None:
    decision, trend = after_a_period(fleet(full("a"), msgspec.structs.replace(full("b"), signal_age_s=0.7)), 2)
    assert decision.target == 3 and decision.mean_steps == 80
    assert decision.reason == "mean freeness 80 decode steps, below 160 for 10 s" and decision.signal_age_s == 0.7
    assert trend == Trend(changed_s=PARAMS.period_s)


def test_a_moment_inside_the_band_starts_the_period_anew() -> None:
    seen, trend = fleet(full("a")), LONG_AGO
    for now_s, now_seen in ((0.0, seen), (8.0, fleet(view("a", used_blocks=500, num_running=16))), (9.0, seen)):
        decision, trend = plan_autoscale(now_seen, 1, LIMITS, trend, PARAMS, now_s)
    decision, trend = plan_autoscale(seen, 1, LIMITS, trend, PARAMS, 18.0)
    assert decision.target == 1 and "not yet for 10 s" in decision.reason
    decision, trend = plan_autoscale(seen, 1, LIMITS, trend, PARAMS, 19.0)
    assert decision.target == 2


def test_after_a_change_nothing_is_given_up_for_a_while_but_one_more_is_started_at_once() -> None:
    idle_fleet = fleet(idle("a"), idle("b"))
    decision, _ = after_a_period(idle_fleet, 2, trend=Trend(changed_s=-20.0))
    assert decision.target == 2 and decision.reason.endswith("cooling down")
    assert after_a_period(idle_fleet, 2, trend=Trend(changed_s=-30.0))[0].target == 1
    assert after_a_period(fleet(full("a")), 1, trend=Trend(changed_s=-1.0))[0].target == 2


def test_after_a_change_by_hand_nothing_is_decided_for_a_while() -> None:
    by_hand = Trend(changed_s=-20.0, is_by_hand=True)
    decision, trend = after_a_period(fleet(full("a")), 1, trend=by_hand)
    assert decision.target == 1 and decision.reason.endswith("cooling down") and trend.is_by_hand
    decision, trend = after_a_period(fleet(full("a")), 1, trend=replace(by_hand, changed_s=-50.0))
    assert decision.target == 2 and not trend.is_by_hand


def test_one_that_is_to_come_counts_as_empty_so_that_it_is_not_asked_for_twice() -> None:
    assert mean_steps([full("a").load], 1, PARAMS) == (80 + PARAMS.cap_steps) / 2
    decision, _ = after_a_period(fleet(full("a"), num_pending=1), 2)
    assert decision.target == 2 and "below" not in decision.reason
    many = [full(f"i{number:02}") for number in range(30)]
    assert after_a_period(fleet(*many, num_pending=1), 31, Limits(1, 64))[0].target == 32, "one is not enough here"
    decision, _ = after_a_period(fleet(*many, num_pending=2), 32, Limits(1, 64))
    assert decision.target == 32, "two at once are the bound"


def test_neither_an_empty_nor_a_blocked_instance_dominates_the_mean() -> None:
    blocked = view("b", used_blocks=1000, num_running=1, head_of_line_blocks=900)
    assert mean_steps([blocked.load], 0, PARAMS) == PARAMS.floor_steps
    assert mean_steps([idle("a").load], 0, PARAMS) == PARAMS.cap_steps
    assert mean_steps([idle("a").load, blocked.load], 0, PARAMS) == PARAMS.high_steps
    decision, _ = after_a_period(fleet(idle("a"), blocked), 2)
    assert decision.target == 2, "that is for rebalancing to mend"


def test_an_idle_fleet_shrinks_to_the_fewest_and_never_below_one() -> None:
    decision, _ = after_a_period(fleet(idle("a"), idle("b")), 2)
    assert decision.target == 1 and "above 960" in decision.reason
    assert after_a_period(fleet(idle("a"), idle("b")), 2, Limits(2, 4))[0].target == 2
    assert after_a_period(fleet(idle("a")), 1)[0].target == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_pending": 1}, "another change is under way"),
        ({"num_retiring": 1}, "another change is under way"),
        ({"num_unheard": 1}, "1 have not said lately"),
        ({"newest_age_s": 5.0}, "has served for 5 s only"),
    ],
)
def test_nothing_is_given_up_while_the_picture_is_not_whole_or_not_at_rest(
    changes: dict[str, object], words: str
) -> None:
    decision, _ = after_a_period(fleet(idle("a"), idle("b"), **changes), 2)
    assert decision.target == 2 and words in decision.reason


def test_nothing_is_given_up_when_the_rest_could_not_hold_the_load() -> None:
    """Each is above the band alone, and one instance with both loads would be near its end."""
    half = [view(name, used_blocks=480, num_running=4) for name in ("a", "b")]
    assert mean_steps([item.load for item in half], 0, PARAMS) == PARAMS.cap_steps
    assert steps_after([item.load for item in half], PARAMS) == 40 * 16 / 8
    decision, _ = after_a_period(fleet(*half), 2)
    assert decision.target == 2 and "one less would leave 80" in decision.reason


def _filling(used_blocks: int, a_second: int, horizon_s: float = PARAMS.horizon_s) -> Decision:
    """Two instances with 8 requests each fill at this pace for a minute, looked at every half second."""
    params, trend = replace(PARAMS, horizon_s=horizon_s), LONG_AGO
    for half_second in range(121):
        used = used_blocks + a_second * half_second // 2
        seen = fleet(*(view(name, used_blocks=used, num_running=8) for name in ("a", "b")))
        decision, trend = plan_autoscale(seen, 2, LIMITS, trend, params, half_second / 2)
        assert len(trend.seen) <= MAX_SEEN
        if decision.target != 2:
            break
    return decision


def test_nothing_is_given_up_while_the_load_grows_such_that_it_would_soon_be_wanted_back() -> None:
    """Three blocks a second of eight requests are six decode steps a second: 720 in 120 s."""
    decision = _filling(150, a_second=3)
    assert decision.target == 2 and decision.mean_steps == (1000 - 150 - 180) * 16 / 8
    assert decision.reason.endswith("above 960 for 30 s; at this pace 620 in 120 s")
    assert _filling(150, a_second=3, horizon_s=0.0).target == 1, "control: freeness alone would let it go"


def test_a_steady_or_an_ebbing_load_stands_in_nobodys_way() -> None:
    assert _filling(200, a_second=0).target == 1
    assert _filling(300, a_second=-2).target == 1


def test_a_change_of_the_target_begins_a_new_trend_and_so_does_a_fleet_that_says_nothing() -> None:
    _, trend = after_a_period(fleet(full("a")), 1)
    assert trend.seen == ()
    _, trend = plan_autoscale(fleet(full("a")), 1, LIMITS, LONG_AGO, PARAMS, 0.0)
    assert trend.seen == ((0.0, 80.0),)
    _, trend = plan_autoscale(fleet(num_unheard=1), 1, LIMITS, trend, PARAMS, 5.0)
    assert trend.seen == ()


def test_what_waits_counts_when_one_less_is_considered() -> None:
    loads = [view(name, used_blocks=100, num_running=1).load for name in ("a", "b")]
    waiting = view("b", used_blocks=100, num_running=1, head_of_line_blocks=900).load
    assert steps_after(loads, PARAMS) == min(PARAMS.cap_steps, 800 * 16 / 2)
    assert steps_after([loads[0], waiting], PARAMS) == -100 * 16


def test_a_draining_instance_is_neither_load_nor_room() -> None:
    decision, _ = after_a_period(fleet(full("a"), msgspec.structs.replace(idle("b"), draining=True)), 2)
    assert decision.mean_steps == 80 and decision.target == 3


def test_when_nobody_says_how_full_it_is_nothing_is_decided() -> None:
    decision, trend = plan_autoscale(fleet(num_unheard=2), 2, LIMITS, Trend(below_since_s=-100.0), PARAMS, 0.0)
    assert decision.target == 2 and decision.mean_steps is None and trend.below_since_s is None


@pytest.mark.parametrize(("target", "kept"), [(9, 4), (0, 1)])
def test_a_target_outside_the_limits_is_brought_back_at_once(target: int, kept: int) -> None:
    decision, trend = plan_autoscale(fleet(full("a")), target, LIMITS, LONG_AGO, PARAMS, 7.0)
    assert decision.target == kept and trend.changed_s == 7.0 and "limits" in decision.reason


# ---------------------------------------------------------------------- who goes
def test_the_cheapest_to_empty_goes_and_what_cannot_move_is_dear() -> None:
    large = view("large", request_load("r1", 300))
    many = view("many", *(request_load(f"s{number}", 10) for number in range(10)))
    fixed = view("fixed", request_load("t1", 1, movable=False))
    views = (large, many, fixed)
    assert emptying_cost_blocks(large.requests, PARAMS) == 304
    assert emptying_cost_blocks(many.requests, PARAMS) == 140
    victim = choose_victim(views, PARAMS)
    assert victim is not None and victim.instance == "many"
    assert choose_victim(views[::-1], PARAMS) is victim
    victim = choose_victim((large, fixed), PARAMS)
    assert victim is not None and victim.instance == "large"


def test_of_equals_the_last_by_name_goes_and_what_is_on_its_way_there_counts() -> None:
    first, last = idle("instance-0"), idle("instance-1")
    assert choose_victim((first, last), PARAMS) is last
    coming = msgspec.structs.replace(last, load=load_report("instance-1", free_blocks=950, reserved_blocks=50))
    assert choose_victim((first, coming), PARAMS) is first


def test_the_last_one_that_serves_is_nobodys_victim() -> None:
    draining = msgspec.structs.replace(idle("b"), draining=True)
    assert choose_victim((idle("a"), draining), PARAMS) is None
    assert choose_victim((), PARAMS, is_one_left=True) is None
    victim = choose_victim((idle("a"), draining), PARAMS, is_one_left=True)
    assert victim is not None and victim.instance == "a"


def test_headroom_counts_as_used_in_the_signal_and_in_what_one_less_would_leave() -> None:
    """One request of the level in one of two instances: 500 of its 1,000 blocks are kept free for it."""
    params = replace(PARAMS, load=LoadParams(((-10, 500), (0, 0))), cap_steps=1e9)
    loads = [
        load_report(name, free_blocks=900, num_running=10, running_by_priority=((priority, 10),))
        for name, priority in (("a", -10), ("b", 0))
    ]
    seen = fleet(*(InstanceView(InstanceId(load.instance), load, (), False, 2, 2, 0.0) for load in loads))
    decision, _ = plan_autoscale(seen, 2, LIMITS, LONG_AGO, params, 0.0)
    assert decision.mean_steps == ((1000 - 100 - 500) * 16 / 10 + (1000 - 100) * 16 / 10) / 2
    assert steps_after(loads, params) == (1000 - 100 - 500 - 100) * 16 / 20
