"""Moves for the sake of targets: each is predicted to pay, and nobody pays for it with a target of their own."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.messages import RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.attain import plan_attain
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import freeness_steps
from orchestrator.policy.places import Places
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.standing import Speed, standing_of
from orchestrator.policy.targets import Tightest, is_any_wanted, tightest_of, tpot_wanted_s, ttft_left_s
from tests.support.attain_world import World, carry_out, speeds_of, view_of, views_of, wanting, worlds
from tests.support.reports import BLOCK_SIZE
from tests.support.slow_attain import met, tpot_s, ttft_s
from tests.support.slow_slo import predicted_tpot_s, predicted_ttft_s

PARAMS = RebalanceParams(threshold_steps=32)
NOBODY_RESTS = Resting()
UNTIMED = settings(deadline=None)
Speeds = dict[InstanceId, Speed]


RATIOS = st.sampled_from([0.8, 0.85, 0.89, 0.95, 1.0, 1.001, 1.01, 1.05, 1.2])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[World, Speeds]:
    """Targets about as fast as the instance is, or another: so that little makes a difference."""
    world = draw(worlds())
    speeds = draw(speeds_of(world))
    for name, requests in world.items() if speeds else ():
        like = draw(st.sampled_from(sorted(speeds)))
        step_s, view = tpot_s(view_of(like, world[like]), speeds[like]), view_of(name, requests)
        for index, one in enumerate(requests):
            tpot_wanted_s = None if one.tpot_s is None else step_s * draw(RATIOS)
            ttft_wanted_s = one.ttft_s
            if ttft_wanted_s is not None and name in speeds and one.status == "waiting":
                first_s = ttft_s(view, speeds[name], one)
                ttft_wanted_s = one.arrived_s + view.signal_age_s + first_s * draw(RATIOS)
            requests[index] = wanting(one, tpot_wanted_s, ttft_wanted_s)
    return world, speeds


def found(world: World, name: InstanceId, request_id: str) -> RequestLoad:
    return next(one for one in world[name] if one.request_id == request_id)


@UNTIMED
@given(fleets())
def test_each_move_lets_somebody_meet_a_target_and_nobody_miss_one(fleet: tuple[World, Speeds]) -> None:
    """One after the other, as they are proposed, by formulas written out."""
    world, speeds = fleet
    for move in plan_attain(views_of(world), speeds, NOBODY_RESTS, PARAMS):
        request, pair = found(world, move.source, move.request_id), (move.source, move.destination)
        views = [view_of(name, world[name]) for name in pair]
        before = set[tuple[str, str]]().union(*(met(view, speeds[view.instance]) for view in views))
        carry_out(world, move)
        views = [view_of(name, world[name]) for name in pair]
        after = set[tuple[str, str]]().union(*(met(view, speeds[view.instance]) for view in views))
        about = set[tuple[str, str]]().union(*(met(view, speeds[view.instance], 0.01) for view in views))
        assert before <= about, "somebody misses a target for it"
        assert after - before, "it lets nobody meet a target"
        if request.tpot_s is not None or request.ttft_s is not None:
            assert move.request_id in {name for name, _ in after - before}
        assert move.reason.startswith("attain: ")


@UNTIMED
@given(fleets())
def test_a_request_that_moves_for_its_own_sake_missed_by_the_margin_and_meets_by_it(
    fleet: tuple[World, Speeds],
) -> None:
    world, speeds = fleet
    margin = PARAMS.attain_margin
    for move in plan_attain(views_of(world), speeds, NOBODY_RESTS, PARAMS)[:1]:
        request = found(world, move.source, move.request_id)
        if request.tpot_s is None and request.ttft_s is None:
            continue
        here, there = view_of(move.source, world[move.source]), view_of(move.destination, world[move.destination])
        left_s = (request.ttft_s or 0.0) - request.arrived_s - here.signal_age_s
        awaits = request.ttft_s is not None and request.status == "waiting" and left_s > 0
        misses_tpot = request.tpot_s is not None and tpot_s(here, speeds[move.source]) > request.tpot_s * (1 + margin)
        misses_ttft = awaits and ttft_s(here, speeds[move.source], request) > left_s * (1 + margin)
        assert misses_tpot or misses_ttft
        joined = view_of(move.destination, [*world[move.destination], request])
        if request.tpot_s is not None:
            assert tpot_s(joined, speeds[move.destination]) <= request.tpot_s * (1 - margin) * (1 + 1e-9)
        if awaits:
            load, speed = there.load, speeds[move.destination]
            newcomer_s = predicted_ttft_s(load, speed, 0, 0, request.num_prompt_tokens, expected_output_tokens=256.0)
            assert newcomer_s <= left_s * (1 - margin) * (1 + 1e-9)


@UNTIMED
@given(fleets(), st.data())
def test_nothing_goes_to_who_drains_is_unknown_has_no_slot_or_no_room_and_limits_are_kept(
    fleet: tuple[World, Speeds], data: st.DataObject
) -> None:
    world, speeds = fleet
    views = [
        view_of(
            name,
            requests,
            draining=data.draw(st.integers(0, 4)) == 0,
            slots_out=data.draw(st.integers(0, 2)),
            slots_in=data.draw(st.integers(0, 2)),
        )
        for name, requests in world.items()
    ]
    moves = plan_attain(tuple(views), speeds, NOBODY_RESTS, PARAMS)
    assert len(moves) <= PARAMS.max_moves and len({move.request_id for move in moves}) == len(moves)
    for view in views:
        came = [found(world, move.source, move.request_id) for move in moves if move.destination == view.instance]
        num_left = sum(move.source == view.instance for move in moves)
        assert len(came) <= view.slots_in and num_left <= view.slots_out
        if came or num_left:
            assert not view.draining and view.instance in speeds
        assert all(found(world, view.instance, m.request_id).movable for m in moves if m.source == view.instance)
        if came and not num_left:
            blocks = sum(max(one.num_blocks, -(-one.num_prompt_tokens // BLOCK_SIZE)) for one in came)
            assert blocks + view.load.waiting_blocks <= view.load.free_blocks
            assert freeness_steps(view.load) >= PARAMS.threshold_steps


@UNTIMED
@given(fleets(), st.randoms(use_true_random=False))
def test_the_same_views_give_the_same_plan_in_whatever_order_they_come(
    fleet: tuple[World, Speeds], random: object
) -> None:
    world, speeds = fleet
    views = list(views_of(world))
    expected = plan_attain(tuple(views), speeds, NOBODY_RESTS, PARAMS)
    random.shuffle(views)  # type: ignore[attr-defined]
    assert plan_attain(tuple(views), dict(reversed(speeds.items())), NOBODY_RESTS, PARAMS) == expected


@UNTIMED
@given(worlds(with_targets=False), st.data())
def test_where_nobody_has_targets_nothing_moves(world: World, data: st.DataObject) -> None:
    assert plan_attain(views_of(world), data.draw(speeds_of(world)), NOBODY_RESTS, PARAMS) == ()


@UNTIMED
@given(fleets())
def test_what_rests_stays(fleet: tuple[World, Speeds]) -> None:
    world, speeds = fleet
    free = plan_attain(views_of(world), speeds, NOBODY_RESTS, PARAMS)
    requests = frozenset(RequestId(move.request_id) for move in free)
    for move in plan_attain(views_of(world), speeds, Resting(requests=requests), PARAMS):
        assert move.request_id not in requests
    pairs = frozenset((move.source, move.destination) for move in free)
    for move in plan_attain(views_of(world), speeds, Resting(pairs=pairs), PARAMS):
        assert (move.source, move.destination) not in pairs


@UNTIMED
@given(fleets())
def test_in_a_closed_loop_without_any_rest_moving_comes_to_an_end(fleet: tuple[World, Speeds]) -> None:
    """Each move lets one more target be met: there cannot be more moves than targets."""
    world, speeds = fleet
    num_moves, num_targets = (
        0,
        sum((one.tpot_s is not None) + (one.ttft_s is not None) for all_ in world.values() for one in all_),
    )
    for _tick in range(num_targets + 1):
        moves = plan_attain(views_of(world), speeds, NOBODY_RESTS, PARAMS)
        if not moves:
            break
        num_moves += len(moves)
        for move in moves:
            carry_out(world, move)
    assert num_moves <= num_targets


@UNTIMED
@given(fleets())
def test_the_tightest_targets_are_the_least_of_all(fleet: tuple[World, Speeds]) -> None:
    for requests in fleet[0].values():
        odd = [wanting(one, wants, wants) for one in requests for wants in (0.0, -1.0, math.nan, math.inf)]
        lefts = [left_s for one in requests + odd if (left_s := ttft_left_s(one)) > 0.0]
        expected = Tightest(min(map(tpot_wanted_s, requests + odd), default=math.inf), min(lefts, default=math.inf))
        assert tightest_of(requests + odd) == expected
        assert is_any_wanted([tightest_of(odd), expected]) is (expected != Tightest())


@UNTIMED
@given(fleets(), st.integers(0, 900))
def test_what_is_predicted_of_an_instance_is_what_dispatch_predicts_of_a_newcomer(
    fleet: tuple[World, Speeds], num_prompt_tokens: int
) -> None:
    world, speeds = fleet
    for view in views_of(world):
        if view.instance not in speeds:
            continue
        speed, load = speeds[view.instance], view.load
        standing = standing_of(load, speed)
        slow_s = predicted_ttft_s(load, speed, 0, 0, num_prompt_tokens, expected_output_tokens=256.0)
        assert abs(standing.first_token_s(standing.queue(), num_prompt_tokens) - slow_s) <= 1e-9 * slow_s
        if load.waiting_blocks * BLOCK_SIZE + num_prompt_tokens <= load.free_blocks * BLOCK_SIZE:
            slow_s = predicted_tpot_s(load, speed, 0, 0, num_prompt_tokens)
            for joined in (standing.with_waiting(num_prompt_tokens), standing.with_running(num_prompt_tokens)):
                assert abs(joined.tpot_s() - slow_s) <= 1e-9 * slow_s


@UNTIMED
@given(fleets(), st.booleans())
def test_the_columns_of_a_fleet_say_what_the_formulas_say_of_each(
    fleet: tuple[World, Speeds], has_levels: bool
) -> None:
    world, speeds = fleet
    views = [view for view in views_of(world) if view.instance in speeds]
    params = dataclasses.replace(PARAMS, load=LoadParams(((0, 40), (2, 0))) if has_levels else LoadParams())
    fast, slow = Places(views, speeds, params), Places(views, speeds, params)
    for row, view in enumerate(views):
        standing = standing_of(view.load, speeds[view.instance])
        slow.changed(row, view.load, standing, view.slots_in)
        by = standing.tpot_s() / view.tightest.tpot_s
        left_s = view.tightest.left_s - view.signal_age_s
        if 0.0 < left_s < math.inf:
            by = max(by, standing.first_token_s(standing.queue(), 0) / left_s)
        assert fast.misses_by[row] == pytest.approx(by, rel=1e-9)
    for one, other in ((fast.tpot_s, slow.tpot_s), (fast.first_s, slow.first_s), (fast.steps, slow.steps)):
        assert one == pytest.approx(other, rel=1e-9)
    assert fast.room == pytest.approx(slow.room, rel=1e-9) and fast.fastest() == pytest.approx(slow.fastest())
