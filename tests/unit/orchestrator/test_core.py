"""Does the core do what each event asks for, and nothing else? Every test checks its integrity after each event."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from instance.lifecycle import State
from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import (
    Answer,
    DrainAccepted,
    Drained,
    Effect,
    FenceInstance,
    Refused,
    Result,
    SetDraining,
    StartMigration,
    Undrained,
    UpdateMembers,
    UpdatePriorities,
)
from orchestrator.errors import LimitExceeded, RefusalKind
from orchestrator.events import (
    DrainingSet,
    DrainRequested,
    Event,
    GatewayLost,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
    UndrainRequested,
    WaiterGone,
)
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report

A, B, C = InstanceId("instance-0"), InstanceId("instance-1"), InstanceId("instance-2")
CALLER = Token(1)
WANTED = CoreParams(rebalance=RebalanceParams(threshold_steps=512, margin_steps=16))


class Play:
    """A core, a hand-moved clock, and short words for what instances say."""

    def __init__(self, params: CoreParams = WANTED, instances: tuple[InstanceId, ...] = (A, B)) -> None:
        self.core = Orchestrator(params)
        self.now_s = 100.0
        self.step = 1
        for instance in instances:
            self.on(started(instance))
            self.on(ReportReceived(load_report(instance)))
            self.on(RequestsReceived(request_report(instance)))

    def on(self, event: Event) -> list[Effect]:
        effects = self.core.on(event, self.now_s)
        self.core.check_integrity()
        return effects

    def reports(self, instance: InstanceId, *requests: RequestLoad, state: str = "serving") -> list[Effect]:
        """Both reports of an instance that runs these requests, a moment later."""
        self.now_s += 0.1
        self.step += 1
        used = sum(request.num_blocks for request in requests)
        load = load_report(instance, step=self.step, state=state, free_blocks=1000 - used, num_running=len(requests))
        effects = self.on(ReportReceived(load))
        return effects + self.on(RequestsReceived(request_report(instance, *requests, step=self.step)))

    def ends(
        self, number: int, outcome: Outcome = Outcome.COMMITTED, figures: MigrationFigures | None = None
    ) -> list[Effect]:
        return self.on(MigrationEnded(MigrationNumber(number), outcome, "because", figures or MigrationFigures()))


def started(instance: InstanceId, epoch: int = 1) -> InstanceStarted:
    incarnation = Incarnation(instance, Epoch(epoch), f"tcp://127.0.0.1:{epoch}")
    return InstanceStarted(incarnation, f"kvferry-{instance}-{epoch}", "tiny", 16, 1000)


def answer(effects: list[Effect], token: Token = CALLER) -> Result:
    answers = [effect.result for effect in effects if isinstance(effect, Answer) and effect.token == token]
    assert len(answers) == 1, "a command is answered exactly once"
    return answers[0]


def refusal(effects: list[Effect]) -> Refused:
    result = answer(effects)
    assert isinstance(result, Refused)
    return result


def starts(effects: list[Effect]) -> list[StartMigration]:
    return [effect for effect in effects if isinstance(effect, StartMigration)]


# ---------------------------------------------------------------------- who is there
def test_gateways_hear_of_each_instance_that_starts() -> None:
    play = Play(instances=())
    (told,) = play.on(started(A))
    assert isinstance(told, UpdateMembers)
    assert [member.incarnation.instance for member in told.members] == [A]
    urgency, told = play.on(GatewayStarted("gateway-0", "kvferry-gateway-0", "http://127.0.0.1:8000"))
    assert isinstance(urgency, UpdatePriorities)
    assert isinstance(told, UpdateMembers) and len(told.members) == 1 and told.num_gateways == 1


def test_gateways_hear_how_many_they_are() -> None:
    play = Play()
    for number in range(2):
        _, told = play.on(GatewayStarted(f"gateway-{number}", f"kvferry-gateway-{number}", "http://127.0.0.1:8000"))
    assert isinstance(told, UpdateMembers) and told.num_gateways == 2
    (told,) = play.on(GatewayLost("gateway-0", "killed"))
    assert isinstance(told, UpdateMembers) and told.num_gateways == 1
    assert play.on(GatewayLost("gateway-0", "killed")) == [], "said once"


def test_a_lost_instance_is_fenced_at_its_peers_and_leaves_the_membership() -> None:
    play = Play()
    fence, told = play.on(InstanceLost(A, Epoch(1), "killed"))
    assert isinstance(fence, FenceInstance) and fence.peers == (B,) and fence.epoch == 1
    assert isinstance(told, UpdateMembers) and [member.incarnation.instance for member in told.members] == [B]
    shown = {item.incarnation.instance: item.state for item in play.core.snapshot(play.now_s).instances}
    assert shown == {A: State.STOPPED, B: State.SERVING}


def test_the_loss_of_an_earlier_epoch_changes_nothing() -> None:
    play = Play()
    play.on(started(A, epoch=2))
    assert play.on(InstanceLost(A, Epoch(1), "late news")) == []


def test_a_higher_epoch_replaces_and_fences_the_lower_and_a_lower_one_is_ignored() -> None:
    play = Play()
    effects = play.on(started(A, epoch=2))
    assert [effect.epoch for effect in effects if isinstance(effect, FenceInstance)] == [1]
    assert play.on(started(A, epoch=1)) == []


def test_reports_of_another_epoch_or_an_older_step_are_ignored() -> None:
    play = Play()
    play.reports(A, request_load("r1"))
    play.on(ReportReceived(load_report(A, epoch=7, step=99, free_blocks=1)))
    play.on(ReportReceived(load_report(A, step=0, free_blocks=2)))
    (shown, _) = play.core.snapshot(play.now_s).instances
    assert shown.load is not None and shown.load.free_blocks == 990


def test_too_many_instances_are_an_error_that_changes_nothing() -> None:
    play = Play(CoreParams(max_instances=2))
    with pytest.raises(LimitExceeded):
        play.on(started(C))
    play.core.check_integrity()
    assert len(play.core.snapshot(0.0).instances) == 2


def test_a_lost_gateway_is_shown_as_such() -> None:
    play = Play()
    play.on(GatewayStarted("gateway-0", "kvferry-gateway-0", "http://127.0.0.1:8000"))
    play.on(GatewayLost("gateway-0", "killed"))
    assert [item.alive for item in play.core.snapshot(play.now_s).gateways] == [False]


# ---------------------------------------------------------------------- drain
def test_a_drain_moves_what_is_there_and_answers_when_both_reports_say_empty() -> None:
    play = Play()
    play.reports(A, request_load("r1"))
    effects = play.on(DrainRequested(CALLER, A, wait=True))
    assert [type(effect) for effect in effects] == [SetDraining, UpdateMembers]
    play.on(DrainingSet(A, Epoch(1), True))
    play.reports(A, request_load("r1"), state="draining")
    (move,) = starts(play.on(Ticked()))
    assert (move.request_id, move.source.instance, move.destination.instance) == ("r1", A, B)
    assert move.reason.startswith("drain") and move.signal_age_s >= 0
    assert play.reports(A, state="draining") == [], "the move is not over yet"
    assert answer(play.ends(1)) == Drained(A)
    assert play.core.snapshot(play.now_s).instances[0].drained


def test_a_drain_is_not_over_before_the_instance_has_confirmed_it() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    assert play.reports(A) == [], "it may still be taking requests in"
    play.on(DrainingSet(A, Epoch(1), True))
    assert answer(play.reports(A, state="draining")) == Drained(A)


def test_what_cannot_be_moved_is_left_to_run_to_its_end() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    play.on(DrainingSet(A, Epoch(1), True))
    play.reports(A, request_load("fixed", movable=False), state="draining")
    assert play.on(Ticked()) == []
    assert answer(play.reports(A, state="draining")) == Drained(A)


def test_the_last_serving_instance_is_not_drained() -> None:
    play = Play()
    play.on(DrainRequested(Token(9), B, wait=False))
    assert refusal(play.on(DrainRequested(CALLER, A, wait=True))).kind is RefusalKind.PRECONDITION


def test_a_second_drain_joins_when_it_waits_and_is_refused_when_it_does_not() -> None:
    play = Play()
    assert answer(play.on(DrainRequested(CALLER, A, wait=False))) == DrainAccepted(A, 0)
    assert refusal(play.on(DrainRequested(CALLER, A, wait=False))).kind is RefusalKind.PRECONDITION
    assert play.on(DrainRequested(Token(2), A, wait=True)) == []
    play.on(DrainingSet(A, Epoch(1), True))
    assert answer(play.reports(A, state="draining"), Token(2)) == Drained(A)
    assert answer(play.on(DrainRequested(Token(3), A, wait=True)), Token(3)) == Drained(A)


def test_an_undrain_answers_those_who_wait_for_the_drain() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    effects = play.on(UndrainRequested(Token(2), A))
    assert refusal(effects).kind is RefusalKind.OVERTAKEN
    assert answer(effects, Token(2)) == Undrained(A)
    assert any(isinstance(effect, SetDraining) and not effect.draining for effect in effects)
    again = play.on(UndrainRequested(Token(3), A))
    assert isinstance(answer(again, Token(3)), Refused)


def test_an_instance_that_does_not_carry_out_the_drain_serves_on() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    effects = play.on(DrainingSet(A, Epoch(1), True, error="no answer"))
    assert refusal(effects).kind is RefusalKind.UNAVAILABLE
    assert play.core.snapshot(play.now_s).instances[0].state is State.SERVING


def test_one_that_still_refuses_after_its_drain_was_ended_can_be_undrained_again() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=False))
    play.on(DrainingSet(A, Epoch(1), True))
    play.on(UndrainRequested(Token(2), A))
    play.on(DrainingSet(A, Epoch(1), False, "no answer"))
    play.reports(A, state="draining")
    effects = play.on(UndrainRequested(Token(3), A))
    assert isinstance(answer(effects, Token(3)), Undrained)
    assert [effect.draining for effect in effects if isinstance(effect, SetDraining)] == [False]
    play.reports(A)
    assert refusal(play.on(UndrainRequested(CALLER, A))).kind is RefusalKind.PRECONDITION


def test_the_loss_of_a_draining_instance_answers_its_waiters() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    assert refusal(play.on(InstanceLost(A, Epoch(1), "killed"))).kind is RefusalKind.OVERTAKEN


def test_a_waiter_that_has_gone_is_not_answered() -> None:
    play = Play()
    play.on(DrainRequested(CALLER, A, wait=True))
    play.on(WaiterGone(CALLER))
    play.on(DrainingSet(A, Epoch(1), True))
    assert play.reports(A, state="draining") == []


def test_waiters_are_bounded() -> None:
    play = Play(CoreParams(max_waiters=1))
    play.on(DrainRequested(Token(2), A, wait=True))
    assert refusal(play.on(DrainRequested(CALLER, A, wait=True))).kind is RefusalKind.EXHAUSTED


@pytest.mark.parametrize(
    "ask",
    [
        lambda: DrainRequested(CALLER, C, wait=True),
        lambda: UndrainRequested(CALLER, C),
        lambda: MigrateRequested(CALLER, "r1", C),
    ],
)
def test_an_unknown_instance_is_not_found(ask: Callable[[], Event]) -> None:
    found = refusal(Play().on(ask()))
    assert found.kind is RefusalKind.NOT_FOUND and "instance-0, instance-1" in found.reason
