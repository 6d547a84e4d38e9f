"""Can two engines own one request, or blocks stay reserved for nobody? All joint states of the two real machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migration import effects as ef
from migration import messages as msg
from migration.destination import DestinationMachine
from migration.effects import DestinationEffect, SourceEffect
from migration.messages import ToDestination
from migration.params import MigrationParams, Mode
from migration.source import SourceMachine
from migration.table import DestinationState, SourceState
from migration.types import Outcome, Progress, Reservation, StoppedRequest
from tests.support.explorer import Exploration, explore
from tests.support.protocol_world import Disturbance, ProtocolWorld, Scenario, World

_TABLE = (tuple(range(8)),)
_EMPTY: tuple[tuple[int, ...], ...] = ((),)


def _params(mode: Mode = Mode.LIVE) -> MigrationParams:
    return MigrationParams(mode=mode, max_stages=1, slack_blocks=1, max_cancel_sends=1)


LIVE = Scenario(
    _params(),
    looks=(Progress(5, 6, 0, _TABLE), Progress(6, 7, 0, _TABLE)),
    stopped=StoppedRequest(b"state", 7, 3, 0, _TABLE),
    reserved=Reservation(0, 4, _TABLE),
    num_faults=1,
)
GROWS = replace(LIVE, reserved=Reservation(0, 3, _TABLE), stopped=StoppedRequest(b"state", 11, 3, 0, _TABLE))
WAITING = replace(
    LIVE,
    looks=(Progress(0, 6, 0, _EMPTY),),
    stopped=StoppedRequest(b"state", 0, 0, 0, _EMPTY),
    reserved=Reservation(0, 0, _EMPTY),
)


def _explore(world: ProtocolWorld) -> Exploration[World]:
    return explore(world.start, world.successors, world.find_fault, is_rest=world.is_rest, max_states=2_000_000)


def _under(scenario: Scenario, *disturbances: Disturbance, faults: int = 0, in_flight: int = 2) -> Scenario:
    return replace(scenario, disturbances=frozenset(disturbances), num_faults=faults, max_in_flight=in_flight)


QUICK = {
    "live, three messages in flight": _under(LIVE, in_flight=3),
    "live, an engine says no": _under(LIVE, faults=1),
    "live, a crash": _under(LIVE, Disturbance.CRASH),
    "live, the client leaves": _under(LIVE, Disturbance.ABORT),
    "live, it finishes or is called off": _under(LIVE, Disturbance.FINISH, Disturbance.WITHDRAWAL, in_flight=1),
    "growing": _under(GROWS),
    "waiting, a crash": _under(WAITING, Disturbance.CRASH),
}
LONG = {
    "live, a crash, three in flight, a fault": _under(LIVE, Disturbance.CRASH, faults=1, in_flight=3),
    "live, the client leaves, three in flight": _under(LIVE, Disturbance.ABORT, in_flight=3),
    "live, it finishes, three in flight, a fault": _under(LIVE, Disturbance.FINISH, faults=1, in_flight=3),
    "live, called off, three in flight, a fault": _under(LIVE, Disturbance.WITHDRAWAL, faults=1, in_flight=3),
    "growing, a crash, a fault": _under(GROWS, Disturbance.CRASH, faults=1),
    "waiting, the client leaves, a fault": _under(WAITING, Disturbance.ABORT, faults=1),
}


@pytest.mark.parametrize("scenario", QUICK.values(), ids=QUICK.keys())
def test_never_two_owners_and_nothing_left_over(scenario: Scenario) -> None:
    _expect_sound(scenario)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", LONG.values(), ids=LONG.keys())
def test_never_two_owners_however_much_goes_wrong_at_once(scenario: Scenario) -> None:
    _expect_sound(scenario)


def _expect_sound(scenario: Scenario) -> None:
    found = _explore(ProtocolWorld(scenario))
    print(f"{found.num_states} states, {found.num_steps} steps")
    assert found.broken is None, str(found.broken)
    assert found.num_states > 500  # the world does offer choices


class ResumesWhenCommitIsLate(SourceMachine):
    """The classic mistake: a lost answer taken for a no."""

    def _resend(self) -> list[SourceEffect]:
        if self.state is SourceState.COMMITTING:
            return self._close(Outcome.TIMED_OUT, "no answer to commit", 0.0, tell=False)
        return super()._resend()


class ForgetsItsCommit(DestinationMachine):
    """Answers a repeated commit as if it had never heard of it."""

    def _on_message(self, message: ToDestination) -> list[DestinationEffect]:
        if self.state is DestinationState.COMMITTED and isinstance(message, msg.Commit):
            return [ef.Send(msg.Refused(migration_id=self.migration_id, reason="unknown migration"))]
        return super()._on_message(message)


def test_resuming_on_a_late_commit_is_caught_as_two_owners() -> None:
    found = _explore(ProtocolWorld(_under(LIVE), source_class=ResumesWhenCommitIsLate, checks_table=False))
    assert found.broken is not None
    print(found.broken)
    assert found.broken.why == "two owners"
    assert "source: timer resend" in found.broken.steps


def test_a_step_that_the_table_does_not_know_is_caught() -> None:
    found = _explore(ProtocolWorld(_under(LIVE), source_class=ResumesWhenCommitIsLate))
    assert found.broken is not None and "COMMITTING -TimerFired-> " in found.broken.why


def test_a_commit_that_is_not_idempotent_is_caught_as_two_owners() -> None:
    found = _explore(ProtocolWorld(_under(LIVE), destination_class=ForgetsItsCommit, checks_table=False))
    assert found.broken is not None
    print(found.broken)
    assert found.broken.why == "two owners"
