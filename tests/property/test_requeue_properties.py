"""Does every move of a waiting request pay, is the plan that of the slow version, and does nothing come back?"""

from __future__ import annotations

import random
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from instance.messages import RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.counting import after_moves
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import InstanceView, Move, after_joining, blocks_missing, blocks_wanted, queue_order
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.requeue import plan_requeue
from tests.support import slow_requeue
from tests.support.attain_world import TOTAL_BLOCKS, World, record_of, view_of, waiting
from tests.support.reports import BLOCK_SIZE, request_load

PARAMS = st.builds(
    RebalanceParams,
    margin_steps=st.sampled_from([0.0, 16.0, 64.0, 512.0, 7.3]),
    max_moves=st.integers(1, 8),
    load=st.sampled_from(
        [
            LoadParams(),
            LoadParams(((0, 150), (1, 0), (2, 0))),
            LoadParams(((0, 300), (1, 200))),
            LoadParams(((0, 2 * TOTAL_BLOCKS), (2, 0))),
        ]
    ),
)
NOBODY_RESTS = Resting()


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, dict[InstanceId, dict[str, Any]]]:
    """Up to six instances: full, half full or empty, with queues or without; and what they may do."""
    world: World = {}
    limits: dict[InstanceId, dict[str, Any]] = {}
    number = 0
    for index in range(draw(st.integers(2, 6))):
        requests: list[RequestLoad] = []
        left, is_busy = TOTAL_BLOCKS, draw(st.booleans())
        for _ in range(draw(st.sampled_from([3, 8] if is_busy else [0, 1, 3]))):
            size = draw(st.sampled_from([150, 40, 400, 800] if is_busy else [1, 40, 150]))
            if size <= left:
                number, left = number + 1, left - size
                requests.append(request_load(f"r{number:02}", size, priority=draw(st.integers(0, 3))))
        for _ in range(draw(st.sampled_from([2, 1, 6] if is_busy else [0, 0, 0, 1]))):
            number += 1
            tokens, arrived_s = draw(st.sampled_from([2000, 300, 1, 6000, 15000])), draw(st.sampled_from([0.0, 1.0]))
            request = waiting(f"r{number:02}", tokens, arrived_s, draw(st.integers(0, 3)))
            if draw(st.integers(0, 3)) == 0:
                held = min(left, draw(st.sampled_from([0, 0, 7])))
                request = msgspec.structs.replace(request, status="preempted", num_output_tokens=30, num_blocks=held)
            requests.append(msgspec.structs.replace(request, movable=draw(st.integers(0, 7)) > 0))
        name = InstanceId(f"instance-{index}")
        world[name] = requests
        limits[name] = {
            "draining": draw(st.integers(0, 19)) == 0,
            "slots_out": draw(st.sampled_from([2, 0, 1, 3, 3])),
            "slots_in": draw(st.sampled_from([2, 0, 1, 3, 3])),
            "max_running": draw(st.sampled_from([0, 1, 3, 64])),
        }
    return world, limits


Drawn = tuple[World, dict[InstanceId, dict[str, Any]]]


def views_of(drawn: Drawn, copy_s_per_block: float = 0.0) -> tuple[InstanceView, ...]:
    world, limits = drawn
    return tuple(
        msgspec.structs.replace(view_of(name, requests, **limits[name]), copy_s_per_block=copy_s_per_block)
        for name, requests in world.items()
    )


def moved(world: World, move: Move) -> RequestLoad:
    """It goes, and begins."""
    (request,) = [one for one in world[move.source] if one.request_id == move.request_id]
    world[move.source].remove(request)
    size = blocks_wanted(request, BLOCK_SIZE)
    world[move.destination].append(msgspec.structs.replace(request, status="running", num_blocks=size))
    return request


@given(worlds(), PARAMS, st.data())
def test_it_plans_what_the_slow_version_does_in_whatever_order_the_views_come(
    drawn: Drawn, params: RebalanceParams, data: st.DataObject
) -> None:
    names = list(drawn[0])
    pairs = data.draw(st.frozensets(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=6))
    requests = sorted(RequestId(one.request_id) for there in drawn[0].values() for one in there)
    resting = Resting(
        data.draw(st.frozensets(st.sampled_from(requests), max_size=2)) if requests else frozenset(), pairs
    )
    views = views_of(drawn, data.draw(st.sampled_from([0.0, 0.001, 10.0])))
    expected = slow_requeue.plan_requeue(views, resting, params)
    assert plan_requeue(views, resting, params) == expected
    assert plan_requeue(tuple(data.draw(st.permutations(views))), resting, params) == expected


@given(worlds(), PARAMS)
def test_every_move_pays_and_nobody_is_over_his_bounds(drawn: Drawn, params: RebalanceParams) -> None:
    world, limits = drawn
    views = {view.instance: view for view in views_of(drawn)}
    loads = {name: view.load for name, view in views.items()}
    moves = plan_requeue(tuple(views.values()), NOBODY_RESTS, params)
    assert len(moves) <= params.max_moves and len({move.request_id for move in moves}) == len(moves)
    assert not {move.source for move in moves} & {move.destination for move in moves}
    for name, limit in limits.items():
        assert sum(move.source == name for move in moves) <= limit["slots_out"]
        assert sum(move.destination == name for move in moves) <= limit["slots_in"]
    for move in moves:
        source, there = views[move.source], loads[move.destination]
        assert not source.draining and not views[move.destination].draining
        (request,) = [one for one in world[move.source] if one.request_id == move.request_id]
        queue = [one for one in source.requests if one.status != "running"]
        queue.sort(key=lambda one: (one.priority, -one.arrived_s, one.request_id))
        first_of_it = next(one for one in moves if one.source == move.source)
        if first_of_it is move:
            assert slow_requeue.why_blocked(source.load, queue, params.load)
        before = [
            one
            for one in views[move.destination].requests
            if one.status != "running" and queue_order(one) < queue_order(request)
        ]
        ahead = (len(before), sum(blocks_missing(one, BLOCK_SIZE) for one in before))
        assert request.movable and request.status != "running"
        assert slow_requeue.takes(there, request, params, *ahead), "it begins at once, and so do those before it"
        assert move.reason.startswith("requeue: ") and move.num_blocks == request.num_blocks
        loads[move.destination] = after_joining(there, request.priority, blocks_wanted(request, BLOCK_SIZE))


@given(worlds(), PARAMS)
def test_without_any_rest_it_comes_to_an_end_and_nothing_moves_twice(drawn: Drawn, params: RebalanceParams) -> None:
    world, limits = drawn
    has_moved: set[str] = set()
    num_waiting = sum(one.status != "running" for there in world.values() for one in there)
    for _tick in range(num_waiting + 1):
        moves = plan_requeue(views_of(drawn), NOBODY_RESTS, params)
        for move in moves:
            assert move.request_id not in has_moved
            has_moved.add(move.request_id)
            moved(world, move)
        for move in moves:
            there = view_of(move.destination, world[move.destination], **limits[move.destination])
            assert there.load.free_blocks > there.load.num_running, "each that runs may grow"
        if not moves:
            return
    raise AssertionError("more was moved than waited")


@given(worlds(), PARAMS, st.integers(0, 99))
def test_the_views_of_its_moves_in_flight_are_those_of_the_reports_after_them(
    drawn: Drawn, params: RebalanceParams, seed: int
) -> None:
    """In whatever order they have begun, as far as a report tells of a queue."""
    world, limits = drawn
    before = {view.instance: view for view in views_of(drawn)}
    moves = list(plan_requeue(tuple(before.values()), NOBODY_RESTS, params))
    if any(one.num_output_tokens for there in world.values() for one in there if one.status != "running"):
        return  # what a report counts for one that was preempted depends on its newest token
    on_the_way: dict[str, RequestLoad] = {move.request_id: moved(world, move) for move in moves}
    random.Random(seed).shuffle(moves)
    for name, view in before.items():
        after = view_of(name, world[name], **limits[name]).load
        others = [one for one in view.requests if one.request_id not in on_the_way]
        leaving, joining = ([record_of(move) for move in moves if getattr(move, end) == name] for end in ENDS)
        assert after_moves(view.load, others, leaving, joining, on_the_way) == after


ENDS = ("source", "destination")
