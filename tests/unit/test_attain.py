"""Which request moves for whose target, and which stays? Small fleets, one reason each."""

from __future__ import annotations

import msgspec

from instance.messages import RequestLoad
from migration.types import InstanceId
from orchestrator.policy.attain import plan_attain
from orchestrator.policy.moves import InstanceView, Move
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.standing import Speed
from orchestrator.policy.targets import NOTHING_WANTED, tightest_of
from tests.support.attain_world import view_of, waiting, wanting
from tests.support.reports import request_load

PER_REQUEST: Speed = (0.010, 0.0, 0.0, 0.001, 0.0, 0.0)
"""10 ms a step, and 1 ms for each request in it."""
PER_TOKEN: Speed = (0.010, 0.001, 0.0, 0.0, 0.0, 0.0)
"""10 ms a step, and 1 ms for each token it computes."""
PER_CONTEXT: Speed = (0.010, 0.0, 0.0, 0.0, 1e-5, 0.0)
"""10 ms a step, and 10 microseconds for each token of KV it reads: 0.16 ms a block."""
PARAMS = RebalanceParams(threshold_steps=32)


def plan(
    *views: InstanceView, speed: Speed = PER_REQUEST, resting: Resting | None = None, **speeds: Speed
) -> list[Move]:
    of = {view.instance: speeds.get(view.instance, speed) for view in views}
    return list(plan_attain(views, of, resting or Resting(), PARAMS))


def bulk(number: int, blocks: int = 2, name: str = "bulk") -> list[RequestLoad]:
    return [request_load(f"{name}{at}", blocks) for at in range(number)]


def told(moves: list[Move]) -> list[tuple[str, str, str]]:
    return [(move.request_id, move.source, move.destination) for move in moves]


def test_one_whose_time_has_just_run_out_does_not_hide_another_that_can_still_be_saved() -> None:
    """Reports are 0.1 s old: the first had 0.05 s left."""
    late = wanting(waiting("late", 100, arrived_s=0.95), ttft_s=1.0)
    saved = wanting(waiting("saved", 200), ttft_s=1.0)
    here = view_of("a", [*bulk(2), waiting("before", 2_000, arrived_s=2.0), late, saved])
    assert ("saved", "a", "b") in told(plan(here, view_of("b", []), speed=PER_TOKEN))


# ---------------------------------------------------------------------- TPOT
def test_a_request_that_decodes_too_slowly_goes_to_where_it_is_fast_enough() -> None:
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.018), *bulk(19)])
    (move,) = plan(here, view_of("b", bulk(4)))
    assert told([move]) == [("r", "a", "b")]
    assert move.reason == "attain: a token every 30.0 ms here, 15.0 ms there, 18.0 ms wanted"
    assert (move.num_blocks, move.signal_age_s) == (5, 0.1)


def test_a_near_miss_here_or_a_bare_success_there_is_no_reason_to_move() -> None:
    """By a tenth of the target, on both sides."""
    for num_here, num_there, moves in ((20, 7, 1), (12, 7, 0), (20, 8, 0)):
        here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.020), *bulk(num_here - 1)])
        assert len(plan(here, view_of("b", bulk(num_there)))) == moves, (num_here, num_there)


def test_it_does_not_go_where_another_would_miss_its_target_for_it() -> None:
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.030), *bulk(29)])
    there = view_of("b", [wanting(request_load("s", 5), tpot_s=0.0155), *bulk(4)])
    assert told(plan(here, there)) == []
    there = view_of("b", [wanting(request_load("s", 5), tpot_s=0.0165), *bulk(4)])
    assert told(plan(here, there)) == [("r", "a", "b")]
    there = view_of("b", [wanting(request_load("s", 5), tpot_s=0.0145), *bulk(4)])
    assert told(plan(here, there)) == [("r", "a", "b")], "it misses anyhow"


def test_one_on_its_way_there_counts_as_there() -> None:
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.030), *bulk(29)])
    arriving = msgspec.structs.replace(view_of("b", bulk(5)), arriving=(wanting(request_load("s", 5), tpot_s=0.0155),))
    assert told(plan(here, arriving)) == []


def test_of_several_that_miss_the_most_urgent_then_the_shortest_goes_first_and_two_at_most() -> None:
    wants = [wanting(request_load(f"r{at}", 5 - at, priority=at % 2), tpot_s=0.020) for at in range(4)]
    moves = plan(view_of("a", [*wants, *bulk(26)]), view_of("b", []))
    assert [move.request_id for move in moves] == ["r2", "r0"]


def test_it_goes_to_the_freest_of_those_that_are_fast_enough() -> None:
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.020), *bulk(29)])
    slow, fuller, freer = view_of("slow", []), view_of("fuller", bulk(4, 50)), view_of("freer", bulk(4, 10))
    assert told(plan(here, slow, fuller, freer, slow=(0.05, 0.0, 0.0, 0.001, 0.0, 0.0))) == [("r", "a", "freer")]


def test_an_instance_of_which_nothing_is_known_attracts_nobody() -> None:
    views = (view_of("a", [wanting(request_load("r", 5), tpot_s=0.018), *bulk(19)]), view_of("b", []))
    assert plan_attain(views, {InstanceId("a"): PER_REQUEST}, Resting(), PARAMS) == ()


def test_what_cannot_move_or_rests_stays_and_so_does_what_ends_before_its_copy_has_paid() -> None:
    wants = wanting(request_load("r", 5, max_tokens=100), tpot_s=0.018)
    there = view_of("b", [])
    assert told(plan(view_of("a", [msgspec.structs.replace(wants, movable=False), *bulk(19)]), there)) == []
    here = view_of("a", [wants, *bulk(19)])
    assert told(plan(here, there, resting=Resting(frozenset({wants.request_id})))) == []  # type: ignore[arg-type]
    assert told(plan(here, there, resting=Resting(pairs=frozenset({(here.instance, there.instance)})))) == []
    # 5 blocks of 0.1 s each are 50 decode steps of 10 ms: it would have to live for 100 more, and lives for 64.
    assert told(plan(msgspec.structs.replace(here, copy_s_per_block=0.1), there)) == []
    assert told(plan(msgspec.structs.replace(here, copy_s_per_block=0.05), there)) == [("r", "a", "b")]


def test_it_does_not_go_where_memory_would_be_short_then() -> None:
    here = view_of("a", [wanting(request_load("r", 100), tpot_s=0.018), *bulk(19)])
    assert told(plan(here, view_of("b", bulk(1, 897)))) == [], "24 decode steps left for two"
    assert told(plan(here, view_of("b", bulk(1, 890)))) == [("r", "a", "b")]


def test_of_a_prompt_that_is_half_computed_all_is_needed_there_though_a_part_is_held_here() -> None:
    half = msgspec.structs.replace(request_load("half", 8, num_output_tokens=0), num_prompt_tokens=8_000, tpot_s=0.018)
    here = view_of("a", [half, *bulk(19)])
    assert told(plan(here, view_of("b", bulk(2, 250)))) == [], "500 blocks need 501"
    assert told(plan(here, view_of("b", bulk(2, 100)))) == [("half", "a", "b")]


def test_an_instance_that_has_promised_more_than_it_has_takes_nothing_and_is_no_error() -> None:
    """What is on its way there may need more than is free by now: less than nothing is free, and nobody waits."""
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.018), *bulk(19)])
    there = view_of("b", bulk(4))
    full = msgspec.structs.replace(there.load, free_blocks=-7)
    for arriving in ((), (wanting(request_load("s", 5), tpot_s=0.0155),)):
        assert told(plan(here, msgspec.structs.replace(there, load=full, arriving=arriving))) == []


def test_a_load_in_blocks_of_no_tokens_is_no_error() -> None:
    here = view_of("a", [wanting(request_load("r", 5), tpot_s=0.018), *bulk(19), waiting("w", 500)])
    for view in (here, view_of("b", [])):
        odd = msgspec.structs.replace(view, load=msgspec.structs.replace(view.load, block_size=0))
        others = [other for other in (here, view_of("b", [])) if other.instance != view.instance]
        plan(odd, *others)  # whatever it says, it comes back


# ---------------------------------------------------------------------- neighbours
def test_where_the_request_itself_cannot_go_a_neighbour_without_targets_does_if_that_is_enough() -> None:
    stays = msgspec.structs.replace(wanting(request_load("r", 20), tpot_s=0.028), movable=False)
    # 20 + 3 * 20 + 60 + 30 blocks: 37.2 ms a step. Without the 60 it is 27.6 ms, without the 30 32.4 ms.
    neighbours = [*bulk(3, 20), request_load("long", 60), request_load("short", 30)]
    (move,) = plan(view_of("a", [stays, *neighbours]), view_of("b", []), speed=PER_CONTEXT)
    assert told([move]) == [("long", "a", "b")]
    assert move.reason == "attain: r gets a token every 37.2 ms beside it, 27.6 ms without it, 28.0 ms wanted"
    more_urgent = [msgspec.structs.replace(one, priority=-1) for one in neighbours]
    assert plan(view_of("a", [stays, *more_urgent]), view_of("b", []), speed=PER_CONTEXT) == []
    wanting_too = [wanting(one, tpot_s=1.0) for one in neighbours]
    assert plan(view_of("a", [stays, *wanting_too]), view_of("b", []), speed=PER_CONTEXT) == []


# ---------------------------------------------------------------------- TTFT
def test_one_that_waits_goes_to_where_its_first_token_comes_in_time() -> None:
    """500 prompt tokens of another before its own 100: two steps of 300, 0.62 s; there it is one of 100, 0.11 s."""
    queue = [waiting("first", 500, arrived_s=0.3), wanting(waiting("r", 100, arrived_s=0.1), ttft_s=0.6)]
    (move,) = plan(view_of("a", queue), view_of("b", []), speed=PER_TOKEN)
    assert told([move]) == [("r", "a", "b")]
    assert move.reason == "attain: the first token in 620.0 ms here, 110.0 ms there, 400.0 ms are left"
    assert plan(view_of("a", queue), view_of("b", [waiting("other", 400)]), speed=PER_TOKEN) == []


def test_one_whose_deadline_has_passed_or_that_is_first_in_the_queue_stays() -> None:
    first = waiting("first", 500, arrived_s=0.3)
    late = wanting(waiting("r", 100, arrived_s=0.1), ttft_s=0.15)
    assert plan(view_of("a", [first, late]), view_of("b", []), speed=PER_TOKEN) == []
    urgent = wanting(waiting("r", 100, arrived_s=0.1, priority=-1), ttft_s=0.6)
    assert plan(view_of("a", [first, urgent]), view_of("b", []), speed=PER_TOKEN) == []


def test_what_it_waited_before_it_came_counts() -> None:
    first, second = waiting("first", 500, arrived_s=0.3), wanting(waiting("r", 100, arrived_s=0.1), ttft_s=1.6)
    assert plan(view_of("a", [first, second]), view_of("b", []), speed=PER_TOKEN) == []
    second = msgspec.structs.replace(second, waited_s=1.0)
    first = msgspec.structs.replace(first, waited_s=1.0)
    assert told(plan(view_of("a", [first, second]), view_of("b", []), speed=PER_TOKEN)) == [("r", "a", "b")]


def test_it_does_not_go_where_another_that_waits_would_be_late_for_it() -> None:
    queue = [waiting("first", 500, arrived_s=0.3), wanting(waiting("r", 100, arrived_s=0.1), ttft_s=0.7)]
    for left_s, moves in ((0.25, []), (0.35, [("r", "a", "b")])):
        there = wanting(waiting("s", 200, arrived_s=0.0), ttft_s=left_s + 0.1)  # it takes 0.21 s, or 0.31 s with r
        assert told(plan(view_of("a", queue), view_of("b", [there]), speed=PER_TOKEN)) == moves


def test_nobody_who_waits_for_a_place_loses_his_time_when_another_leaves() -> None:
    """Where fewer run, fewer end: those that are left behind are asked, too."""
    fast: Speed = (0.005, 0.0, 0.0, 0.001, 0.0, 0.0)
    runs = [wanting(request_load("r", 5), tpot_s=0.0105), request_load("s", 5)]
    before = [waiting(f"w{at}", 10, arrived_s=0.5) for at in range(5)]
    # Six ends of two that run, each after 256 steps of 12 ms: 9.2 s. Five of one that runs, of 11 ms: 14.1 s.
    for ttft_s, moves in ((12.0, []), (None, [("r", "a", "b")])):
        here = view_of("a", [*runs, *before, wanting(waiting("q", 10), ttft_s=ttft_s)], max_running=2)
        assert told(plan(here, view_of("b", []), b=fast)) == moves


# ---------------------------------------------------------------------- what a report tells
def test_the_tightest_targets_of_a_report() -> None:
    assert tightest_of(bulk(3)) == NOTHING_WANTED
    requests = [
        wanting(request_load("a"), tpot_s=0.05, ttft_s=0.1),  # it runs: its first token is no matter any more
        wanting(request_load("b"), tpot_s=0.03),
        wanting(waiting("c", 10, arrived_s=0.5), ttft_s=2.0),
        wanting(waiting("late", 10, arrived_s=0.5), ttft_s=0.4),
        wanting(request_load("nonsense"), tpot_s=0.0),
        wanting(request_load("none"), tpot_s=float("nan")),
    ]
    found = tightest_of(requests)
    assert (found.tpot_s, found.left_s) == (0.03, 1.5)
