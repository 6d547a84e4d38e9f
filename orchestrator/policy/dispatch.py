"""Which instance gets a new request? A book of what instances say and of what was sent since, and one pure choice.

The book adds each own dispatch to the instance's load until a report arrives that has seen it, so that a burst between
two reports spreads out instead of herding. It keeps its sums as columns, one row an instance, so that a choice among a
thousand costs a few array operations; tests/support/slow_dispatch.py is the same choice written out, and tests hold the
two together. A choice filters, scores and picks; the instance may still refuse.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from instance.lifecycle import State
from instance.messages import LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.load import LoadParams, virtual_usage_blocks

MAX_SEEN_KEPT = 4096
"""Dispatches that have been seen are dropped from the list by age once there are so many."""


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


def demand_blocks(num_prompt_tokens: int, block_size: int) -> int:
    """Blocks the request needs to give its first token."""
    return -(-(num_prompt_tokens + 1) // max(1, block_size))


@dataclass(frozen=True, slots=True)
class _Dispatch:
    sequence: int
    demand_blocks: int


@dataclass(slots=True)
class _Entry:
    """A member."""

    epoch: Epoch
    row: int = -1
    """Its place in the columns."""
    report: LoadReport | None = None
    reported_s: float = -math.inf
    last_sequence: int = 0
    unseen: deque[_Dispatch] = field(default_factory=deque)
    unseen_blocks: int = 0


class _Columns:
    """Of each member, in order of its id: what a choice needs to know."""

    def __init__(self, entries: list[_Entry], params: LoadParams) -> None:
        self._params = params
        size = len(entries)
        self.reported_s = _column(size)
        self.total = _column(size)
        self.usage = _column(size)
        self.head_of_line = _column(size)
        self.waiting = _column(size)
        self.running = _column(size)
        self.unseen = _column(size)
        self.unseen_blocks = _column(size)
        for entry in entries:
            self.write(entry)

    def write(self, entry: _Entry) -> None:
        """What is known of it now. Usage is infinite where it does not serve."""
        row, report = entry.row, entry.report
        self.write_unseen(entry)
        self.reported_s[row] = entry.reported_s
        if report is None:
            self.usage[row] = math.inf
            return
        self.total[row] = report.total_blocks
        self.usage[row] = virtual_usage_blocks(report, self._params)
        self.head_of_line[row] = report.head_of_line_blocks
        self.waiting[row] = max(report.waiting_blocks, report.head_of_line_blocks)
        self.running[row] = report.num_running

    def write_unseen(self, entry: _Entry) -> None:
        """Of what is known of it, the part that a dispatch changes."""
        self.unseen[entry.row], self.unseen_blocks[entry.row] = len(entry.unseen), entry.unseen_blocks

    def scores(self, demand_blocks: int) -> npt.NDArray[np.float64]:
        """Freeness of each with own dispatches and this request on it, in decode steps; higher is better.

        When that would be negative the request has to wait, and the score is minus the blocks short for *everything*
        that waits there. Freeness itself would mislead: it ignores all but the head of the queue, and dividing a
        negative number by a larger batch makes the fuller instance look better.
        """
        spare = self.total - self.usage - (self.unseen_blocks + demand_blocks)
        steps = spare / np.maximum(1.0, self.running + self.unseen + 1.0)
        short = spare + self.head_of_line - self.waiting
        scores: npt.NDArray[np.float64] = np.where(spare >= 0, steps, short)
        return scores


def _column(size: int) -> Any:
    return np.zeros(size, dtype=np.float64)


class DispatchBook:
    """What each member last reported, and what was dispatched to it since. Members come and go by `set_members`."""

    def __init__(
        self, params: DispatchParams | None = None, max_unseen: int = 4096, unseen_for_s: float = 10.0
    ) -> None:
        """`max_unseen`: dispatches of one instance remembered without a report. `unseen_for_s`: and for how long."""
        self._params = params or DispatchParams()
        self._entries: dict[InstanceId, _Entry] = {}
        self._names: list[InstanceId] = []
        self._columns = _Columns([], self._params.load)
        self._max_unseen = max_unseen
        self._unseen_for_s = unseen_for_s
        self._sent: deque[tuple[float, InstanceId, Epoch, int]] = deque()
        """(when, to whom, sequence), oldest first: what may have to be forgotten. Some have been seen since."""
        self._num_unseen = 0

    # ---- members and what they say
    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Keep only these; a new epoch starts with an empty page."""
        kept = dict(members)
        gone = [name for name, entry in self._entries.items() if kept.get(name) != entry.epoch]
        if gone:
            self._sent = deque(sent for sent in self._sent if sent[1] not in gone)
        self._entries = {
            name: known
            if (known := self._entries.get(name)) is not None and known.epoch == kept[name]
            else _Entry(kept[name])
            for name in sorted(kept)
        }
        self._names = list(self._entries)
        for row, entry in enumerate(self._entries.values()):
            entry.row = row
        self._num_unseen = sum(len(entry.unseen) for entry in self._entries.values())
        self._columns = _Columns(list(self._entries.values()), self._params.load)
        self._drop_seen()

    def on_report(self, report: LoadReport, now_s: float) -> bool:
        """Take a report in. False: it is from no member, or older than the last one."""
        entry = self._entries.get(InstanceId(report.instance))
        if entry is None or entry.epoch != report.epoch:
            return False
        if entry.report is not None and report.step < entry.report.step:
            return False
        entry.report, entry.reported_s = report, now_s
        while entry.unseen and entry.unseen[0].sequence <= report.submits_seen:
            self._forget_oldest(entry)
        self._columns.write(entry)
        self._drop_seen()
        return True

    def on_dispatched(self, instance: InstanceId, demand_blocks: int, now_s: float) -> int:
        """Count a dispatch to a member and return its sequence number, from 1."""
        entry = self._entries[instance]
        entry.last_sequence += 1
        entry.unseen.append(_Dispatch(entry.last_sequence, demand_blocks))
        entry.unseen_blocks += demand_blocks
        self._num_unseen += 1
        if len(entry.unseen) > self._max_unseen:
            self._forget_oldest(entry)
        self._sent.append((now_s, instance, entry.epoch, entry.last_sequence))
        self._drop_seen()
        self._columns.write_unseen(entry)
        return entry.last_sequence

    def on_not_taken(self, instance: InstanceId, epoch: Epoch, sequence: int) -> None:
        """A dispatch was refused: it is no load any more."""
        entry = self._entries.get(instance)
        if entry is None or entry.epoch != epoch:
            return
        kept = deque(sent for sent in entry.unseen if sent.sequence != sequence)
        self._num_unseen -= len(entry.unseen) - len(kept)
        entry.unseen, entry.unseen_blocks = kept, sum(sent.demand_blocks for sent in kept)
        self._columns.write(entry)
        self._drop_seen()

    # ---- what is known
    def has_said_farewell(self, instance: InstanceId, epoch: Epoch) -> bool:
        """Its last word was that it drains and that nothing is left on it: nothing can have come there since."""
        entry = self._entries.get(instance)
        if entry is None or entry.epoch != epoch or entry.report is None:
            return False
        last = entry.report
        num_there = last.num_running + last.num_waiting + last.migrations_in + last.migrations_out
        return last.state == State.DRAINING.value and num_there == 0

    @property
    def block_size(self) -> int:
        """Tokens of a block, as instances report it; 16 before any does."""
        reports = (entry.report for entry in self._entries.values())
        return next((report.block_size for report in reports if report is not None), 16)

    def choose(self, demand_blocks: int, now_s: float, excluded: Collection[InstanceId] = ()) -> Choice | NoChoice:
        """Pick the instance whose freeness with this request on it is highest; ties by fewest dispatched, then by id.

        An instance it can never fit on is only asked when there is no other: its refusal then says so to the client.
        """
        self._forget_late(now_s)
        columns = self._columns
        serving = np.isfinite(columns.usage)
        fresh = serving & (now_s - columns.reported_s <= self._params.max_report_age_s)
        candidates = fresh.copy() if excluded else fresh
        for name in excluded:
            if (entry := self._entries.get(name)) is not None:
                candidates[entry.row] = False
        num_candidates = int(np.count_nonzero(candidates))
        if not num_candidates:
            num_fresh = int(np.count_nonzero(fresh))
            why = _why_nobody(self.view(now_s), int(np.count_nonzero(serving)), num_fresh)
            return NoChoice(why, any_serving=bool(num_fresh))
        large_enough = candidates & (columns.total >= demand_blocks)
        scores = np.where(large_enough if large_enough.any() else candidates, columns.scores(demand_blocks), -math.inf)
        best = np.flatnonzero(scores == scores.max())
        row = int(best[np.argmin(columns.unseen[best])])
        name = self._names[row]
        entry = self._entries[name]
        dispatched = f"{len(entry.unseen)} dispatched since its report"
        reason = f"score {float(scores[row]):.2f} highest of {num_candidates} ({dispatched})"
        return Choice(name, entry.epoch, reason, max(0.0, now_s - entry.reported_s))

    def view(self, now_s: float) -> ClusterView:
        """What is known now, in order of instance id; members without a report are left out."""
        self._forget_late(now_s)
        return ClusterView(
            tuple(
                InstanceView(
                    name,
                    entry.epoch,
                    entry.report,
                    max(0.0, now_s - entry.reported_s),
                    len(entry.unseen),
                    entry.unseen_blocks,
                )
                for name, entry in self._entries.items()
                if entry.report is not None
            )
        )

    # ---- what is forgotten
    def _forget_late(self, now_s: float) -> None:
        """Of an instance that reports no count: forget rather than shun it for ever."""
        while self._sent and now_s - self._sent[0][0] > self._unseen_for_s:
            _, instance, epoch, sequence = self._sent.popleft()
            entry = self._entries.get(instance)
            if entry is None or entry.epoch != epoch:
                continue
            while entry.unseen and entry.unseen[0].sequence <= sequence:
                self._forget_oldest(entry)
            self._columns.write(entry)
        self._drop_seen()

    def _forget_oldest(self, entry: _Entry) -> None:
        entry.unseen_blocks -= entry.unseen.popleft().demand_blocks
        self._num_unseen -= 1

    def _drop_seen(self) -> None:
        """Keep the list of what was sent in proportion to what is unseen of it."""
        if len(self._sent) <= 2 * self._num_unseen + MAX_SEEN_KEPT:
            return
        unseen = {(name, entry.epoch, sent.sequence) for name, entry in self._entries.items() for sent in entry.unseen}
        self._sent = deque(sent for sent in self._sent if sent[1:] in unseen)

    def check_integrity(self) -> None:
        """Raise AssertionError unless sequences rise, bounds hold and the sums are those of what they stand for."""
        for row, (name, entry) in enumerate(self._entries.items()):
            sequences = [sent.sequence for sent in entry.unseen]
            assert sequences == sorted(set(sequences)), "sequences must rise"
            assert len(sequences) <= self._max_unseen, "unseen dispatches are bounded"
            assert not sequences or sequences[-1] <= entry.last_sequence
            assert entry.unseen_blocks == sum(sent.demand_blocks for sent in entry.unseen)
            assert (entry.row, self._names[row]) == (row, name)
        assert list(self._entries) == sorted(self._entries)
        assert self._num_unseen == sum(len(entry.unseen) for entry in self._entries.values())
        assert len(self._sent) <= 2 * self._num_unseen + MAX_SEEN_KEPT
        fresh = _Columns(list(self._entries.values()), self._params.load)
        for column, values in vars(fresh).items():
            assert column == "_params" or np.array_equal(values, getattr(self._columns, column)), f"{column} is stale"


def _why_nobody(view: ClusterView, num_serving: int, num_fresh: int) -> str:
    if not view.instances:
        return "no instance is ready yet"
    if not num_serving:
        states = ", ".join(f"{seen.instance} is {seen.report.state}" for seen in view.instances[:8])
        return f"no instance serves ({states})"
    if not num_fresh:
        return "no instance has reported lately"
    return f"each of the {num_fresh} serving instances has refused it"
