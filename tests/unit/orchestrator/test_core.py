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
    MigrationFinished,
    Refused,
    Result,
    SetDraining,
    StartMigration,
    Undrained,
    UpdateMembers,
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
    (told,) = play.on(GatewayStarted("gateway-0", "kvferry-gateway-0", "http://127.0.0.1:8000"))
    assert isinstance(told, UpdateMembers) and len(told.members) == 1 and told.num_gateways == 1


def test_gateways_hear_how_many_they_are() -> None:
    play = Play()
    for number in range(2):
        (told,) = play.on(GatewayStarted(f"gateway-{number}", f"kvferry-gateway-{number}", "http://127.0.0.1:8000"))
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


# ---------------------------------------------------------------------- migrate on command
@pytest.mark.parametrize("reference", ["cmpl-abc-1", "mine", "cmpl-a", "mi"])
def test_a_request_is_found_by_its_id_the_clients_id_or_a_prefix(reference: str) -> None:
    play = Play()
    play.reports(A, request_load("cmpl-abc-1", external_id="mine"), request_load("cmpl-xyz-1", external_id="yours"))
    (move,) = starts(play.on(MigrateRequested(CALLER, reference, B, "blocking")))
    assert (move.request_id, move.mode, move.reason) == ("cmpl-abc-1", "blocking", "asked for")
    result = answer(play.ends(move.number))
    assert isinstance(result, MigrationFinished) and result.record.outcome is Outcome.COMMITTED


def test_a_name_that_fits_several_requests_is_ambiguous_unless_it_fits_one_exactly() -> None:
    play = Play()
    play.reports(A, request_load("r1"), request_load("r12"))
    assert refusal(play.on(MigrateRequested(CALLER, "r", B))).kind is RefusalKind.AMBIGUOUS
    (move,) = starts(play.on(MigrateRequested(CALLER, "r1", B)))
    assert move.request_id == "r1"


def test_a_request_that_both_sides_list_after_a_hand_over_is_where_the_later_report_says() -> None:
    play = Play()
    play.reports(A, request_load("r1"))
    play.reports(B, request_load("r1"))
    (move,) = starts(play.on(MigrateRequested(CALLER, "r1", A)))
    assert move.source.instance == B


def test_commands_that_the_state_forbids_are_refused_with_their_reason() -> None:
    play = Play(instances=(A, B, C))
    play.reports(A, request_load("r1"), request_load("fixed", movable=False))
    play.on(DrainRequested(Token(9), C, wait=False))
    cases = {"r1": (A, "already"), "fixed": (B, "cannot be moved"), "r": (C, "draining")}
    for reference, (destination, words) in cases.items():
        found = refusal(play.on(MigrateRequested(CALLER, reference, destination)))
        assert found.kind is RefusalKind.PRECONDITION and words in found.reason
    assert refusal(play.on(MigrateRequested(CALLER, "nobody", B))).kind is RefusalKind.NOT_FOUND
    assert refusal(play.on(MigrateRequested(CALLER, "", B))).kind is RefusalKind.NOT_FOUND
    assert starts(play.on(MigrateRequested(CALLER, "r1", B)))
    assert "on the move" in refusal(play.on(MigrateRequested(CALLER, "r1", B))).reason


def test_migrations_are_bounded_per_instance() -> None:
    play = Play()
    play.reports(A, *(request_load(f"r{number}") for number in range(3)))
    play.on(MigrateRequested(Token(2), "r0", B))
    play.on(MigrateRequested(Token(3), "r1", B))
    assert refusal(play.on(MigrateRequested(CALLER, "r2", B))).kind is RefusalKind.EXHAUSTED


def test_an_end_without_a_known_start_changes_nothing() -> None:
    assert Play().ends(17) == []


def test_the_history_is_bounded_and_shows_the_latest_first() -> None:
    play = Play(CoreParams(max_history=2))
    play.reports(A, request_load("r1"))
    for number in (1, 2, 3):
        play.on(MigrateRequested(Token(number), "r1", B))
        play.ends(number, Outcome.REFUSED)
    assert [record.number for record in play.core.snapshot(play.now_s).migrations] == [3, 2]


# ---------------------------------------------------------------------- rebalance on ticks
def crowded(play: Play) -> list[Effect]:
    """A is nearly full with small requests, B is empty."""
    return play.reports(A, *(request_load(f"r{number:02}", num_blocks=32) for number in range(30)))


def test_a_tick_moves_requests_from_a_full_instance_to_a_free_one_within_the_limits() -> None:
    play = Play()
    crowded(play)
    moves = starts(play.on(Ticked()))
    assert [(move.source.instance, move.destination.instance) for move in moves] == [(A, B), (A, B)]
    assert all(move.reason.startswith("rebalance") and move.signal_age_s < 1 for move in moves)
    assert play.on(Ticked()) == [], "two migrations out of one instance are enough"


def test_without_rebalancing_only_commands_move_requests() -> None:
    play = Play(CoreParams(is_rebalancing=False))
    crowded(play)
    assert play.on(Ticked()) == []


def test_an_old_report_moves_nothing() -> None:
    play = Play()
    crowded(play)
    play.now_s += 1.6
    assert play.on(Ticked()) == []


def test_a_pair_rests_after_a_refusal_and_is_tried_again_later() -> None:
    play = Play()
    crowded(play)
    for move in starts(play.on(Ticked())):
        play.ends(move.number, Outcome.REFUSED)
    assert play.on(Ticked()) == []
    play.now_s += 6
    crowded(play)
    play.reports(B)
    assert starts(play.on(Ticked()))


def test_a_moved_request_rests() -> None:
    play = Play()
    crowded(play)
    first = starts(play.on(Ticked()))
    for move in first:
        play.ends(move.number)
    crowded(play)  # as if the reports were late and still listed them
    later = starts(play.on(Ticked()))
    assert later and not {move.request_id for move in first} & {move.request_id for move in later}


def test_a_request_that_is_nearly_done_is_not_moved_once_copies_are_known_to_take_longer() -> None:
    """Steps of 10 ms; a block has taken 5 ms, so 32 blocks take 16 steps, and 31 more tokens are too few for them."""
    play = Play()
    crowded(play)
    first = starts(play.on(Ticked()))
    for move in first:
        play.ends(move.number, figures=MigrationFigures(copied_blocks=30, tail_blocks=2, duration_s=0.16))
    play.now_s += 11
    owned = [request_load(f"s{n:02}", 32, num_output_tokens=1000 - left) for n, left in enumerate([31] * 29 + [32])]
    play.reports(A, *owned)
    play.reports(B)
    assert [move.request_id for move in starts(play.on(Ticked()))] == ["s29"]


def test_a_blocked_head_of_the_queue_makes_room_for_itself() -> None:
    play = Play()
    play.on(
        ReportReceived(load_report(A, step=9, free_blocks=300, num_running=7, num_waiting=1, head_of_line_blocks=350))
    )
    requests = [request_load(f"r{number}", num_blocks=100) for number in range(7)]
    play.on(RequestsReceived(request_report(A, *requests)))
    (move, *_) = starts(play.on(Ticked()))
    assert move.reason.startswith("defragment") and move.source.instance == A
