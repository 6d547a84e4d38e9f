"""What does the client hear when its request is placed nowhere, or lost? Pure."""

from __future__ import annotations

from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.types import Flight
from orchestrator.policy.admission import Reason, Reject, passed

_KINDS = {Reason.BUSY: FailureKind.BUSY, Reason.NOBODY: FailureKind.NOBODY}


def crowded(num_waiting: int) -> Failure:
    """The answer to one too many."""
    return Failure(FailureKind.BUSY, f"{num_waiting} requests wait already; please retry later")


def impossible(flight: Flight, refusal: str) -> Failure:
    """The answer to one that an instance refused for good: what is asked is wrong, unless it had begun elsewhere."""
    if not flight.output:
        return Failure(FailureKind.IMPOSSIBLE, refusal)
    message = f"the instance that ran this request was lost, and no other can go on with it ({refusal}); please retry"
    return Failure(FailureKind.INSTANCE_LOST, message)


def lost_too_often(flight: Flight) -> Failure:
    """The answer to one that was sent to as many instances as it may be: it may be what they die of."""
    when = "while they ran this request" if flight.output else "before they answered"
    message = f"{flight.attempt} instances were lost {when}; please retry later"
    return Failure(FailureKind.INSTANCE_LOST, message)


def rejection(rejected: Reject) -> Failure:
    """The answer to one that asked to be sent away rather than wait."""
    kind = _KINDS.get(rejected.reason, FailureKind.SLO)
    return Failure(kind, f"{rejected.message}; please retry later", rejected.reason.value, rejected.retry_after_s)


def gave_up(flight: Flight, nobody_because: str | None, now_s: float) -> Failure:
    """The answer to one whose time at the gateway is over. `nobody_because`: why no instance serves, if none does."""
    if nobody_because is not None:
        return Failure(FailureKind.NOBODY, f"{nobody_because}; please retry later")
    rejected = passed(flight.request.asks, now_s - flight.arrived_s)
    if rejected is not None:
        return rejection(rejected)
    why = f" ({flight.last_refusal})" if flight.last_refusal else ""
    return Failure(FailureKind.BUSY, f"every instance is busy{why}; please retry later")
