"""Are requests ended and migrations called off by command, and is every caller answered exactly once?"""

from __future__ import annotations

import pytest

from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import Answer, Effect, EndRequest, MigrationFinished, Refused, RequestEnded, WithdrawMigration
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    Event,
    InstanceStarted,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    MigrationWithdrawn,
    ReportReceived,
    RequestCancelled,
    RequestsReceived,
    Token,
    WaiterGone,
)
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report

A, B = InstanceId("instance-0"), InstanceId("instance-1")
CALLER, OTHER, MOVER = Token(1), Token(2), Token(3)


class Play:
    """A core with two instances, two requests on the first."""

    def __init__(self, params: CoreParams | None = None) -> None:
        self.core = Orchestrator(params or CoreParams(is_rebalancing=False))
        self.requests = (request_load("cmpl-1"), request_load("cmpl-2"))
        for instance in (A, B):
            self.on(InstanceStarted(Incarnation(instance, Epoch(1), "tcp://127.0.0.1:1"), "actor", "tiny", 16, 1000))
            self.on(ReportReceived(load_report(instance)))
        self.on(RequestsReceived(request_report(A, *self.requests)))

    def on(self, event: Event) -> list[Effect]:
        effects = self.core.on(event, 1.0)
        self.core.check_integrity()
        return effects

    def ends(self, number: int, outcome: Outcome) -> list[Effect]:
        return self.on(MigrationEnded(MigrationNumber(number), outcome, "because", MigrationFigures()))

    def moves(self) -> None:
        self.on(MigrateRequested(MOVER, "cmpl-1", B))


def refusal(effects: list[Effect]) -> Refused:
    (answer,) = effects
    assert isinstance(answer, Answer) and isinstance(answer.result, Refused)
    return answer.result


def test_a_request_is_ended_at_the_gateways_and_then_the_caller_is_told() -> None:
    play = Play()
    assert play.on(CancelRequested(CALLER, "client-cmpl-1")) == [EndRequest(CALLER, "cmpl-1", "asked for")]  # type: ignore[arg-type]
    assert play.on(RequestCancelled(CALLER)) == [Answer(CALLER, RequestEnded(A, play.requests[0]))]
    assert play.on(RequestCancelled(CALLER)) == [], "answered once"


def test_a_gateway_that_did_not_answer_is_unknown_and_not_done() -> None:
    play = Play()
    play.on(CancelRequested(CALLER, "cmpl-1"))
    refused = refusal(play.on(RequestCancelled(CALLER, "no answer within 10 s")))
    assert refused.kind is RefusalKind.UNAVAILABLE and "cmpl-1" in refused.reason


def test_only_to_be_checked_ends_nothing() -> None:
    play = Play()
    assert play.on(CancelRequested(CALLER, "cmpl-1", validate_only=True)) == [
        Answer(CALLER, RequestEnded(A, play.requests[0]))
    ]


@pytest.mark.parametrize(("name", "kind"), [("nobody", RefusalKind.NOT_FOUND), ("cmpl", RefusalKind.AMBIGUOUS)])
def test_a_name_that_fits_none_or_several_is_refused(name: str, kind: RefusalKind) -> None:
    assert refusal(Play().on(CancelRequested(CALLER, name))).kind is kind


def test_a_migration_is_called_off_at_its_source_and_the_caller_hears_its_end() -> None:
    play = Play()
    play.moves()
    (effect,) = play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))
    assert isinstance(effect, WithdrawMigration) and (effect.source.instance, effect.request_id) == (A, "cmpl-1")
    assert play.on(MigrationWithdrawn(CALLER)) == [], "what came of it says the migration's own end"
    answers = {effect.token: effect.result for effect in play.ends(1, Outcome.REFUSED) if isinstance(effect, Answer)}
    assert answers.keys() == {CALLER, MOVER}
    for result in answers.values():
        assert isinstance(result, MigrationFinished) and result.record.outcome is Outcome.REFUSED


def test_a_migration_that_commits_all_the_same_was_called_off_too_late() -> None:
    play = Play()
    play.moves()
    play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))
    play.on(WaiterGone(MOVER))
    refused = refusal(play.ends(1, Outcome.COMMITTED))
    assert refused.kind is RefusalKind.PRECONDITION and "too late" in refused.reason


def test_a_migration_that_ended_or_never_was_cannot_be_called_off() -> None:
    play = Play()
    play.moves()
    play.ends(1, Outcome.COMMITTED)
    assert refusal(play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))).kind is RefusalKind.PRECONDITION
    assert refusal(play.on(CancelMigrationRequested(CALLER, MigrationNumber(2)))).kind is RefusalKind.NOT_FOUND


def test_a_source_that_did_not_answer_may_or_may_not_have_heard() -> None:
    play = Play()
    play.moves()
    play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))
    assert refusal(play.on(MigrationWithdrawn(CALLER, "its connection broke"))).kind is RefusalKind.UNAVAILABLE
    assert next(effect for effect in play.ends(1, Outcome.REFUSED) if isinstance(effect, Answer)).token == MOVER


def test_a_caller_that_goes_away_is_forgotten() -> None:
    play = Play()
    play.moves()
    play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))
    play.on(CancelRequested(OTHER, "cmpl-2"))
    play.on(WaiterGone(CALLER))
    play.on(WaiterGone(OTHER))
    assert play.on(RequestCancelled(OTHER)) == []
    assert [effect.token for effect in play.ends(1, Outcome.REFUSED) if isinstance(effect, Answer)] == [MOVER]


def test_callers_are_bounded() -> None:
    play = Play(CoreParams(is_rebalancing=False, max_waiters=1))
    play.moves()
    play.on(CancelRequested(CALLER, "cmpl-2"))
    assert refusal(play.on(CancelRequested(OTHER, "cmpl-2"))).kind is RefusalKind.EXHAUSTED
    play.on(CancelMigrationRequested(CALLER, MigrationNumber(1)))
    assert refusal(play.on(CancelMigrationRequested(OTHER, MigrationNumber(1)))).kind is RefusalKind.EXHAUSTED
