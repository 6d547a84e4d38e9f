"""Which mistakes must the exploration find? The machines, each broken in one way, and shells that leave out a rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.destination import DestinationMachine
from migration.effects import DestinationEffect, SourceEffect
from migration.events import DestinationEvent, SourceEvent, Timer
from migration.messages import ToDestination
from migration.source import SourceMachine
from migration.table import DestinationState, SourceState
from migration.types import BlockRange, BlockTable, Outcome, StoppedRequest
from tests.support.protocol_scenario import Disturbance, Lapse, Scenario
from tests.support.protocol_scenarios import LIVE, UNTOLD, under
from tests.support.protocol_world import ProtocolWorld

S = SourceState
D = DestinationState


class ResumesWhenCommitIsLate(SourceMachine):
    """The classic mistake: a lost answer taken for a no."""

    def _resend(self) -> list[SourceEffect]:
        if self.state is S.COMMITTING:
            return self._close(Outcome.TIMED_OUT, "no answer to commit", 0.0, tell=False)
        return super()._resend()


class FreesBeforeTheAnswer(SourceMachine):
    """Takes the commit for granted once it was sent."""

    def _commit(self) -> list[SourceEffect]:
        return [*super()._commit(), ef.ReleaseRequest()]

    def on(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        if self.state is S.COMMITTING and isinstance(event, ev.RequestReleased | ev.EngineFailed):
            self.endpoints = ()  # says that nothing is left here
            return []
        if self.state is S.COMMITTING and self.endpoints and not isinstance(event, ev.TimerFired):
            return []  # the engine comes first
        return super().on(event, now_s)


class WithdrawsACommit(SourceMachine):
    """Lets its agent call off what may have been committed."""

    def on(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        if self.state is S.COMMITTING and isinstance(event, ev.Withdrawn):
            return self._close(Outcome.REFUSED, "withdrawn", now_s, tell=False)
        return super().on(event, now_s)


class TakesAFailedSendForTheEnd(SourceMachine):
    """A channel that cannot send is no proof that the peer is gone."""

    def on(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        if self.state is S.COMMITTING and isinstance(event, ev.SendFailed):
            return self._close(Outcome.DESTINATION_LOST, event.reason, now_s, tell=False)
        return super().on(event, now_s)


class AsksForTheCommitOnce(SourceMachine):
    """Never repeats the question."""

    def _resend(self) -> list[SourceEffect]:
        return [] if self.state is S.COMMITTING else super()._resend()


class CommitsBeforeTheTail(SourceMachine):
    """Forgets the blocks written since the last stage."""

    def _on_stopped(self, stopped: StoppedRequest, now_s: float) -> list[SourceEffect]:
        effects = super()._on_stopped(stopped, now_s)
        if self.state is S.COPYING_TAIL:
            self.copying = None
            return self._commit()
        return effects


class IgnoresPreemptions(SourceMachine):
    """Goes on with blocks that were taken away while they were copied."""

    def _is_preempted(self, num_preemptions: int, settled_tokens: int) -> bool:
        return False


class CopiesABlockInWork(SourceMachine):
    """Takes the block that is being written along with the full ones."""

    def _copy(self, blocks: BlockRange, block_table: BlockTable, now_s: float) -> list[SourceEffect]:
        more = BlockRange(blocks.first, blocks.end + (self.stopped is None))
        return super()._copy(more, block_table, now_s)


class NeverResumes(SourceMachine):
    """Leaves a request stopped whose migration failed."""

    def on(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        return [effect for effect in super().on(event, now_s) if not isinstance(effect, ef.ResumeRequest)]


class ForgetsItsCommit(DestinationMachine):
    """Answers a repeated commit as if it had never heard of it."""

    def _on_message(self, message: ToDestination) -> list[DestinationEffect]:
        if self.state is D.COMMITTED and isinstance(message, msg.Commit):
            return [ef.Send(msg.Refused(migration_id=self.migration_id, reason="unknown migration"))]
        return super()._on_message(message)


class HasNoLease(DestinationMachine):
    """Holds blocks for as long as nobody says otherwise."""

    def on(self, event: DestinationEvent, now_s: float) -> list[DestinationEffect]:
        leases = (ef.SetTimer, ef.ClearTimer)
        return [effect for effect in super().on(event, now_s) if not isinstance(effect, leases)]


class LetsTheLeaseEndACommit(DestinationMachine):
    """Goes on counting while its engine commits."""

    def on(self, event: DestinationEvent, now_s: float) -> list[DestinationEffect]:
        if self.state is D.COMMITTING and isinstance(event, ev.TimerFired):
            return self._give_back(Outcome.TIMED_OUT, "the lease expired")
        if self.state in (D.RELEASING, D.CLOSED) and isinstance(event, ev.RequestCommitted):
            return []
        effects = super().on(event, now_s)
        return [effect for effect in effects if effect != ef.ClearTimer(Timer.LEASE) or self.state is not D.COMMITTING]


class ForgetsWhoLeft(DestinationMachine):
    """The abort that comes while the engine commits is lost."""

    def on(self, event: DestinationEvent, now_s: float) -> list[DestinationEffect]:
        effects = super().on(event, now_s)
        self.is_client_gone = False
        return effects


class GivesBackTooSoon(DestinationMachine):
    """Does not wait for the reservation that its engine is still working on."""

    def on(self, event: DestinationEvent, now_s: float) -> list[DestinationEffect]:
        is_given_back = self.state in (D.RELEASING, D.CLOSED)
        if is_given_back and isinstance(event, ev.BlocksHeld | ev.BlocksGrown | ev.EngineFailed):
            return []
        effects = super().on(event, now_s)
        if self.state is D.WITHDRAWING:
            self.state = D.RELEASING
            return [*effects, ef.GiveBack()]
        return effects


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mistake, where it shows, and what the exploration must say of it."""

    scenario: Scenario
    why: str
    source_class: type[SourceMachine] = SourceMachine
    destination_class: type[DestinationMachine] = DestinationMachine

    def world(self) -> ProtocolWorld:
        return ProtocolWorld(self.scenario, self.source_class, self.destination_class, checks_table=False)

    @property
    def without_it(self) -> Scenario:
        return replace(self.scenario, lapse=Lapse.NONE)


_PLAIN = under(LIVE)
_ALONE = under(LIVE, in_flight=1)
_CRASHES = (Disturbance.SOURCE_CRASH, Disturbance.DESTINATION_CRASH, Disturbance.RESTART)
_NOWHERE = "from here no state of rest can be reached"
_ONLY_ONE = "two owners"
_NOT_WHOLE = "committed without all of its blocks"

MUTATIONS = {
    "resumes when the answer to commit is late": Mutation(_PLAIN, _ONLY_ONE, ResumesWhenCommitIsLate),
    "commit is not idempotent": Mutation(_PLAIN, _ONLY_ONE, destination_class=ForgetsItsCommit),
    "frees its blocks before the answer": Mutation(_PLAIN, "at rest, 0 owners", FreesBeforeTheAnswer),
    "no lease": Mutation(UNTOLD, _NOWHERE, destination_class=HasNoLease),
    "the lease ends a commit under way": Mutation(_PLAIN, _ONLY_ONE, destination_class=LetsTheLeaseEndACommit),
    "calls off what may be committed": Mutation(
        under(LIVE, Disturbance.WITHDRAWAL, in_flight=1), _ONLY_ONE, WithdrawsACommit
    ),
    "takes a failed send for the peer's end": Mutation(
        under(LIVE, faults=1, in_flight=1), _ONLY_ONE, TakesAFailedSendForTheEnd
    ),
    "asks for the commit once": Mutation(_ALONE, _NOWHERE, AsksForTheCommitOnce),
    "commits before the tail": Mutation(_ALONE, _NOT_WHOLE, CommitsBeforeTheTail),
    "ignores preemptions": Mutation(
        under(LIVE, faults=1, in_flight=1), "committed with blocks of before a preemption", IgnoresPreemptions
    ),
    "copies a block in work": Mutation(_ALONE, "a block is copied that can still change", CopiesABlockInWork),
    "never resumes": Mutation(_ALONE, _NOWHERE, NeverResumes),
    "loses the abort of the last moment": Mutation(
        under(LIVE, Disturbance.ABORT, in_flight=1),
        "at rest, an aborted request still runs",
        destination_class=ForgetsWhoLeft,
    ),
    "gives back what is still being held": Mutation(
        under(LIVE, Disturbance.DRAIN, in_flight=1),
        "at rest, blocks are still reserved",
        destination_class=GivesBackTooSoon,
    ),
    "serves another epoch": Mutation(
        replace(under(LIVE, *_CRASHES, in_flight=1), lapse=Lapse.SERVES_OTHER_EPOCHS), _ONLY_ONE
    ),
    "hears the dead": Mutation(replace(under(LIVE, *_CRASHES), lapse=Lapse.HEARS_THE_DEAD), _NOT_WHOLE),
    "forgets a committed migration": Mutation(replace(_PLAIN, lapse=Lapse.FORGETS_COMMITTED), _ONLY_ONE),
}
