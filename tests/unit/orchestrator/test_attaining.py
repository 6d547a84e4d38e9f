"""Does the core move what misses its target, by step times it has learned itself, and does a replay do the same?"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from instance.messages import LoadReport, RequestLoad, StepTotals
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import StartMigration
from orchestrator.events import (
    Event,
    InstanceLost,
    InstanceStarted,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    PolicyUpdateRequested,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
)
from orchestrator.journal.lines import Checkpoint
from orchestrator.journal.replay import Replay
from orchestrator.journal.values import core_of, core_state
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report
from tests.support.written_journal import read, write_story

A, B = InstanceId("instance-0"), InstanceId("instance-1")
Story = list[tuple[float, Event]]


def started(name: InstanceId) -> InstanceStarted:
    return InstanceStarted(Incarnation(name, Epoch(1), f"tcp://{name}"), f"kvferry-{name}-1", "tiny", 16, 1000)


def load(name: InstanceId, step: int, step_s: float, requests: tuple[RequestLoad, ...]) -> LoadReport:
    """Of an instance whose steps have all taken as long, with ten requests of 2,000 tokens each in them."""
    blocks = sum(request.num_blocks for request in requests)
    report = load_report(name, step=step, free_blocks=1000 - blocks, num_running=len(requests))
    decoded = StepTotals(step, 0, 10 * step, 0, 10 * step, 20_000 * step, 0, step_s * step)
    return msgspec.structs.replace(report, steps=decoded)


def reports(step: int, on_a: tuple[RequestLoad, ...], on_b: tuple[RequestLoad, ...], b_s: float = 0.01) -> Story:
    """A takes 60 ms a step. Everybody says how it is."""
    return [
        (0.1, ReportReceived(load(A, step, 0.06, on_a))),
        (0.0, RequestsReceived(request_report(A, *on_a, step=step))),
        (0.0, ReportReceived(load(B, step, b_s, on_b))),
        (0.0, RequestsReceived(request_report(B, *on_b, step=step))),
    ]


WANTS = request_load("wants", 20, tpot_s=0.04)
OTHERS = tuple(request_load(f"r{number}", 20) for number in range(9))
BEGUN: Story = [(0.0, started(A)), (0.0, started(B))]


def play(story: Story, core: Orchestrator | None = None) -> list[StartMigration]:
    core, now_s = core or Orchestrator(CoreParams()), 100.0
    moves = []
    for gap_s, event in story:
        now_s += gap_s
        moves += [effect for effect in core.on(event, now_s) if isinstance(effect, StartMigration)]
        core.check_integrity()
    return moves


def test_a_request_on_a_slow_instance_moves_to_the_fast_one_that_meets_its_target() -> None:
    (move,) = play([*BEGUN, *reports(10, (WANTS, *OTHERS), ()), (0.1, Ticked())])
    assert (move.request_id, move.source.instance, move.destination.instance) == ("wants", A, B)
    assert move.reason.startswith("attain: a token every ") and move.reason.endswith(" 40.0 ms wanted")


def test_without_targets_nothing_of_this_moves() -> None:
    plain = msgspec.structs.replace(WANTS, tpot_s=None)
    assert play([*BEGUN, *reports(10, (plain, *OTHERS), ()), (0.1, Ticked())]) == []


def test_nothing_moves_to_an_instance_that_is_not_known_or_as_slow_or_where_rebalancing_is_off() -> None:
    on_a = (WANTS, *OTHERS)
    unknown = [*BEGUN, *reports(10, on_a, ())[:2], (0.0, ReportReceived(load_report(B))), (0.1, Ticked())]
    assert play(unknown) == []
    assert play([*BEGUN, *reports(10, on_a, (), b_s=0.06), (0.1, Ticked())]) == []
    off = PolicyUpdateRequested(Token(1), (("rebalance.enabled", False),))
    assert play([*BEGUN, *reports(10, on_a, ()), (0.0, off), (0.1, Ticked())]) == []


def test_an_idle_instance_of_the_first_hour_is_taken_to_be_like_the_others_once_those_are_known_well() -> None:
    """B has reported from the start and never made a step. A's steps take 10 ms, and 5 ms for each request."""
    story, totals, wants = [*BEGUN], StepTotals(), request_load("wants", 20, tpot_s=0.038)
    for step in range(1, 298):
        running = (wants, *OTHERS)[: 1 + 7 * step % 10]
        decoded, context = totals.num_decoding + len(running), totals.num_context_tokens + 320 * len(running)
        busy_s = totals.busy_s + 0.010 + 0.005 * len(running)
        totals = StepTotals(step, 0, decoded, 0, decoded, context, 0, busy_s)
        report = load_report(A, step=step, free_blocks=1000 - 20 * len(running), num_running=len(running))
        story += [
            (0.1, ReportReceived(msgspec.structs.replace(report, steps=totals))),
            (0.0, RequestsReceived(request_report(A, *running, step=step))),
            (0.0, ReportReceived(load_report(B))),
            (0.0, RequestsReceived(request_report(B))),
        ]
        if step == 7:
            assert play([*story, (0.1, Ticked())]) == [], "seven rows are too few to judge others by"
    (move,) = play([*story, (0.1, Ticked())])
    assert (move.request_id, move.destination.instance) == ("wants", B)


def test_those_that_wait_behind_a_long_prompt_go_where_they_are_in_time_and_each_once() -> None:
    late = tuple(
        request_load(f"late{number}", 0, status="waiting", num_output_tokens=0, ttft_s=ttft_s)
        for number, ttft_s in enumerate((1.3, 1.32))
    )
    late = tuple(msgspec.structs.replace(one, num_prompt_tokens=200) for one in late)
    first = msgspec.structs.replace(late[0], request_id="first", num_prompt_tokens=4000, arrived_s=2.0, ttft_s=None)
    busy = [
        (gap_s, ReportReceived(queued(event.report)) if isinstance(event, ReportReceived) else event)
        for gap_s, event in reports(10, (*OTHERS, first, *late), ())
    ]
    moves = play([*BEGUN, *busy, (0.01, Ticked()), (0.1, Ticked())])
    assert [(move.request_id, move.destination.instance) for move in moves] == [("late0", B), ("late1", B)]
    assert all(move.reason.startswith("attain: the first token in ") for move in moves)


def queued(report: LoadReport) -> LoadReport:
    """On A nine run and three wait; a step takes 256 tokens. B's prompts take as long, it has none."""
    changes = {"num_running": 9, "num_waiting": 3, "waiting_blocks": 276, "head_of_line_blocks": 250}
    report = msgspec.structs.replace(report, max_step_tokens=256, max_running=64)
    return msgspec.structs.replace(report, **changes) if report.instance == A else report


def a_story() -> Story:
    """It moves, comes to rest, another speed is learned, and an instance that was known is lost."""
    ended = MigrationEnded(
        MigrationNumber(1), Outcome.COMMITTED, "", MigrationFigures(copied_blocks=20, duration_s=0.2)
    )
    another = request_load("another", 20, tpot_s=0.04)
    story = [*BEGUN, *reports(10, (WANTS, *OTHERS), ()), (0.1, Ticked()), (0.2, ended)]
    for step in range(11, 60):
        story += [*reports(step, (another, *OTHERS[:8]), (WANTS,)), (0.4, Ticked())]
    return [*story, (0.0, InstanceLost(B, Epoch(1), "killed")), (0.1, Ticked())]


def test_a_replay_of_its_journal_decides_the_same(tmp_path: Path) -> None:
    write_story(tmp_path / "j", a_story())
    told, replay = read(tmp_path / "j")
    assert replay.divergence is None and replay.num_unverified == replay.num_lost == 0
    assert sum(told.summary.events.values()) == len(a_story())


@pytest.mark.parametrize(("by", "is_alike"), [(1e-9, True), (1e-3, False)])
def test_a_replay_allows_what_is_learned_its_last_digits_and_nothing_more(by: float, is_alike: bool) -> None:
    """Another machine's linear algebra rounds otherwise."""
    core, replay = Orchestrator(CoreParams()), Replay()
    play(a_story()[:-2], core)
    replay.take(Checkpoint("run", 1, 200.0, "", "v", core_state(core)), "1")
    model = core._attaining._times._learned[(A, Epoch(1))].model
    model._information *= 1.0 + by
    replay.take(Checkpoint("run", 2, 200.0, "", "v", core_state(core)), "2")
    assert (replay.divergence is None) is is_alike


def test_a_restored_core_has_learned_what_the_other_one_has() -> None:
    story = a_story()
    first = Orchestrator(CoreParams())
    play(story[:60], first)
    second = core_of(msgspec.json.decode(msgspec.json.encode(core_state(first))))
    assert core_state(second) == core_state(first)
    now_s = 200.0
    for gap_s, event in story[60:]:
        now_s += gap_s
        assert second.on(event, now_s) == first.on(event, now_s)
    assert core_state(second) == core_state(first)
