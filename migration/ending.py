"""What must be put right once the outcome is known? The closing half of the source: back to the batch, or freed; and
`Cancel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.effects import SourceEffect
from migration.events import SourceEvent, Timer
from migration.params import MigrationParams
from migration.types import MigrationId, NotStopped, Outcome

DECLINED = {
    NotStopped.FINISHED: (Outcome.FINISHED_AT_SOURCE, "it finished before it was stopped"),
    NotStopped.ABORTED: (Outcome.ABORTED_BY_CLIENT, "aborted before it was stopped"),
    NotStopped.UNMOVABLE: (Outcome.REFUSED, "the source's engine cannot stop it"),
}
"""The outcome, and its reason, when the engine would not stop the request."""


class Pending(Enum):
    """What a closing source still waits for."""

    STOP = "stop"
    """A stop is under way; what it stops goes back to the batch."""
    RESUME = "resume"
    RELEASE = "release"
    CANCELLED = "cancelled"
    """The peer's word that it holds nothing; bounded, since its lease ends by itself."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The outcome and what is still open. A value: `on` returns the next one."""

    migration_id: MigrationId
    params: MigrationParams
    outcome: Outcome
    reason: str
    pending: frozenset[Pending] = frozenset()
    num_cancels_sent: int = 0

    @property
    def is_over(self) -> bool:
        return not self.pending

    def begin(self, *, is_stopping: bool, is_stopped: bool, tell: bool) -> tuple[Ending, list[SourceEffect]]:
        """`tell`: the peer may hold blocks and cannot have committed."""
        clears: list[SourceEffect] = [ef.ClearTimer(timer) for timer in (Timer.RESEND, Timer.PHASE, Timer.DEADLINE)]
        ending, effects = self, [*clears, ef.ForgetCopy()]
        if tell:
            ending, more = ending._cancel()
            effects += more
        if is_stopping:
            ending = ending._with(Pending.STOP)
        if is_stopped:
            ending, more = ending._put_right()
            effects += more
        return ending, effects

    def on(self, event: SourceEvent) -> tuple[Ending, list[SourceEffect]]:
        """Take an event of state CLOSING; what was under way when the end came is of no interest any more."""
        match event:
            case ev.StopGranted() if Pending.STOP in self.pending:
                return self._without(Pending.STOP)._put_right()
            case ev.StopDeclined():
                return self._without(Pending.STOP), []
            case ev.RequestResumed():
                return self._without(Pending.RESUME), []
            case ev.RequestReleased():
                return self._without(Pending.RELEASE), []
            case ev.EngineFailed(reason):
                return self._on_engine_failed(reason)
            case msg.Cancelled() | msg.Refused() | ev.DestinationLost() | ev.Withdrawn():
                return self._without(Pending.CANCELLED), []
            case ev.TimerFired(Timer.RESEND) if Pending.CANCELLED in self.pending:
                if self.num_cancels_sent >= self.params.max_cancel_sends:
                    return self._without(Pending.CANCELLED), []
                return self._cancel()
            case ev.ClientAborted():
                # The engine was told as well, and frees a stopped request: a resume finds nothing then.
                return self, []
            case _:
                return self, []

    def _put_right(self) -> tuple[Ending, list[SourceEffect]]:
        if self.outcome in (Outcome.COMMITTED, Outcome.ABORTED_BY_CLIENT):
            return self._with(Pending.RELEASE), [ef.ReleaseRequest()]
        return self._with(Pending.RESUME), [ef.ResumeRequest()]

    def _on_engine_failed(self, reason: str) -> tuple[Ending, list[SourceEffect]]:
        if Pending.STOP in self.pending:
            return self._without(Pending.STOP)._put_right()  # perhaps stopped: resuming one that is not does nothing
        if not self.pending & {Pending.RESUME, Pending.RELEASE}:
            return self, []
        ending = self._without(Pending.RESUME)._without(Pending.RELEASE)
        outcome = self.outcome if self.outcome is Outcome.COMMITTED else Outcome.FAULT
        return replace(ending, outcome=outcome, reason=f"{self.reason}; putting it right failed: {reason}"), []

    def _cancel(self) -> tuple[Ending, list[SourceEffect]]:
        cancel = msg.Cancel(migration_id=self.migration_id, outcome=self.outcome.value)
        ending = replace(self._with(Pending.CANCELLED), num_cancels_sent=self.num_cancels_sent + 1)
        return ending, [ef.Send(cancel), ef.SetTimer(Timer.RESEND, self.params.resend_s)]

    def _with(self, what: Pending) -> Ending:
        return replace(self, pending=self.pending | {what})

    def _without(self, what: Pending) -> Ending:
        return replace(self, pending=self.pending - {what})
