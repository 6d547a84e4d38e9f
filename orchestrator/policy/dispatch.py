"""Which instance gets a new request? A book of what instances say and of what was sent since, and one pure choice.

The book adds each own dispatch to the instance's load until a report arrives that has seen it, so that a burst between
two reports spreads out instead of herding. `choose_instance` filters, scores and picks; the instance may still refuse.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from instance.lifecycle import State
from instance.messages import LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.load import LoadParams, virtual_usage_blocks


@dataclass(frozen=True, slots=True)
class DispatchParams:
    max_report_age_s: float = 3.0
    """An instance that has said nothing for so long gets no new request."""
    load: LoadParams = field(default_factory=LoadParams)


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the dispatcher sees it now."""

    instance: InstanceId
    epoch: Epoch
    report: LoadReport
    report_age_s: float
    num_dispatched: int
    """Own dispatches no report has seen yet."""
    dispatched_blocks: int
    """Their demand."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    instances: tuple[InstanceView, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    instance: InstanceId
    epoch: Epoch
    reason: str
    signal_age_s: float
    """Age of the report the choice rests on."""


@dataclass(frozen=True, slots=True)
class NoChoice:
    """Nobody can take it now, and why."""

    reason: str
    any_serving: bool
    """True: instances serve, but each was excluded or is stale. False: nobody is there."""


def choose_instance(
    view: ClusterView,
    request_demand_blocks: int,
    params: DispatchParams,
    excluded: Collection[InstanceId] = (),
) -> Choice | NoChoice:
    """Pick the instance whose freeness with this request on it is highest; ties by fewest dispatched, then by id."""
    serving = [seen for seen in view.instances if seen.report.state == State.SERVING.value]
    fresh = [seen for seen in serving if seen.report_age_s <= params.max_report_age_s]
    candidates = [seen for seen in fresh if seen.instance not in excluded]
    if not candidates:
        return NoChoice(_why_nobody(view, len(serving), len(fresh)), any_serving=bool(fresh))
    # An instance it can never fit on is only asked when there is no other: its refusal then says so to the client.
    large_enough = [seen for seen in candidates if seen.report.total_blocks >= request_demand_blocks]
    best = min(
        large_enough or candidates,
        key=lambda seen: (-score(seen, request_demand_blocks, params), seen.num_dispatched, seen.instance),
    )
    reason = (
        f"score {score(best, request_demand_blocks, params):.2f} highest of {len(candidates)}"
        f" ({best.num_dispatched} dispatched since its report)"
    )
    return Choice(best.instance, best.epoch, reason, best.report_age_s)


def score(seen: InstanceView, demand_blocks: int, params: DispatchParams) -> float:
    """Freeness of the instance with own dispatches and this request on it, in decode steps; higher is better.

    When that would be negative the request has to wait, and the score is minus the blocks short for *everything* that
    waits here. Freeness itself would mislead there: it ignores all but the head of the queue, and dividing a negative
    number by a larger batch makes the fuller instance look better.
    """
    usage = virtual_usage_blocks(seen.report, params.load)
    if math.isinf(usage):
        return -math.inf
    added = seen.dispatched_blocks + demand_blocks
    spare = seen.report.total_blocks - usage - added
    if spare >= 0:
        return spare / max(1, seen.report.num_running + seen.num_dispatched + 1)
    return spare + seen.report.head_of_line_blocks - max(seen.report.waiting_blocks, seen.report.head_of_line_blocks)


def demand_blocks(num_prompt_tokens: int, view: ClusterView) -> int:
    """Blocks the request needs to give its first token; by the block size instances report (16 before any does)."""
    block_size = view.instances[0].report.block_size if view.instances else 16
    return -(-(num_prompt_tokens + 1) // max(1, block_size))


def _why_nobody(view: ClusterView, num_serving: int, num_fresh: int) -> str:
    if not view.instances:
        return "no instance is ready yet"
    if not num_serving:
        states = ", ".join(f"{seen.instance} is {seen.report.state}" for seen in view.instances[:8])
        return f"no instance serves ({states})"
    if not num_fresh:
        return "no instance has reported lately"
    return f"each of the {num_fresh} serving instances has refused it"


@dataclass(frozen=True, slots=True)
class _Dispatch:
    sequence: int
    demand_blocks: int
    at_s: float


@dataclass(slots=True)
class _Entry:
    epoch: Epoch
    report: LoadReport | None = None
    reported_s: float = 0.0
    last_sequence: int = 0
    unseen: deque[_Dispatch] = field(default_factory=deque)


class DispatchBook:
    """What each member last reported, and what was dispatched to it since. Members come and go by `set_members`."""

    def __init__(self, max_unseen: int = 4096, unseen_for_s: float = 10.0) -> None:
        self._entries: dict[InstanceId, _Entry] = {}
        self._max_unseen = max_unseen
        self._unseen_for_s = unseen_for_s

    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Keep only these; a new epoch starts with an empty page."""
        kept = dict(members)
        for instance in [known for known in self._entries if known not in kept]:
            del self._entries[instance]
        for instance, epoch in kept.items():
            entry = self._entries.get(instance)
            if entry is None or entry.epoch != epoch:
                self._entries[instance] = _Entry(epoch)

    def on_report(self, report: LoadReport, now_s: float) -> bool:
        """Take a report in. False: it is from no member, or older than the last one."""
        entry = self._entries.get(InstanceId(report.instance))
        if entry is None or entry.epoch != report.epoch:
            return False
        if entry.report is not None and report.step < entry.report.step:
            return False
        entry.report, entry.reported_s = report, now_s
        while entry.unseen and entry.unseen[0].sequence <= report.submits_seen:
            entry.unseen.popleft()
        return True

    def on_dispatched(self, instance: InstanceId, demand_blocks: int, now_s: float) -> int:
        """Count a dispatch to a member and return its sequence number, from 1."""
        entry = self._entries[instance]
        entry.last_sequence += 1
        entry.unseen.append(_Dispatch(entry.last_sequence, demand_blocks, now_s))
        if len(entry.unseen) > self._max_unseen:
            entry.unseen.popleft()
        return entry.last_sequence

    def on_not_taken(self, instance: InstanceId, epoch: Epoch, sequence: int) -> None:
        """A dispatch was refused: it is no load any more."""
        entry = self._entries.get(instance)
        if entry is not None and entry.epoch == epoch:
            entry.unseen = deque(sent for sent in entry.unseen if sent.sequence != sequence)

    def view(self, now_s: float) -> ClusterView:
        """What is known now, in order of instance id; members without a report are left out."""
        seen: list[InstanceView] = []
        for instance in sorted(self._entries):
            entry = self._entries[instance]
            while entry.unseen and now_s - entry.unseen[0].at_s > self._unseen_for_s:
                entry.unseen.popleft()  # its instance reports no count: forget rather than shun it for ever
            if entry.report is None:
                continue
            blocks = sum(sent.demand_blocks for sent in entry.unseen)
            age_s = max(0.0, now_s - entry.reported_s)
            seen.append(InstanceView(instance, entry.epoch, entry.report, age_s, len(entry.unseen), blocks))
        return ClusterView(tuple(seen))

    def check_integrity(self) -> None:
        """Raise AssertionError unless sequences rise and bounds hold."""
        for entry in self._entries.values():
            sequences = [sent.sequence for sent in entry.unseen]
            assert sequences == sorted(set(sequences)), "sequences must rise"
            assert len(sequences) <= self._max_unseen, "unseen dispatches are bounded"
            assert not sequences or sequences[-1] <= entry.last_sequence
