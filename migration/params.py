"""Which bounds does a migration have? Every limit, period and retry of both roles, each with its name and default."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """How the KV reaches the destination."""

    LIVE = "live"
    """Copy full blocks while decoding goes on; only the tail is copied while the request stands still."""
    BLOCKING = "blocking"
    """Stop first, then copy everything: the control arm of bench/downtime."""
    RECOMPUTE = "recompute"
    """Stop, copy nothing: the destination computes prompt and output again. Not bit-exact."""


@dataclass(frozen=True, slots=True)
class MigrationParams:
    """Bounds of one migration, as the source drives it."""

    mode: Mode = Mode.LIVE
    max_stages: int = 8
    stop_when_blocks_left: int = 1
    """Stop as soon as at most so many full blocks are not at the destination."""
    slack_blocks: int = 2
    """Room asked for before the stop, for what is decoded between the last look and the stop."""
    lease_s: float = 10.0
    reserve_timeout_s: float = 5.0
    first_push_blocks: int = 16
    """A stage lands in pushes; the first one, of which no rate is known yet, has at most so many blocks."""
    push_growth: int = 4
    """A push has at most so many times the blocks of the one before, however fast that was."""
    push_s: float = 2.0
    """How long a push of a stage shall take, at the rate of the one before: far below `copy_timeout_s`."""
    copy_timeout_s: float = 30.0
    """One push at most; the tail is one push."""
    resend_s: float = 0.5
    """An unanswered message other than `Commit` is sent again this often."""
    commit_retry_s: float = 0.1
    """An unanswered `Commit` is asked again this often, for ever: only an answer or the peer's end decides."""
    max_cancel_sends: int = 4
    """After so many unanswered `Cancel` the lease is trusted to free the destination's blocks."""
    deadline_s: float = 60.0
    """Without progress, that is from the start or the last push of a stage to the next one, or to the first `Commit`;
    past it the migration is cancelled. A copy at a small budget may take longer in all."""
    shutdown_grace_s: float = 2.0
    """A cancelled driver has this long to put a stopped request back."""

    def __post_init__(self) -> None:
        if self.max_stages < 0 or self.stop_when_blocks_left < 0 or self.slack_blocks < 0:
            raise ValueError("max_stages, stop_when_blocks_left and slack_blocks must not be negative")
        if min(self.first_push_blocks, self.push_growth) < 1:
            raise ValueError("first_push_blocks and push_growth must be at least 1")
        if not 0 < self.push_s < self.copy_timeout_s:
            raise ValueError("push_s must be positive and below copy_timeout_s")
        if min(self.resend_s, self.commit_retry_s, self.reserve_timeout_s, self.copy_timeout_s, self.deadline_s) <= 0:
            raise ValueError("every period and time-out must be positive")
        if self.max_cancel_sends < 1 or self.shutdown_grace_s <= 0:
            raise ValueError("max_cancel_sends must be at least 1, shutdown_grace_s positive")
        if self.lease_s <= 2 * self.keepalive_s:
            raise ValueError("lease_s must hold more than two keep-alive periods")

    @property
    def keepalive_s(self) -> float:
        """While blocks are copied the source says something this often, so that the lease lives on."""
        return self.lease_s / 4


@dataclass(frozen=True, slots=True)
class IncomingParams:
    """Bounds of what one destination takes in."""

    max_incoming: int = 8
    """Migrations that may hold blocks at the same time."""
    max_remembered: int = 16_384
    """Ended migrations remembered to answer repeated messages; the longest silent one is forgotten first."""
    max_aborted: int = 4_096
    """Request ids aborted here lately; a migration that would bring one back is refused."""
    max_lease_s: float = 60.0
    """A source that asks for a longer lease gets this one."""
    close_grace_s: float = 2.0

    def __post_init__(self) -> None:
        if min(self.max_incoming, self.max_remembered, self.max_aborted) < 1:
            raise ValueError("every bound must be at least 1")
        if self.max_lease_s <= 0 or self.close_grace_s <= 0:
            raise ValueError("max_lease_s and close_grace_s must be positive")
