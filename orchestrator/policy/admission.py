"""Is a request taken, does it wait, or is it sent away? One pure verdict on what dispatch found.

A request says what is to be done when its targets cannot be met (`x-kvferry-on-overload`):

- `queue`, the default: it is never sent away for its targets. If no instance is predicted to meet them, it goes to the
  freest one and waits in that queue; if every instance refuses it, it waits at the gateway for as long as its TTFT
  target allows, and at least as long as any request may.
- `reject`: if no instance is predicted to meet them now, or every one refuses it, it is answered 429 at once, with the
  time after which the best one should do; at the gateway it waits only where nobody serves, and not beyond its target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from orchestrator.policy.dispatch import Choice, NoChoice
from orchestrator.policy.targets import NO_TARGETS, Targets

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
MAX_PATIENCE_S = 60.0
"""A request waits at the gateway no longer, whatever its target: there it takes the place of others, and each retry
costs."""


class OnOverload(Enum):
    """What is to be done with a request whose targets cannot be met."""

    QUEUE = "queue"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Asks:
    """What a request asks for, beside its answer."""

    targets: Targets = NO_TARGETS
    on_overload: OnOverload = OnOverload.QUEUE


NO_ASKS = Asks()


class Reason(Enum):
    """Why it was sent away, or waits; what `x-kvferry-reason` says."""

    TTFT = "slo_ttft"
    """No instance is predicted to give the first token in time."""
    TPOT = "slo_tpot"
    """No instance is predicted to give the further tokens as fast."""
    TTFT_PASSED = "slo_ttft_passed"
    """It waited at the gateway until its TTFT target had passed."""
    BUSY = "busy"
    """Instances serve, and each refused it."""
    NOBODY = "nobody"
    """No instance serves."""


@dataclass(frozen=True, slots=True)
class Admit:
    choice: Choice


@dataclass(frozen=True, slots=True)
class Queue:
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Reject:
    reason: Reason
    message: str
    retry_after_s: float


def admit(asks: Asks, found: Choice | NoChoice, waited_s: float) -> Admit | Queue | Reject:
    """`waited_s`: since it arrived at the gateway; `found` was predicted for what is left of the target."""
    if isinstance(found, NoChoice):
        return defer(asks, found)
    targets, predicted = asks.targets, found.predicted
    if asks.on_overload is OnOverload.QUEUE or predicted is None or predicted.meets:
        return Admit(found)
    left_s = targets.after(waited_s).ttft_s
    if left_s is not None and left_s <= 0.0:
        return Reject(Reason.TTFT_PASSED, _passed(targets, waited_s), MIN_RETRY_AFTER_S)
    if left_s is not None and predicted.ttft_s > left_s:
        why = (
            f"the first token is predicted in {_ms(waited_s + predicted.ttft_s)}, {_ms(targets.ttft_s)} were asked for"
        )
        return Reject(Reason.TTFT, why, retry_after_s(predicted.ttft_s - left_s))
    why = f"further tokens are predicted every {_ms(predicted.tpot_s)}, {_ms(targets.tpot_s)} were asked for"
    return Reject(Reason.TPOT, why, retry_after_s(predicted.one_ends_s))


def defer(asks: Asks, found: NoChoice) -> Queue | Reject:
    """Of one that goes to no instance now."""
    reason = Reason.BUSY if found.any_serving else Reason.NOBODY
    if asks.on_overload is OnOverload.REJECT and found.any_serving:
        return Reject(reason, found.reason, MIN_RETRY_AFTER_S)
    return Queue(reason, found.reason)


def patience_s(asks: Asks, timeout_s: float) -> float:
    """How long it may wait at the gateway, `timeout_s` being what a request may that asks for nothing."""
    if asks.targets.ttft_s is None:
        return timeout_s
    if asks.on_overload is OnOverload.REJECT:
        return min(timeout_s, asks.targets.ttft_s)
    return max(timeout_s, min(asks.targets.ttft_s, MAX_PATIENCE_S))


def passed(asks: Asks, waited_s: float) -> Reject | None:
    """The answer to one whose patience has ended, if its target is why. None: the ordinary reasons hold."""
    ttft_s = asks.targets.ttft_s
    if asks.on_overload is not OnOverload.REJECT or ttft_s is None or waited_s < ttft_s:
        return None
    return Reject(Reason.TTFT_PASSED, _passed(asks.targets, waited_s), MIN_RETRY_AFTER_S)


def retry_after_s(seconds: float) -> float:
    """Whole seconds, bounded: a prediction is no promise."""
    return float(math.ceil(min(max(seconds, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)))


def _passed(targets: Targets, waited_s: float) -> str:
    return f"it waited {_ms(waited_s)} for an instance, its first token was asked for in {_ms(targets.ttft_s)}"


def _ms(seconds: float | None) -> str:
    return f"{(seconds or 0.0) * 1e3:.0f} ms"
