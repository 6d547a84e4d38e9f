"""What are the values every part of a migration speaks of? Ids, block tables, progress, receipts and the legal
outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

RequestId = NewType("RequestId", str)
"""The engine's own request id: unique over the fleet and for ever, also for each child of an n > 1 request."""

InstanceId = NewType("InstanceId", str)
MigrationId = NewType("MigrationId", str)

Epoch = NewType("Epoch", int)
"""Incarnation of an instance. A higher epoch fences everything the lower one still says."""

BlockTable = tuple[tuple[int, ...], ...]
"""Physical block ids by KV-cache group, in token order: shape [num_groups][num_blocks of the request]."""


class Outcome(Enum):
    """The legal ends of a migration; each is a metric label."""

    COMMITTED = "committed"
    REFUSED = "refused"
    FINISHED_AT_SOURCE = "finished_at_source"
    ABORTED_BY_CLIENT = "aborted_by_client"
    PREEMPTED = "preempted"
    SOURCE_LOST = "source_lost"
    DESTINATION_LOST = "destination_lost"
    TIMED_OUT = "timed_out"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of an instance, and where its inbox listens (``tcp://host:port``)."""

    instance: InstanceId
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class Migration:
    """Which request moves, from whom, to whom: the identity of one migration."""

    migration_id: MigrationId
    request_id: RequestId
    source: Incarnation
    destination: Incarnation


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Half-open range of block indexes of one request, the same for every KV-cache group."""

    first: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.first)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request stands at a step boundary of its source."""

    settled_tokens: int
    """Tokens whose KV is written and can no longer change (computed minus in flight)."""
    num_tokens: int
    num_preemptions: int
    block_table: BlockTable


@dataclass(frozen=True, slots=True)
class Description:
    """All a destination needs to reserve room for a request that is still running at its source."""

    request_id: RequestId
    payload: bytes
    """The engine's own encoding of the request (opaque here)."""
    settled_tokens: int
    kv_fingerprint: str
    """What the source's engine says of itself (opaque here): the destination's engine compares it with what it is
    itself, and refuses with what differs."""
    block_size: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class StoppedRequest:
    """A request taken out of the batch at a step boundary, with no token in flight."""

    state: bytes
    """The engine's own encoding of the small state (opaque here): output tokens, sampler generator, grammar position
    ...
    """
    settled_tokens: int
    num_output_tokens: int
    num_preemptions: int
    block_table: BlockTable


class NotStopped(Enum):
    """Why a request could not be taken out of the batch."""

    FINISHED = "finished"
    ABORTED = "aborted"
    UNMOVABLE = "unmovable"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The owner of the truth says no, and why. News, not an error."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for a request that may arrive."""

    num_cached_tokens: int
    """Leading tokens, a multiple of the block size, that the destination's prefix cache already holds: not copied."""
    num_blocks: int
    """Blocks of the table so far, the cached ones included."""
    block_table: BlockTable


@dataclass(frozen=True, slots=True)
class CopyReceipt:
    """What one push moved; given only after the destination has written the blocks."""

    num_blocks: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StageReport:
    num_blocks: int
    num_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What one migration did; written by the source when it is over."""

    migration_id: MigrationId
    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    outcome: Outcome
    reason: str
    cached_tokens: int
    moved_tokens: int
    """Settled tokens at the stop (0 unless it got that far)."""
    stages: tuple[StageReport, ...]
    tail: StageReport | None
    """The blocks copied while the request stood still."""
    duration_s: float
    stopped_s: float
    """From the stop at the source to the commit's answer (0 unless it got that far)."""

    @property
    def num_bytes(self) -> int:
        return sum(stage.num_bytes for stage in self.stages) + (self.tail.num_bytes if self.tail else 0)

    @property
    def num_blocks(self) -> int:
        return sum(stage.num_blocks for stage in self.stages) + (self.tail.num_blocks if self.tail else 0)
