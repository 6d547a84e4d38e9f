"""Is each change of a request's priority made where the request is, wherever it goes meanwhile, and answered once?"""

from __future__ import annotations

from pathlib import Path

import pytest

from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.effects import Answer, Effect, Refused, Reprioritised, SetPriority
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    ChangeNumber,
    InstanceLost,
    MigrateRequested,
    PriorityAnswered,
    PriorityRequested,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
    WaiterGone,
)
from orchestrator.journal.lines import Entry
from orchestrator.policy.levels import parse_levels
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.reprioritising import MAX_TRIES
from orchestrator.runtime.journal import Journal
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report
from tests.support.written_journal import PROMPT, lines_of
from tests.unit.orchestrator.test_core import Play, answer, refusal, started, starts

A, B = InstanceId("instance-0"), InstanceId("instance-1")
CALLER, MOVER = Token(1), Token(2)
LEVELS = parse_levels("high:-10:300,normal:0,low:10")
PARAMS = CoreParams(
    levels=LEVELS, rebalance=RebalanceParams(threshold_steps=512, margin_steps=16, load=LEVELS.load_params)
)
GRPC = "admin API SetRequestPriority"
NOT_HERE = PriorityAnswer(PriorityOutcome.NOT_HERE, reason="gone")
ON_THE_MOVE = PriorityAnswer(PriorityOutcome.ON_THE_MOVE, reason="stopped")


def was_set(previous: int = 0, status: RequestStatus = RequestStatus.RUNNING) -> PriorityAnswer:
    return PriorityAnswer(PriorityOutcome.SET, previous, status)


@pytest.fixture
def play() -> Play:
    """Two instances; the first runs r1 and r2."""
    made = Play(PARAMS)
    made.reports(A, request_load("r1"), request_load("r2"))
    return made


def asks(play: Play, reference: str = "r1", level: str = "high", token: Token = CALLER) -> list[Effect]:
    return play.on(PriorityRequested(token, reference, level, GRPC))


def sent(effects: list[Effect]) -> SetPriority:
    (effect,) = [effect for effect in effects if isinstance(effect, SetPriority)]
    return effect


def says(play: Play, given: PriorityAnswer | None, number: int = 1, **why: object) -> list[Effect]:
    return play.on(PriorityAnswered(ChangeNumber(number), given, **why))  # type: ignore[arg-type]


def test_the_owner_is_asked_and_its_answer_is_the_callers(play: Play) -> None:
    effect = sent(asks(play, "client-r1"))
    assert (effect.request_id, effect.owner.instance, effect.priority) == ("r1", A, -10)
    assert effect.reason == f"asked for by {GRPC}: normal (0) -> high (-10)"
    done = answer(says(play, was_set()))
    assert isinstance(done, Reprioritised)
    assert (done.instance, done.previous, done.priority, done.status) == (A, 0, -10, "running")
    assert done.change == "normal (0) -> high (-10)"
    assert "1 of 1 others that run here give up their blocks before it" in done.effect
    assert says(play, was_set()) == [], "an answer that is said twice is heard once"
    shown = play.core.snapshot(play.now_s).instances[0].requests
    assert [request.priority for request in shown] == [-10, 0], "what is shown need not wait for a report"


def test_a_number_is_a_priority_too(play: Play) -> None:
    assert sent(asks(play, level="-3")).priority == -3


@pytest.mark.parametrize(
    ("reference", "level", "kind"),
    [
        ("r1", "urgent", RefusalKind.INVALID),
        ("r1", "", RefusalKind.INVALID),
        ("nobody", "high", RefusalKind.NOT_FOUND),
        ("", "high", RefusalKind.NOT_FOUND),
        ("r", "high", RefusalKind.AMBIGUOUS),
    ],
)
def test_what_is_not_there_is_refused_at_once(play: Play, reference: str, level: str, kind: RefusalKind) -> None:
    effects = asks(play, reference, level)
    assert refusal(effects).kind is kind and len(effects) == 1


def test_one_that_has_just_finished_is_not_found(play: Play) -> None:
    asks(play)
    assert refusal(says(play, NOT_HERE)) == Refused(RefusalKind.NOT_FOUND, "r1 has ended")


def test_an_engine_that_knows_no_priority_is_a_failed_precondition(play: Play) -> None:
    asks(play)
    refused = refusal(says(play, PriorityAnswer(PriorityOutcome.UNSUPPORTED, reason="first come first served")))
    assert refused == Refused(RefusalKind.PRECONDITION, "first come first served")


@pytest.mark.parametrize("kind", [RefusalKind.OVERTAKEN, RefusalKind.UNAVAILABLE])
def test_an_instance_that_gives_no_answer_is_told_as_what_it_is(play: Play, kind: RefusalKind) -> None:
    asks(play)
    refused = refusal(says(play, None, failure=kind, reason="its process ended"))
    assert refused == Refused(kind, "instance-0: its process ended")


def moving(play: Play) -> Play:
    """r1 is on its way from A to B (migration 1)."""
    (start,) = starts(play.on(MigrateRequested(MOVER, "r1", B)))
    assert start.number == 1
    return play


def test_while_the_copy_goes_on_the_source_makes_the_change(play: Play) -> None:
    assert sent(asks(moving(play))).owner.instance == A
    assert isinstance(answer(says(play, was_set())), Reprioritised)


@pytest.mark.parametrize("given", [ON_THE_MOVE, NOT_HERE])
@pytest.mark.parametrize(
    ("outcome", "owner"), [(Outcome.COMMITTED, B), (Outcome.REFUSED, A), (Outcome.ABORTED_BY_CLIENT, A)]
)
def test_one_that_was_stopped_is_changed_by_whoever_owns_it_after_the_move(
    play: Play, given: PriorityAnswer, outcome: Outcome, owner: InstanceId
) -> None:
    """1. The source has stopped the request, or handed it over. 2. The migration ends. 3. Its owner is asked."""
    asks(moving(play))
    assert says(play, given) == [], "it waits for the end of the migration"
    effect = sent(play.ends(1, outcome))
    assert effect.owner.instance == owner and f"after migration 1 ({outcome.value})" in effect.reason
    assert isinstance(answer(says(play, was_set())), Reprioritised)


def test_one_that_moved_before_the_instance_was_asked_is_followed(play: Play) -> None:
    """1. A move ends. 2. The reports still say that the source has it. 3. The source does not know it any more."""
    moving(play).ends(1)
    assert sent(asks(play)).owner.instance == A
    assert sent(says(play, NOT_HERE)).owner.instance == B
    assert refusal(says(play, NOT_HERE)) == Refused(RefusalKind.NOT_FOUND, "r1 has ended")


def test_one_that_came_back_and_ended_is_not_looked_for_in_a_circle(play: Play) -> None:
    moving(play).ends(1)
    play.reports(A)
    play.reports(B, request_load("r1"))
    play.now_s += 20
    play.reports(A)
    play.reports(B, request_load("r1"))
    play.on(MigrateRequested(MOVER, "r1", A))
    play.ends(2)
    play.reports(B)
    play.reports(A, request_load("r1"))
    assert sent(asks(play)).owner.instance == A
    assert refusal(says(play, NOT_HERE)).kind is RefusalKind.NOT_FOUND


def test_one_that_keeps_changing_hands_is_given_up_after_a_bound(play: Play) -> None:
    asks(moving(play))
    here, there = A, B
    for number in range(1, MAX_TRIES):
        assert says(play, ON_THE_MOVE) == []
        assert sent(play.ends(number)).owner.instance == there
        here, there = there, here
        play.now_s += 20
        play.reports(there)
        play.reports(here, request_load("r1"))
        play.on(MigrateRequested(Token(10 + number), "r1", there))
    assert says(play, ON_THE_MOVE) == []
    assert refusal(play.ends(MAX_TRIES)).kind is RefusalKind.UNAVAILABLE


def test_one_that_changes_hands_without_our_doing_is_to_be_tried_again(play: Play) -> None:
    asks(play)
    assert refusal(says(play, ON_THE_MOVE)).kind is RefusalKind.UNAVAILABLE


def test_when_the_new_owner_is_lost_the_caller_is_told(play: Play) -> None:
    asks(moving(play))
    says(play, ON_THE_MOVE)
    play.on(InstanceLost(B, Epoch(1), "killed"))
    refused = refusal(play.ends(1))
    assert refused.kind is RefusalKind.OVERTAKEN and "instance-1 was lost" in refused.reason


def test_a_new_incarnation_of_the_owner_is_not_asked_for_the_old_ones_request(play: Play) -> None:
    asks(moving(play))
    says(play, ON_THE_MOVE)
    play.on(started(B, epoch=2))
    assert refusal(play.ends(1)).kind is RefusalKind.OVERTAKEN


def test_a_caller_that_is_gone_is_not_answered_and_the_change_is_made_all_the_same(play: Play) -> None:
    asks(moving(play))
    says(play, ON_THE_MOVE)
    play.on(WaiterGone(CALLER))
    assert sent(play.ends(1)).owner.instance == B
    assert says(play, was_set()) == []


def test_changes_under_way_are_bounded() -> None:
    play = Play(CoreParams(levels=LEVELS, max_waiters=1))
    play.reports(A, request_load("r1"), request_load("r2"))
    asks(play)
    refused = answer(asks(play, "r2", token=Token(5)), Token(5))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.EXHAUSTED
    says(play, was_set())
    assert sent(asks(play, "r2", token=Token(6))).request_id == "r2"


def test_the_effect_of_a_change_on_one_that_waits_is_its_place(play: Play) -> None:
    waiting = [request_load(f"w{n}", status="waiting", priority=n) for n in (-20, 0, 5)]
    play.reports(A, request_load("r1"), *waiting, request_load("late", status="waiting"))
    asks(play, "late")
    done = answer(says(play, was_set(status=RequestStatus.WAITING)))
    assert isinstance(done, Reprioritised)
    assert done.effect == "it waits: 1 of 3 others that wait here are more urgent now"


def test_a_raised_request_clears_its_instance_and_stays_itself(play: Play) -> None:
    """1. Two requests share an instance. 2. One is raised; 300 blocks shall be free beside it, 200 are. 3. The instance
    reports it. 4. The next tick moves the other away, and says why."""
    big = [request_load("r1", 300), request_load("r2", 500)]
    play.reports(A, *big)
    assert starts(play.on(Ticked())) == [], "nothing is short before"
    asks(play)
    done = answer(says(play, was_set()))
    assert isinstance(done, Reprioritised)
    assert "of 300 blocks to be kept free beside it 100 are missing" in done.effect
    play.now_s += 0.2
    for instance in (A, B):
        load = load_report(instance, step=9, num_running=0)
        if instance == A:
            load = load_report(A, step=9, free_blocks=200, num_running=2, running_by_priority=((-10, 1), (0, 1)))
        play.on(ReportReceived(load))
    raised = [request_load("r1", 300, priority=-10), request_load("r2", 500)]
    play.on(RequestsReceived(request_report(A, *raised, step=9)))
    (move,) = starts(play.on(Ticked()))
    assert (move.request_id, move.destination.instance) == ("r2", B)
    assert move.reason.startswith("isolate: 300 blocks are kept free beside requests of priority -10")


def test_the_journal_tells_who_asked_for_what_and_what_came_of_it(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, play.core, play.now_s, PROMPT)
    events = (
        PriorityRequested(CALLER, "r1", "high", GRPC),
        PriorityAnswered(ChangeNumber(1), was_set()),
    )
    for event in events:
        journal.write(event, play.on(event), play.now_s)
    journal.close()
    _, asked, done = lines_of(path)
    assert isinstance(asked, Entry) and asked.event == events[0]
    (change,) = asked.effect_values()
    assert isinstance(change, SetPriority)
    assert change.reason == f"asked for by {GRPC}: normal (0) -> high (-10)"
    assert isinstance(done, Entry) and done.event == events[1]
    result = answer(list(done.effect_values()))
    assert isinstance(result, Reprioritised)
    assert result.change == "normal (0) -> high (-10)" and result.effect


def test_every_effect_of_a_change_is_one_of_two(play: Play) -> None:
    effects = asks(play) + says(play, was_set())
    assert {type(effect) for effect in effects} == {SetPriority, Answer}
    assert sent(effects).owner == Incarnation(A, Epoch(1), "tcp://127.0.0.1:1")
