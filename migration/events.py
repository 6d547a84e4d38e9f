"""What can happen to a migration? Events of both machines, in the past tense. Messages of the peer are events as they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migration.messages import ToDestination, ToSource
from migration.types import CopyReceipt, Description, NotStopped, Progress, Reservation, StoppedRequest


class Timer(Enum):
    """The alarms a machine may set; setting one again moves it."""

    RESEND = "resend"
    """The last message is unanswered, or the peer should hear that we live."""
    PHASE = "phase"
    """The current phase (the reservation, one copy) takes too long."""
    DEADLINE = "deadline"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class TimerFired:
    timer: Timer


@dataclass(frozen=True, slots=True)
class ClientAborted:
    """The client left; both sides are told."""


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """A visit to our engine raised `EngineFault`: whether it was done is unknown."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendFailed:
    """A message could not be handed over. Not a proof that the peer is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The agent calls the migration off."""

    reason: str


# ---- the source's own


@dataclass(frozen=True, slots=True)
class Started:
    """The agent wants this migration."""


@dataclass(frozen=True, slots=True)
class RequestDescribed:
    description: Description


@dataclass(frozen=True, slots=True)
class RequestUnmovable:
    """The engine has the request and cannot move it."""

    reason: str


@dataclass(frozen=True, slots=True)
class RequestGone:
    """The engine has no such request: it has finished or was aborted."""


@dataclass(frozen=True, slots=True)
class ProgressRead:
    progress: Progress


@dataclass(frozen=True, slots=True)
class BlocksCopied:
    """The blocks of the last `CopyBlocks` have landed."""

    receipt: CopyReceipt


@dataclass(frozen=True, slots=True)
class CopyBroken:
    """The last `CopyBlocks` did not land."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopGranted:
    stopped: StoppedRequest


@dataclass(frozen=True, slots=True)
class StopDeclined:
    why: NotStopped


@dataclass(frozen=True, slots=True)
class RequestResumed:
    """It decodes here again (or was ended by its client meanwhile)."""


@dataclass(frozen=True, slots=True)
class RequestReleased:
    """Nothing of it is left here."""


@dataclass(frozen=True, slots=True)
class DestinationLost:
    """The agent's word that the destination's epoch has ended: it does not run the request and never will."""


# ---- the destination's own


@dataclass(frozen=True, slots=True)
class BlocksHeld:
    reservation: Reservation
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlocksGrown:
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class RequestReady:
    """A commit could be served at once."""


@dataclass(frozen=True, slots=True)
class RequestCommitted:
    """The request is schedulable here: we own it."""


@dataclass(frozen=True, slots=True)
class EngineRefused:
    """Our engine said no to the last hold, growth, readiness or commit."""

    reason: str


@dataclass(frozen=True, slots=True)
class BlocksGivenBack:
    """No push can reach the blocks any more, and they are free."""


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The agent's word that the source's epoch has ended."""


SourceEvent = (
    ToSource
    | Started
    | RequestDescribed
    | RequestUnmovable
    | RequestGone
    | ProgressRead
    | BlocksCopied
    | CopyBroken
    | StopGranted
    | StopDeclined
    | RequestResumed
    | RequestReleased
    | DestinationLost
    | ClientAborted
    | EngineFailed
    | SendFailed
    | Withdrawn
    | TimerFired
)

DestinationEvent = (
    ToDestination
    | BlocksHeld
    | BlocksGrown
    | RequestReady
    | RequestCommitted
    | EngineRefused
    | BlocksGivenBack
    | SourceLost
    | ClientAborted
    | EngineFailed
    | SendFailed
    | Withdrawn
    | TimerFired
)
