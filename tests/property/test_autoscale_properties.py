"""Does the number of instances come to rest under any load, within its limits, whoever is chosen to go?"""

from __future__ import annotations

import itertools
import math

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instance.messages import RequestLoad
from migration.types import InstanceId
from orchestrator.policy.autoscale import (
    AutoscaleParams,
    FleetView,
    Limits,
    Trend,
    choose_victim,
    emptying_cost_blocks,
    mean_steps,
    plan_autoscale,
)
from orchestrator.policy.moves import InstanceView, freeness_steps
from tests.support.reports import load_report, request_load

TOTAL_BLOCKS = 400
PARAMS = AutoscaleParams()
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = st.tuples(st.integers(1, 12), st.integers(0, 11)).map(lambda pair: Limits(pair[0], pair[0] + pair[1]))


@st.composite
def views(draw: st.DrawFn, name: str) -> InstanceView:
    requests: list[RequestLoad] = []
    for number in range(draw(st.integers(0, 10))):
        size = draw(st.integers(1, 80))
        if sum(request.num_blocks for request in requests) + size > TOTAL_BLOCKS:
            break
        requests.append(request_load(f"{name}-{number}", size, movable=draw(st.integers(0, 3)) > 0))
    used = sum(request.num_blocks for request in requests)
    head_of_line = draw(st.sampled_from([0, 0, 10, 300]))
    load = load_report(
        name,
        total_blocks=TOTAL_BLOCKS,
        free_blocks=TOTAL_BLOCKS - used,
        num_running=len(requests),
        num_waiting=1 if head_of_line else 0,
        head_of_line_blocks=head_of_line,
    )
    draining, age_s = draw(st.integers(0, 4)) == 0, draw(st.floats(0, 2))
    return InstanceView(InstanceId(name), load, tuple(requests), draining, 2, 2, age_s)


@st.composite
def fleets(draw: st.DrawFn) -> FleetView:
    return FleetView(
        instances=tuple(draw(views(f"instance-{number}")) for number in range(draw(st.integers(0, 6)))),
        num_unheard=draw(st.sampled_from([0, 0, 1])),
        num_pending=draw(st.integers(0, 3)),
        num_retiring=draw(st.sampled_from([0, 0, 1])),
        newest_age_s=draw(st.sampled_from([0.0, 1e9])),
    )


@UNTIMED
@given(fleets(), st.integers(-2, 30), LIMITS)
def test_for_a_constant_view_the_target_settles_within_the_limits_in_one_direction(
    fleet: FleetView, target: int, limits: Limits
) -> None:
    trend, now_s = Trend(), 0.0
    targets: list[int] = []
    for _look in range(2000):
        decision, trend = plan_autoscale(fleet, target, limits, trend, PARAMS, now_s)
        assert limits.fewest <= decision.target <= limits.most
        assert decision.reason and decision.signal_age_s >= 0
        if decision.target != target:
            targets.append(decision.target)
        target, now_s = decision.target, now_s + 1.0
    steps = {later - earlier for earlier, later in itertools.pairwise(targets)}
    assert steps in ({1}, {-1}, set()), "it goes one way, one at a time"
    assert len(targets) <= 1 + limits.most - limits.fewest, "and comes to rest"


@UNTIMED
@given(fleets(), st.integers(1, 8), LIMITS, st.floats(0, 1e6))
def test_it_decides_the_same_in_whatever_order_instances_are_seen(
    fleet: FleetView, target: int, limits: Limits, now_s: float
) -> None:
    turned = FleetView(
        fleet.instances[::-1], fleet.num_unheard, fleet.num_pending, fleet.num_retiring, fleet.newest_age_s
    )
    trend = Trend(below_since_s=now_s - 100, above_since_s=now_s - 100)
    decision, _ = plan_autoscale(fleet, target, limits, trend, PARAMS, now_s)
    again, _ = plan_autoscale(turned, target, limits, trend, PARAMS, now_s)
    assert again.target == decision.target
    victim, again_victim = choose_victim(fleet.instances, PARAMS), choose_victim(turned.instances, PARAMS)
    assert victim == again_victim


@UNTIMED
@given(fleets())
def test_a_victim_serves_leaves_another_one_serving_and_nobody_is_cheaper(fleet: FleetView) -> None:
    victim = choose_victim(fleet.instances, PARAMS)
    serving = [view for view in fleet.instances if not view.draining]
    if victim is None:
        assert len(serving) <= 1
        return
    assert victim in serving and len(serving) > 1
    cost = emptying_cost_blocks(victim.requests, PARAMS)
    assert all(cost <= emptying_cost_blocks(other.requests, PARAMS) for other in serving)


@UNTIMED
@given(fleets(), st.integers(0, 5))
def test_the_mean_is_that_of_the_slow_obvious_way(fleet: FleetView, num_pending: int) -> None:
    bounded: list[float] = [PARAMS.cap_steps] * num_pending
    for view in fleet.instances:
        steps = freeness_steps(view.load)
        bounded.append(sorted([PARAMS.floor_steps, steps, PARAMS.cap_steps])[1])
    mean = mean_steps([view.load for view in fleet.instances], num_pending, PARAMS)
    if not fleet.instances:
        assert mean is None
    else:
        assert mean is not None and math.isclose(mean, sum(bounded) / len(bounded))
        assert PARAMS.floor_steps <= mean <= PARAMS.cap_steps


def _spread(sizes: list[int], num_instances: int) -> tuple[InstanceView, ...]:
    """The load as dispatch and rebalancing would lay it out: each request to the freest; what has no room waits."""
    placed: list[list[int]] = [[] for _ in range(num_instances)]
    waiting: list[list[int]] = [[] for _ in range(num_instances)]
    for size in sorted(sizes, reverse=True):
        freest = min(range(num_instances), key=lambda number: (sum(placed[number]), len(waiting[number]), number))
        (placed if sum(placed[freest]) + size <= TOTAL_BLOCKS else waiting)[freest].append(size)
    return tuple(
        InstanceView(
            InstanceId(f"instance-{number}"),
            load_report(
                f"instance-{number}",
                total_blocks=TOTAL_BLOCKS,
                free_blocks=TOTAL_BLOCKS - sum(placed[number]),
                num_running=len(placed[number]),
                num_waiting=len(waiting[number]),
                head_of_line_blocks=waiting[number][0] if waiting[number] else 0,
            ),
            tuple(request_load(f"r{number}-{place}", size) for place, size in enumerate(placed[number])),
            False,
            2,
            2,
            0.1,
        )
        for number in range(num_instances)
    )


LOADS = st.one_of(
    st.lists(st.integers(1, 60), max_size=120),
    st.tuples(st.integers(1, 90), st.integers(0, 40)).map(lambda pair: [pair[0]] * pair[1]),
)


@UNTIMED
@given(LOADS, st.integers(1, 12), LIMITS)
@example([60] * 6, 1, Limits(1, 4))
def test_in_a_closed_loop_with_a_steady_load_the_target_never_turns_back(
    sizes: list[int], num_instances: int, limits: Limits
) -> None:
    """What flapping is: one more, then one less, of the same load."""
    target, trend, now_s = limits.clamp(num_instances), Trend(), 0.0
    changes: list[int] = []
    for _look in range(200):
        fleet = FleetView(_spread(sizes, target), 0, 0, 0, newest_age_s=1e9)
        decision, trend = plan_autoscale(fleet, target, limits, trend, PARAMS, now_s)
        if decision.target != target:
            changes.append(decision.target - target)
        target, now_s = decision.target, now_s + PARAMS.period_s
    assert len(set(changes)) <= 1, f"it turned back: {changes}"
    assert len(changes) <= limits.most - limits.fewest
