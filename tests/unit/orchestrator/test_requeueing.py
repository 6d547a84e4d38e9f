"""Does the core send on what waits in a blocked queue, before it moves anything that runs, and say why?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, Outcome
from orchestrator.counting import after_moves
from orchestrator.effects import Effect
from orchestrator.events import Event, MigrationEnded, MigrationFigures, MigrationNumber, ReportReceived, Ticked
from orchestrator.events import RequestsReceived as Listed
from orchestrator.policy.attain import _Side
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import InstanceView, after_joining
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.requeue import plan_requeue
from orchestrator.policy.standing import standing_of
from orchestrator.state import CoreParams
from tests.support.attain_world import record_of, view_of, waiting
from tests.support.reports import load_report, request_load, request_report
from tests.support.written_journal import read, write_story
from tests.unit.orchestrator.test_core import A, B, C, Play, started, starts

RUNNING = tuple(request_load(f"r{number}", 120) for number in range(5))
HEAD, SECOND = waiting("head", 450 * 16 - 1, 2.0), waiting("second", 100 * 16 - 1, 1.0)


def load_of(instance: InstanceId, step: int, requests: tuple[RequestLoad, ...], **changes: Any) -> LoadReport:
    """What an instance of 1,000 blocks says that runs those of them that run; the others wait in the order told."""
    running = [one for one in requests if one.status == "running"]
    demands = [(one.num_prompt_tokens + 1) // 16 for one in requests if one.status in ("waiting", "preempted")]
    load = load_report(
        instance,
        step=step,
        free_blocks=1000 - sum(one.num_blocks for one in requests),
        num_running=len(running),
        num_waiting=len(demands),
        head_of_line_blocks=demands[0] if demands else 0,
    )
    return msgspec.structs.replace(load, waiting_blocks=sum(demands), **changes)


class Queues(Play):
    def reports(self, instance: InstanceId, *requests: RequestLoad, **changes: Any) -> list[Effect]:
        self.now_s += 0.1
        self.step += 1
        effects = self.on(ReportReceived(load_of(instance, self.step, requests, **changes)))
        return effects + self.on(Listed(request_report(instance, *requests, step=self.step)))

    def ticks(self) -> list[tuple[str, str, str]]:
        return [(move.request_id, move.destination.instance, move.reason) for move in starts(self.on(Ticked()))]


def test_a_blocked_head_moves_in_the_tick_and_nothing_that_runs_moves_for_it() -> None:
    play = Queues()
    play.reports(A, *RUNNING, HEAD)
    reason = "requeue: the first in the queue wants 450 blocks, 400 are free here; it wants 450"
    reason += ", 8800 decode steps left there with it"
    assert play.ticks() == [("head", B, reason)]
    assert play.ticks() == [], "on its way it counts as gone, and as there"


def test_where_the_head_cannot_be_moved_rebalance_makes_room_as_ever() -> None:
    """The control: so it is the move of the head that counts for rebalance in the test above."""
    play = Queues()
    play.reports(A, *RUNNING, msgspec.structs.replace(HEAD, movable=False))
    assert [reason.split(":")[0] for _, _, reason in play.ticks()] == ["defragment"] * 2


def test_on_its_way_it_counts_with_the_blocks_it_will_want_where_it_goes() -> None:
    """B has room for one of them, and would lack memory with both."""
    play = Queues()
    others = tuple(request_load(f"b{number}", 100) for number in range(3))
    play.reports(B, *others)
    play.reports(A, *RUNNING, HEAD)
    assert [move[:2] for move in play.ticks()] == [("head", B)]
    late = waiting("late", 300 * 16 - 1, 9.0)
    stopped = msgspec.structs.replace(HEAD, status="migrating_out")
    play.reports(A, *RUNNING, request_load("r5", 400), stopped, late)
    assert [reason.split(":")[0] for _, _, reason in play.ticks()] == ["defragment"], "room is made for it here"
    play.ends(1)
    play.ends(2, Outcome.FINISHED_AT_SOURCE)
    play.now_s += 6.0
    play.reports(A, *RUNNING, request_load("r5", 400), late)
    play.reports(B, *others)
    assert play.ticks()[0][:2] == ("late", B), "the control: without the first there is room"


def test_those_behind_the_head_go_where_it_cannot() -> None:
    views = view_of(A, [*RUNNING, HEAD, SECOND]), view_of(B, [request_load("b", 700)])
    (move,) = plan_requeue(views, Resting(), RebalanceParams())
    assert (move.request_id, move.num_blocks) == ("second", 0)


def test_no_free_run_slot_blocks_a_queue_as_well() -> None:
    play = Queues()
    play.reports(A, *RUNNING, SECOND, max_running=5)
    ((request, there, reason),) = play.ticks()
    assert (request, there) == ("second", B)
    assert reason.startswith("requeue: all 5 that may run at once do here, 400 blocks are free; it wants 100, ")
    play = Queues()
    play.reports(A, *RUNNING, SECOND, max_running=6)
    assert play.ticks() == [], "it will begin with the next step"


def test_what_is_kept_from_the_head_beside_more_urgent_ones_blocks_a_queue_as_well() -> None:
    levels = LoadParams(((-10, 400), (0, 50)))
    urgent = request_load("urgent", 400, priority=-10)
    low = waiting("low", 300 * 16 - 1, priority=0)
    here = view_of(A, [urgent, low])
    (move,) = plan_requeue((here, view_of(B, [])), Resting(), RebalanceParams(load=levels))
    assert "wants 300 blocks, 600 are free here, 400 are kept for more urgent ones" in move.reason
    assert move.reason.endswith(f"it wants 300, {(1000 - 300 - 50) * 16} decode steps left there with it")
    assert plan_requeue((here, view_of(B, [])), Resting(), RebalanceParams()) == ()
    as_urgent = view_of(A, [urgent, msgspec.structs.replace(low, priority=-11)])
    assert plan_requeue((as_urgent, view_of(B, [])), Resting(), RebalanceParams(load=levels)) == ()


@pytest.mark.parametrize("status", ["waiting", "preempted"])
def test_who_is_more_urgent_goes_first_then_who_has_lived_longer(status: str) -> None:
    """Of a preempted one nothing is copied either; what it had counts to its life."""
    old = msgspec.structs.replace(SECOND, request_id="old", status=status, arrived_s=0.5, waited_s=9.0)
    urgent = msgspec.structs.replace(SECOND, request_id="urgent", priority=-1, arrived_s=0.0)
    fixed = msgspec.structs.replace(urgent, request_id="fixed", priority=-2, movable=False)
    full = [request_load("full", 950)]
    views = view_of(A, [*full, SECOND, old, urgent, fixed], slots_out=9), view_of(B, [], slots_in=9)
    assert [one.request_id for one in plan_requeue(views, Resting(), RebalanceParams())] == ["urgent", "old", "second"]


def test_it_goes_where_most_is_left_with_it_and_not_where_it_would_wait_or_that_drains() -> None:
    crowd = [request_load(f"c{number}", 10) for number in range(20)]
    views = (
        view_of(A, [request_load("full", 950), SECOND]),
        view_of("crowded", crowd),
        view_of("has-a-queue", [waiting("w", 900 * 16 - 1, arrived_s=99.0)]),
        view_of("draining", [], draining=True),
        view_of("no-slot", [], slots_in=0),
        view_of("runs-all", [request_load("one", 1)], max_running=1),
        view_of("small", [request_load("s", 899)]),
    )
    (move,) = plan_requeue(views, Resting(), RebalanceParams())
    assert move.destination == "crowded"
    pair = Resting(pairs=frozenset({(A, InstanceId("crowded"))}))
    assert plan_requeue(views, pair, RebalanceParams()) == ()


@pytest.mark.parametrize(
    ("lived_s", "before_blocks", "expected"),
    [(0.5, 900, 1), (99.0, 900, 0), (99.0, 898, 0), (99.0, 897, 1), (0.5, 2000, 1)],
)
def test_those_that_wait_there_and_came_earlier_must_have_room_beside_it_later_ones_need_not(
    lived_s: float, before_blocks: int, expected: int
) -> None:
    """1,000 blocks there, one request runs and holds one, and this one wants 100: two more are left to grow into."""
    other = msgspec.structs.replace(waiting("other", before_blocks * 16 - 1), arrived_s=lived_s)
    views = view_of(A, [request_load("full", 950), SECOND]), view_of(B, [request_load("one", 1), other])
    moves = [move for move in plan_requeue(views, Resting(), RebalanceParams()) if move.source == A]
    assert len(moves) == expected
    more_urgent = msgspec.structs.replace(other, priority=-1)
    views = views[0], view_of(B, [request_load("one", 1), more_urgent])
    is_behind = before_blocks + 100 + 1 + 2 > 1000
    assert len([move for move in plan_requeue(views, Resting(), RebalanceParams()) if move.source == A]) == (
        not is_behind
    )


def test_whoever_waits_there_and_is_not_known_counts_as_having_come_earlier() -> None:
    here = view_of(A, [request_load("full", 950), SECOND])
    for num_waiting, blocks, max_running, expected in ((3, 899, 0, 1), (3, 900, 0, 0), (3, 10, 4, 1), (3, 10, 3, 0)):
        there = view_of(B, [], max_running=max_running)
        load = msgspec.structs.replace(there.load, num_waiting=num_waiting, waiting_blocks=blocks)
        views = here, msgspec.structs.replace(there, load=load)
        assert len(plan_requeue(views, Resting(), RebalanceParams())) == expected, (num_waiting, blocks, max_running)


def test_in_one_plan_who_has_received_does_not_send_and_who_has_sent_does_not_receive() -> None:
    """A's second may not go to C, where there is most room, but only to B; from B one could go to C."""
    first, second = (waiting(name, 100 * 16 - 1, arrived_s) for name, arrived_s in (("a", 8.0), ("b", 4.0)))
    large = {age: waiting(f"large-{age:g}", 900 * 16 - 1, age) for age in (10.0, 5.0)}
    not_to_c, empty = Resting(pairs=frozenset({(A, C)})), view_of(C, [])
    here = view_of(A, [request_load("full", 950), large[10.0], first])
    receives = view_of(B, [request_load("half", 500), large[5.0], second])
    moves = plan_requeue((here, receives, empty), not_to_c, RebalanceParams())
    assert [(move.request_id, move.destination) for move in moves] == [("a", B)]
    sends = view_of(B, [request_load("most", 800), waiting("head", 300 * 16 - 1, 12.0)])
    moves = plan_requeue((here, sends, empty), not_to_c, RebalanceParams())
    assert [(move.request_id, move.destination) for move in moves] == [("head", C)]
    control = here, view_of(B, [request_load("most", 800)]), empty
    assert [move.destination for move in plan_requeue(control, not_to_c, RebalanceParams())] == [B]


def test_at_the_bounds_a_head_that_just_fits_stays_and_each_that_runs_has_one_block_more() -> None:
    for free, expected in ((99, 1), (100, 0)):
        here = view_of(A, [request_load("full", 1000 - free), SECOND])
        for levels in (LoadParams(), LoadParams(((-10, 400), (0, 0)))):
            params = RebalanceParams(load=levels)
            assert len(plan_requeue((here, view_of(B, [])), Resting(), params)) == expected
    blocked = view_of(A, [request_load("full", 950), SECOND])
    for held, expected in ((898, 1), (899, 0)):
        there = view_of(B, [request_load("one", held)])
        assert len(plan_requeue((blocked, there), Resting(), RebalanceParams())) == expected


def test_one_that_two_instances_list_after_a_hand_over_moves_once() -> None:
    full = [request_load("full", 950), SECOND]
    views = view_of(A, full), view_of(C, full), view_of(B, [])
    assert [move.source for move in plan_requeue(views, Resting(), RebalanceParams())] == [A]


def test_one_that_was_stopped_before_it_began_takes_nothing_more_from_its_source() -> None:
    stopped = msgspec.structs.replace(HEAD, status="migrating_out")
    load = load_of(A, 1, (*RUNNING, SECOND))
    (move,) = plan_requeue((view_of(A, [*RUNNING, HEAD]), view_of(B, [])), Resting(), RebalanceParams())
    record = record_of(move)
    assert after_moves(load, (*RUNNING, SECOND), [record], [], {"head": stopped}) == load
    queued = load_of(A, 1, (*RUNNING, HEAD, SECOND))
    assert after_moves(queued, (*RUNNING, SECOND), [record], [], {"head": HEAD}) == load, "the control"
    assert after_moves(load_of(B, 1, ()), (), [], [record], {"head": stopped}).free_blocks == 1000 - 450


def test_targets_see_one_on_its_way_as_waiting_and_count_its_prompt_once() -> None:
    joined = after_joining(load_of(B, 1, RUNNING), 0, 450)
    view = InstanceView(B, joined, RUNNING, False, 2, 2, 0.1, arriving=(HEAD,))
    speed = (0.01, 1e-5, 0.0, 5e-4, 1e-6, 0.0)
    assert _Side(view, speed).standing == standing_of(load_of(B, 1, RUNNING), speed).with_waiting(
        HEAD.num_prompt_tokens
    )


def test_what_holds_blocks_still_moves_only_if_it_outlives_their_copy() -> None:
    holding = msgspec.structs.replace(SECOND, status="preempted", num_blocks=90, num_output_tokens=9, max_tokens=20)
    full = [request_load("full", 905), holding]
    for copy_s, expected in ((0.0, 1), (0.0005, 1), (0.005, 0)):
        (here,) = (InstanceView(A, load_of(A, 1, tuple(full), free_blocks=5), tuple(full), False, 2, 2, 0.1, copy_s),)
        assert len(plan_requeue((here, view_of(B, [])), Resting(), RebalanceParams())) == expected


def test_it_rests_like_any_other_and_so_does_the_pair_after_a_refusal() -> None:
    play = Queues(instances=(A, B, C))
    play.reports(A, *RUNNING, HEAD)
    assert [move[:2] for move in play.ticks()] == [("head", B)]
    play.ends(1, Outcome.REFUSED)
    play.reports(A, *RUNNING, HEAD, SECOND)
    assert [(name, there) for name, there, reason in play.ticks() if "requeue" in reason] == [("second", C)]


def test_moves_that_copy_nothing_teach_nothing_about_the_time_of_a_copy() -> None:
    play = Queues()
    play.reports(A, *RUNNING, HEAD)
    (move,) = starts(play.on(Ticked()))
    known = play.core._instances[A]
    known.copy_s_per_block = 0.002
    play.ends(move.number, figures=MigrationFigures(duration_s=0.3))
    assert known.copy_s_per_block == 0.002


def test_without_rebalancing_it_waits() -> None:
    play = Queues(CoreParams(is_rebalancing=False))
    play.reports(A, *RUNNING, HEAD)
    assert play.ticks() == []


def test_rebalance_sees_the_queue_that_is_left() -> None:
    """The second is the head then: rebalance makes room for it, not for the one that has gone."""
    second = msgspec.structs.replace(HEAD, request_id="behind", arrived_s=1.0, movable=False)
    play = Queues(instances=(A, B, C))
    play.reports(A, *RUNNING, HEAD, second)
    moves = play.ticks()
    assert [(name, reason.split(":")[0]) for name, _, reason in moves] == [("head", "requeue"), ("r0", "defragment")]
    assert "source -800 -> " in moves[1][2], "(400 - 450) * 16 tokens short, of one head"
    assert moves[1][1] == C, "B has 450 blocks fewer now"


def test_the_journal_says_why_and_a_replay_decides_the_same(tmp_path: Path) -> None:
    requests = (*RUNNING, HEAD)
    story: list[tuple[float, Event]] = [(0.0, started(A)), (0.0, started(B))]
    for step in range(1, 4):
        story += [
            (0.1, ReportReceived(load_of(A, step, requests if step == 1 else RUNNING))),
            (0.0, Listed(request_report(A, *(requests if step == 1 else RUNNING), step=step))),
            (0.0, ReportReceived(load_of(B, step, ()))),
            (0.2, Ticked()),
        ]
        if step == 2:
            ended = MigrationEnded(MigrationNumber(1), Outcome.COMMITTED, "", MigrationFigures(duration_s=0.01))
            story.append((0.0, ended))
    write_story(tmp_path / "j", story)
    told, replay = read(tmp_path / "j")
    assert replay.divergence is None and replay.num_unverified == replay.num_lost == 0
    assert list(told.summary.migrations) == ["requeue"]
    (row,) = [row for row in told.rows if "head" in row.requests]
    assert row.why.startswith("requeue: the first in the queue wants 450 blocks, 400 are free here; ")
    assert row.age_s is not None and 0.19 < row.age_s < 0.21
