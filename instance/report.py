"""What does an instance tell about its load, and who is due a report now?"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from instance.lifecycle import State
from instance.messages import NO_STEPS, WIDE_STEP_TOKENS, LoadReport, StepTotals
from instance.types import EngineLoad, StepWork

REPORT_INTERVAL_S = 0.1
REQUEST_REPORT_INTERVAL_S = 0.25
MIN_PAUSE_S = 0.005
"""Between two looks at who is due, whatever the clock's rounding."""
MAX_REPORTED_REQUESTS = 4096
"""Of one instance; a report that has so many may leave some out."""
MAX_SUBSCRIBERS = 256
MAX_LEASE_S = 60.0
STEP_TIME_WEIGHT = 0.1
"""Weight of the newest step in the smoothed step time: about the last twenty steps count."""


class Standing(msgspec.Struct, frozen=True):
    """What a report says beside the engine's load."""

    instance: str
    epoch: int
    step: int
    state: State
    block_size: int
    total_blocks: int
    step_time_s: float
    migrations_in: int
    migrations_out: int
    steps: StepTotals = NO_STEPS
    max_step_tokens: int = 0
    max_running: int = 0


def load_report(standing: Standing, load: EngineLoad, submits_seen: int) -> LoadReport:
    return LoadReport(
        instance=standing.instance,
        epoch=standing.epoch,
        step=standing.step,
        state=standing.state.value,
        block_size=standing.block_size,
        total_blocks=standing.total_blocks,
        free_blocks=load.free_blocks,
        reserved_blocks=load.reserved_blocks,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        running_by_priority=load.running_by_priority,
        head_of_line_blocks=load.head_of_line_blocks,
        waiting_blocks=load.waiting_blocks,
        step_time_s=standing.step_time_s,
        num_preemptions=load.num_preemptions,
        migrations_in=standing.migrations_in,
        migrations_out=standing.migrations_out,
        submits_seen=submits_seen,
        steps=standing.steps,
        max_step_tokens=standing.max_step_tokens,
        max_running=standing.max_running,
    )


def add_step(totals: StepTotals, work: StepWork, elapsed_s: float) -> StepTotals:
    """The totals with one more step (or several alike, which took so long together). Not counted: one that computed
    nothing, or whose clock did not move."""
    num_tokens = work.num_prefill_tokens + work.num_decode_tokens
    if num_tokens == 0 or elapsed_s <= 0.0:
        return totals
    return StepTotals(
        totals.num_steps + work.num_steps,
        totals.num_prefill_tokens + work.num_prefill_tokens,
        totals.num_decode_tokens + work.num_decode_tokens,
        totals.num_wide_tokens + max(0, num_tokens - work.num_steps * WIDE_STEP_TOKENS),
        totals.num_decoding + work.num_decoding,
        totals.num_context_tokens + work.num_context_tokens,
        totals.num_attended_pairs + work.num_attended_pairs,
        totals.busy_s + elapsed_s,
    )


def smooth_step_time(previous_s: float, observed_s: float, num_decoding: int, num_steps: int = 1) -> float:
    """Exponentially weighted mean over the steps that decoded; the first one counts whole. `num_steps`: so many, which
    took `observed_s` each."""
    if num_decoding == 0:
        return previous_s
    if previous_s == 0.0:
        return observed_s
    return observed_s + (1.0 - STEP_TIME_WEIGHT) ** num_steps * (previous_s - observed_s)


@dataclass(slots=True)
class _Subscription:
    expires_s: float
    with_requests: bool
    last_report_s: float
    last_requests_s: float
    interval_s: float
    """Between two load reports."""
    requests_interval_s: float


class Subscribers:
    """Who wants this instance's reports, until when, and who is due one. At most MAX_SUBSCRIBERS: stalest out."""

    def __init__(self) -> None:
        self._by_address: OrderedDict[str, _Subscription] = OrderedDict()
        self._submits_seen: OrderedDict[str, int] = OrderedDict()

    def subscribe(
        self, address: str, lease_s: float, with_requests: bool, now_s: float, interval_s: float = 0.0
    ) -> None:
        """`interval_s`: see `Subscribe.interval_s`."""
        expires_s = now_s + min(max(lease_s, 0.0), MAX_LEASE_S)
        known = self._by_address.get(address)
        never_s = now_s - MAX_LEASE_S
        last_s = (never_s, never_s) if known is None else (known.last_report_s, known.last_requests_s)
        wanted_s = min(interval_s, MAX_LEASE_S)
        intervals_s = max(REPORT_INTERVAL_S, wanted_s), max(REQUEST_REPORT_INTERVAL_S, wanted_s)
        self._by_address[address] = _Subscription(expires_s, with_requests, *last_s, *intervals_s)
        self._by_address.move_to_end(address)
        while len(self._by_address) > MAX_SUBSCRIBERS:
            self._by_address.popitem(last=False)

    def report_sent(self, address: str, now_s: float) -> None:
        subscription = self._by_address.get(address)
        if subscription is not None:
            subscription.last_report_s = now_s

    def take_due(self, now_s: float) -> tuple[str, ...]:
        """Addresses whose last report is as old as they want; each counts as sent to now. Ended leases go."""
        self._drop_ended(now_s)
        due = [a for a, s in self._by_address.items() if now_s - s.last_report_s >= s.interval_s - 1e-6]
        for address in due:
            self._by_address[address].last_report_s = now_s
        return tuple(due)

    def take_due_requests(self, now_s: float) -> tuple[str, ...]:
        """Addresses that want `RequestReport`s and are due one; each counts as sent to now."""
        self._drop_ended(now_s)
        due = [
            address
            for address, s in self._by_address.items()
            if s.with_requests and now_s - s.last_requests_s >= s.requests_interval_s - 1e-6
        ]
        for address in due:
            self._by_address[address].last_requests_s = now_s
        return tuple(due)

    def due_in_s(self, now_s: float) -> float:
        """Until `take_due` may find somebody: between MIN_PAUSE_S and REPORT_INTERVAL_S."""
        due_s = min((s.last_report_s + s.interval_s for s in self._by_address.values()), default=math.inf)
        return min(max(due_s - now_s, MIN_PAUSE_S), REPORT_INTERVAL_S)

    def requests_due_in_s(self, now_s: float) -> float:
        """Until `take_due_requests` may: MIN_PAUSE_S at least; soon, while nobody wants to hear of requests."""
        due_s = [s.last_requests_s + s.requests_interval_s for s in self._by_address.values() if s.with_requests]
        if not due_s:
            return REPORT_INTERVAL_S
        return min(max(min(due_s) - now_s, MIN_PAUSE_S), REQUEST_REPORT_INTERVAL_S)

    def make_all_due(self, now_s: float) -> None:
        """A state changed: everyone hears of it at the next turn."""
        for subscription in self._by_address.values():
            subscription.last_report_s = now_s - subscription.interval_s

    def submit_seen(self, gateway_address: str, sequence: int) -> None:
        seen = self._submits_seen.pop(gateway_address, 0)
        self._submits_seen[gateway_address] = max(seen, sequence)
        while len(self._submits_seen) > MAX_SUBSCRIBERS:
            self._submits_seen.popitem(last=False)

    def submits_seen(self, gateway_address: str) -> int:
        return self._submits_seen.get(gateway_address, 0)

    def addresses(self) -> tuple[str, ...]:
        return tuple(self._by_address)

    def _drop_ended(self, now_s: float) -> None:
        for address in [a for a, s in self._by_address.items() if s.expires_s <= now_s]:
            del self._by_address[address]
