"""What can go wrong at a gateway, and what is the client told?"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class GatewayError(Exception):
    """A gateway cannot start; the text is one line that says what to do about it."""


class FailureKind(Enum):
    """Why a request ended without an answer; each is a metric label and has one HTTP status."""

    NOBODY = "nobody"
    """No instance serves."""
    BUSY = "busy"
    """Instances serve, all refused it for as long as it may wait."""
    IMPOSSIBLE = "impossible"
    """No instance could ever run it."""
    INSTANCE_LOST = "instance_lost"
    """Its instance died after its first token."""
    TOKENS_LOST = "tokens_lost"
    """Tokens are missing and do not come."""
    STOPPING = "stopping"
    """This gateway is being stopped."""
    CANCELLED = "cancelled"
    """The operator ended it."""
    SLO = "slo"
    """It asked to be rejected when its targets cannot be met, and they cannot."""

    @property
    def http_status(self) -> int:
        """What the client gets where no token has been sent."""
        if self is FailureKind.IMPOSSIBLE:
            return 400
        if self is FailureKind.CANCELLED:
            return 410
        return 429 if self in (FailureKind.BUSY, FailureKind.SLO) else 503


@dataclass(frozen=True, slots=True)
class Failure:
    kind: FailureKind
    message: str
    """One line for the client."""
    reason: str = ""
    """For programs, in `x-kvferry-reason`; empty: the kind's value."""
    retry_after_s: float = 1.0
