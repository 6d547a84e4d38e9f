"""What may a machine ask the world to do? Effects of both machines, imperative; each names its answers."""

from __future__ import annotations

from dataclasses import dataclass

from migration.events import Timer
from migration.messages import Message
from migration.types import BlockRange, BlockTable, Description


@dataclass(frozen=True, slots=True)
class Send:
    """To the peer. Answer: none, or `SendFailed`."""

    message: Message


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer: `TimerFired`, after so long, unless set again or cleared."""

    timer: Timer
    after_s: float


@dataclass(frozen=True, slots=True)
class ClearTimer:
    timer: Timer


# ---- the source's own


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """Answer: `RequestDescribed`, `RequestUnmovable`, `RequestGone` or `EngineFailed`."""


@dataclass(frozen=True, slots=True)
class ReadProgress:
    """Answer: `ProgressRead`, `RequestGone` or `EngineFailed`."""


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    """Answer: `BlocksCopied` or `CopyBroken`."""

    endpoints: tuple[str, ...]
    block_table: BlockTable
    blocks: BlockRange
    urgent: bool
    """The request stands still: not paced."""


@dataclass(frozen=True, slots=True)
class ForgetCopy:
    """Break off a copy that is under way, and forget the migration's connections. Answer: none."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Answer: `StopGranted`, `StopDeclined` or `EngineFailed`."""

    without_kv: bool


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Answer: `RequestResumed` or `EngineFailed`."""


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """Answer: `RequestReleased` or `EngineFailed`."""


# ---- the destination's own


@dataclass(frozen=True, slots=True)
class HoldBlocks:
    """Reserve, then open the mover's ticket. Answer: `BlocksHeld`, `EngineRefused` or `EngineFailed`."""

    description: Description


@dataclass(frozen=True, slots=True)
class GrowBlocks:
    """Grow, then reopen the ticket. Answer: `BlocksGrown`, `EngineRefused` or `EngineFailed`."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class AwaitReady:
    """Answer: `RequestReady` or `EngineRefused` (also for an engine's fault: it will not get ready)."""


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """Close the ticket, then commit. Answer: `RequestCommitted` or `EngineRefused`."""

    state: bytes


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Close the ticket, then cancel the reservation. Answer: `BlocksGivenBack` or `EngineFailed`."""


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """End the request that was just committed. Answer: none."""


SourceEffect = (
    Send
    | SetTimer
    | ClearTimer
    | DescribeRequest
    | ReadProgress
    | CopyBlocks
    | ForgetCopy
    | StopRequest
    | ResumeRequest
    | ReleaseRequest
)

DestinationEffect = (
    Send | SetTimer | ClearTimer | HoldBlocks | GrowBlocks | AwaitReady | CommitRequest | GiveBack | AbortRequest
)
