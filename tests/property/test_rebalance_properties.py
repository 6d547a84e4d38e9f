"""Does every proposed move pay, is the plan a function of the view, and does moving come to an end?"""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.drain import DrainParams, plan_drain
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving,
    freeness_steps,
    outlives_its_copy,
    outliving_their_copies,
)
from orchestrator.policy.rebalance import RebalanceParams, Resting, plan_rebalance
from tests.support import slow_rebalance
from tests.support.reports import load_report, request_load

TOTAL_BLOCKS = 400
NOBODY_RESTS = Resting()
PARAMS = st.builds(
    RebalanceParams,
    threshold_steps=st.sampled_from([0.0, 128.0, 512.0, 2048.0]),
    margin_steps=st.sampled_from([0.0, 16.0, 64.0, 512.0]),
    max_moves=st.integers(1, 8),
    load=st.sampled_from(
        [
            LoadParams(),
            LoadParams(((0, 150), (1, 0), (2, 0))),
            LoadParams(((0, 120), (1, 40), (2, 0))),
            LoadParams(((0, 2 * TOTAL_BLOCKS), (2, 0))),
            LoadParams(((0, 0), (1, 100), (2, 30))),
        ]
    ),
)
World = dict[InstanceId, list[RequestLoad]]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to five instances, each with requests that fit it."""
    world: World = {}
    number = 0
    for index in range(draw(st.integers(2, 5))):
        sizes = draw(st.lists(st.integers(1, 60), max_size=12))
        requests: list[RequestLoad] = []
        for size in sizes:
            if sum(request.num_blocks for request in requests) + size > TOTAL_BLOCKS:
                break
            number += 1
            requests.append(
                request_load(
                    f"r{number:03}",
                    size,
                    priority=draw(st.integers(0, 2)),
                    movable=draw(st.integers(0, 9)) > 0,
                    num_output_tokens=draw(st.sampled_from([0, 1, 100, 900])),
                    max_tokens=1000,
                )
            )
        world[InstanceId(f"instance-{index}")] = requests
    return world


def view_of(
    instance: InstanceId,
    requests: list[RequestLoad],
    waiting_blocks: int = 0,
    draining: bool = False,
    copy_s_per_block: float = 0.0,
) -> InstanceView:
    free_blocks = TOTAL_BLOCKS - sum(request.num_blocks for request in requests)
    load = load_report(
        instance,
        state="draining" if draining else "serving",
        total_blocks=TOTAL_BLOCKS,
        free_blocks=free_blocks,
        num_running=len(requests),
        num_waiting=1 if waiting_blocks else 0,
        head_of_line_blocks=waiting_blocks,
        running_by_priority=tuple(sorted(Counter(request.priority for request in requests).items())),
    )
    return InstanceView(instance, load, tuple(requests), draining, 4, 4, 0.1, copy_s_per_block)


def views_of(world: World, waiting_blocks: int = 0, copy_s_per_block: float = 0.0) -> tuple[InstanceView, ...]:
    return tuple(
        view_of(instance, requests, waiting_blocks if index == 0 else 0, copy_s_per_block=copy_s_per_block)
        for index, (instance, requests) in enumerate(world.items())
    )


def left(load: LoadReport, params: RebalanceParams) -> float:
    return freeness_steps(load, params.load)


def carry_out(world: World, move: Move) -> None:
    (request,) = [item for item in world[move.source] if item.request_id == move.request_id]
    world[move.source].remove(request)
    world[move.destination].append(request)


@given(worlds(), PARAMS, st.integers(0, 200))
def test_every_move_pays_before_and_after_in_the_order_proposed(
    world: World, params: RebalanceParams, waiting_blocks: int
) -> None:
    views = {view.instance: view for view in views_of(world, waiting_blocks)}
    loads = {instance: view.load for instance, view in views.items()}
    moves = plan_rebalance(tuple(views.values()), NOBODY_RESTS, params)
    assert len(moves) <= params.max_moves
    for move in moves:
        source, destination = loads[move.source], loads[move.destination]
        before = left(destination, params) - left(source, params)
        assert left(source, params) < params.threshold_steps
        assert move.num_blocks <= destination.free_blocks
        loads[move.source] = after_leaving(source, move.priority, move.num_blocks)
        loads[move.destination] = after_joining(destination, move.priority, move.num_blocks)
        after = left(loads[move.destination], params) - left(loads[move.source], params)
        assert before > params.margin_steps and after > params.margin_steps
        assert left(loads[move.destination], params) >= 0
        assert left(loads[move.source], params) > left(source, params)
    assert not {move.source for move in moves} & {move.destination for move in moves}, "nobody both gives and takes"


def test_where_all_are_short_the_one_that_is_worst_off_is_relieved_by_the_others() -> None:
    """Neither has 512 steps left, and the head of a queue waits for what the other could give it."""
    world: World = {
        InstanceId("a"): [request_load(f"a{number}", 38) for number in range(10)],
        InstanceId("b"): [request_load(f"b{number}", 20) for number in range(10)],
    }
    crowded, other = views_of(world, waiting_blocks=0)
    params = RebalanceParams()
    assert left(crowded.load, params) < left(other.load, params) < params.threshold_steps
    (move, *_) = plan_rebalance((crowded, other), NOBODY_RESTS, params)
    assert (move.source, move.destination) == (InstanceId("a"), InstanceId("b"))


COPY_S_PER_BLOCK = st.sampled_from([0.0, 0.005, 0.05, 0.5])


@given(worlds(), COPY_S_PER_BLOCK, st.sampled_from([0.0, 0.01]), st.integers(0, 2000))
def test_those_that_outlive_their_copies_are_found_all_at_once_as_each_by_itself(
    world: World, copy_s_per_block: float, step_time_s: float, num_output_tokens: int
) -> None:
    for view in views_of(world, 0, copy_s_per_block):
        further = [
            msgspec.structs.replace(request, num_output_tokens=num_output_tokens, num_blocks=num_blocks)
            for request in view.requests
            for num_blocks in (0, request.num_blocks, 20 * request.num_blocks)
        ]
        load = msgspec.structs.replace(view.load, step_time_s=step_time_s)
        asked = msgspec.structs.replace(view, load=load, requests=(*view.requests, *further))
        each = [request for request in asked.requests if outlives_its_copy(asked, request)]
        assert list(outliving_their_copies(asked)) == each


@given(worlds(), PARAMS, COPY_S_PER_BLOCK)
def test_what_moves_is_expected_to_live_twice_as_long_as_its_copy_takes(
    world: World, params: RebalanceParams, copy_s_per_block: float
) -> None:
    requests = {request.request_id: request for owned in world.values() for request in owned}
    for move in plan_rebalance(views_of(world, 0, copy_s_per_block), NOBODY_RESTS, params):
        request = requests[move.request_id]
        copy_steps = request.num_blocks * copy_s_per_block / 0.01  # load_report's step time
        expected_steps = min(1000 - request.num_output_tokens, max(64, request.num_output_tokens))
        assert expected_steps >= 2 * copy_steps


@given(worlds(), PARAMS, st.integers(0, 200), COPY_S_PER_BLOCK)
def test_it_plans_what_the_slow_version_does(
    world: World, params: RebalanceParams, waiting_blocks: int, copy_s_per_block: float
) -> None:
    views = views_of(world, waiting_blocks, copy_s_per_block)
    assert plan_rebalance(views, NOBODY_RESTS, params) == slow_rebalance.plan_rebalance(views, NOBODY_RESTS, params)


@given(worlds(), PARAMS, st.randoms(use_true_random=False))
def test_the_same_views_give_the_same_plan_in_whatever_order_they_come(
    world: World, params: RebalanceParams, random: object
) -> None:
    views = list(views_of(world))
    expected = plan_rebalance(tuple(views), NOBODY_RESTS, params)
    random.shuffle(views)  # type: ignore[attr-defined]
    assert plan_rebalance(tuple(views), NOBODY_RESTS, params) == expected


@given(worlds(), PARAMS)
def test_in_a_closed_loop_without_any_rest_moving_comes_to_an_end_and_nothing_returns_at_once(
    world: World, params: RebalanceParams
) -> None:
    num_requests = sum(len(requests) for requests in world.values())
    last_left: dict[RequestId, InstanceId] = {}
    for _tick in range(4 * num_requests + 4):
        moves = plan_rebalance(views_of(world), NOBODY_RESTS, params)
        if not moves:
            return
        for move in moves:
            others_moved = any(request != move.request_id for request in last_left)
            assert last_left.get(move.request_id) != move.destination or others_moved, "ping-pong"
            last_left[move.request_id] = move.source
            carry_out(world, move)
    raise AssertionError("it never comes to rest")


@given(worlds(), PARAMS)
def test_the_poorest_instance_never_gets_poorer(world: World, params: RebalanceParams) -> None:
    poorest = min(left(view.load, params) for view in views_of(world))
    for move in plan_rebalance(views_of(world), NOBODY_RESTS, params):
        carry_out(world, move)
    assert min(left(view.load, params) for view in views_of(world)) >= poorest


def is_short_of_headroom_only(load: LoadReport, params: RebalanceParams) -> bool:
    return left(load, params) < params.threshold_steps <= freeness_steps(load)


def most_urgent_with_headroom(load: LoadReport, params: RebalanceParams) -> int:
    return min(priority for priority, _ in load.running_by_priority if params.load.headroom(priority))


@given(worlds(), PARAMS)
def test_headroom_is_made_by_moving_neighbours_and_never_the_request_it_is_for(
    world: World, params: RebalanceParams
) -> None:
    loads = {view.instance: view.load for view in views_of(world)}
    for move in plan_rebalance(views_of(world), NOBODY_RESTS, params):
        source, destination = loads[move.source], loads[move.destination]
        if is_short_of_headroom_only(source, params):
            assert move.priority > most_urgent_with_headroom(source, params)
            assert move.reason.startswith("isolate: ")
        loads[move.source] = after_leaving(source, move.priority, move.num_blocks)
        loads[move.destination] = after_joining(destination, move.priority, move.num_blocks)


@given(worlds(), PARAMS)
def test_a_request_moves_only_where_no_less_urgent_level_does_any_good(world: World, params: RebalanceParams) -> None:
    views = {view.instance: view for view in views_of(world)}
    moves = plan_rebalance(tuple(views.values()), NOBODY_RESTS, params)
    if not moves or not params.load.headroom_blocks:
        return
    first = moves[0]
    level = params.load.level(first.priority)
    less_urgent = tuple(request for request in world[first.source] if level is not None and request.priority > level)
    narrowed = {**views, first.source: msgspec.structs.replace(views[first.source], requests=less_urgent)}
    others = plan_rebalance(tuple(narrowed.values()), NOBODY_RESTS, params)
    assert not others or others[0].source != first.source


def test_a_large_bulk_request_moves_to_the_second_best_before_a_small_urgent_one_to_the_best() -> None:
    """The freest has no room for the bulk request. Memory itself is short, so that the urgent one might move, too."""
    source = InstanceView(
        InstanceId("source"),
        load_report("source", free_blocks=0, num_running=20, running_by_priority=((0, 1), (2, 19))),
        (request_load("bulk", 100, priority=2), request_load("urgent", 50, priority=0)),
        False,
        slots_out=1,
        slots_in=1,
        signal_age_s=0.1,
    )
    freest, roomy = (
        InstanceView(
            InstanceId(name),
            load_report(name, total_blocks=total, free_blocks=free, num_running=num),
            (),
            False,
            slots_out=1,
            slots_in=1,
            signal_age_s=0.1,
        )
        for name, total, free, num in (("freest", 80, 80, 0), ("roomy", 2_000, 1_500, 30))
    )
    assert freeness_steps(freest.load) > freeness_steps(roomy.load)
    for load, expected in ((LoadParams(), "urgent"), (LoadParams(((0, 100), (2, 0))), "bulk")):
        params = RebalanceParams(load=load)
        moves = plan_rebalance((source, freest, roomy), NOBODY_RESTS, params)
        assert [move.request_id for move in moves] == [expected]
        assert moves == slow_rebalance.plan_rebalance((source, freest, roomy), NOBODY_RESTS, params)


@example(urgent=1, neighbours=[1, 7, 60, 60], headroom=332)
@given(st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, TOTAL_BLOCKS))
def test_an_instance_that_lacks_its_headroom_gives_neighbours_away_until_it_has_it_or_no_move_pays(
    urgent: int, neighbours: list[int], headroom: int
) -> None:
    """Beside it is an empty one: whatever has to go there fits."""
    params = RebalanceParams(threshold_steps=64, margin_steps=16, load=LoadParams(((0, headroom), (2, 0))))
    here, there = InstanceId("a"), InstanceId("b")
    world: World = {
        here: [
            request_load("urgent", urgent, priority=0),
            *(request_load(f"r{number}", size, priority=2) for number, size in enumerate(neighbours)),
        ],
        there: [],
    }
    for _tick in range(len(neighbours) + 1):
        for move in plan_rebalance(views_of(world), NOBODY_RESTS, params):
            assert move.source == here and move.request_id != "urgent"
            carry_out(world, move)
    source, destination = (view.load for view in views_of(world))
    for request in world[here][1:] if left(source, params) < params.threshold_steps else []:
        size = request.num_blocks
        after = left(after_leaving(source, 2, size), params), left(after_joining(destination, 2, size), params)
        worth_undoing = after[1] - after[0] <= params.margin_steps
        assert worth_undoing or after[1] < 0, "what stays would lack something there, or be worth undoing"


@given(worlds(), PARAMS)
def test_what_rests_cannot_move_and_limits_are_kept(world: World, params: RebalanceParams) -> None:
    free = plan_rebalance(views_of(world), NOBODY_RESTS, params)
    resting = Resting(requests=frozenset(move.request_id for move in free))
    assert not {move.request_id for move in plan_rebalance(views_of(world), resting, params)} & resting.requests
    pairs = Resting(pairs=frozenset((move.source, move.destination) for move in free))
    for move in plan_rebalance(views_of(world), pairs, params):
        assert (move.source, move.destination) not in pairs.pairs
    for instance in world:
        assert sum(move.source == instance for move in free) <= 4
        assert sum(move.destination == instance for move in free) <= 4
    assert len({move.request_id for move in free}) == len(free)


@given(worlds())
def test_a_drain_empties_its_instance_of_all_that_moves_and_fits_and_sends_nothing_to_it(world: World) -> None:
    draining = next(iter(world))
    fixed = [request for request in world[draining] if not request.movable]
    for _tick in range(20):
        views = tuple(
            view_of(instance, requests, draining=instance == draining) for instance, requests in world.items()
        )
        moves = plan_drain(views, frozenset(), DrainParams())
        assert all(move.source == draining and move.destination != draining for move in moves)
        assert len(moves) <= 4
        for move in moves:
            carry_out(world, move)
            assert sum(request.num_blocks for request in world[move.destination]) <= TOTAL_BLOCKS
        if not moves:
            break
    largest_gap = max(
        TOTAL_BLOCKS - sum(request.num_blocks for request in requests)
        for instance, requests in world.items()
        if instance != draining
    )
    left = [request for request in world[draining] if request not in fixed]
    assert all(request.num_blocks > largest_gap for request in left)


def test_destinations_without_room_do_not_hide_the_one_that_has_it() -> None:
    """Many are freer by decode steps, since few run there, and have no room for what would have to move."""
    small = [
        InstanceView(
            InstanceId(f"small-{number:02}"),
            load_report(f"small-{number:02}", total_blocks=200, free_blocks=100, num_running=1),
            (request_load(f"s{number}", 100),),
            False,
            slots_out=2,
            slots_in=2,
            signal_age_s=0.1,
        )
        for number in range(2 * RebalanceParams().max_destinations)
    ]
    large = InstanceView(
        InstanceId("large"),
        load_report("large", total_blocks=2_000, free_blocks=1_000, num_running=20),
        (),
        False,
        2,
        2,
        0.1,
    )
    full = InstanceView(
        InstanceId("full"),
        load_report("full", total_blocks=600, free_blocks=0, num_running=30),
        tuple(request_load(f"r{number}", 150) for number in range(4)),
        False,
        2,
        2,
        0.1,
    )
    views = (*small, large, full)
    moves = plan_rebalance(views, NOBODY_RESTS, RebalanceParams())
    assert [move.destination for move in moves][:1] == ["large"]
    assert moves == slow_rebalance.plan_rebalance(views, NOBODY_RESTS, RebalanceParams())
