"""What does a choice among a thousand instances need to know of each? Columns, one row an instance, kept up to date.

Whatever only changes with a report or a dispatch is worked out when that comes, so that a choice is a dozen array
operations whatever the size of the fleet, and mostly not even those (`shortlist.py`, `python -m bench.decide`).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from instance.messages import LoadReport
from migration.types import Epoch
from orchestrator.policy.load import LoadParams, growth_blocks_per_s, running_blocks, virtual_usage_blocks
from orchestrator.policy.shortlist import Highest, Line, Shortlist, SlowStart

Scores = npt.NDArray[np.float64]
"""One of each row."""
NUM_UNASKED = 16
"""Choices after one that the shortlist could not make: a fleet that is even, or full, is so for a while."""


class Rule(Enum):
    """By what an instance is chosen among those that can take a request."""

    FREENESS = "freeness"
    """The one with the most decode steps left with it."""
    ROUND_ROBIN = "round-robin"
    """Each in turn, whatever its load: what the other is measured against (`bench/policy_live.py`)."""


@dataclass(frozen=True, slots=True)
class DispatchParams:
    rule: Rule = Rule.FREENESS
    max_report_age_s: float = 3.0
    """An instance that has said nothing for so long gets no new request."""
    slow_start_s: float = 10.0
    """From its first report on an instance's share rises for so long: its caches are cold and its speed is not known.
    0: it gets its whole share at once."""
    slow_start_share: float = 0.1
    """The part of its freeness that counts in the beginning."""
    prefix_weight: float = 1.0
    """Blocks of running requests that a cached block of the prompt outweighs: a block is a block, whether it need not
    be computed or need not be held. 0: prefixes do not count, nobody is asked for them."""
    load: LoadParams = field(default_factory=LoadParams)

    @property
    def heeds_prefixes(self) -> bool:
        return self.prefix_weight > 0 and self.rule is not Rule.ROUND_ROBIN


class Dispatch(msgspec.Struct, frozen=True, gc=False):
    sequence: int
    demand_blocks: int
    level: int | None = None
    """Rank of its level of priority, if that has headroom."""


@dataclass(slots=True)
class Entry:
    """A member."""

    epoch: Epoch
    row: int = -1
    """Its place in the columns."""
    report: LoadReport | None = None
    reported_s: float = -math.inf
    first_report_s: float = -math.inf
    last_sequence: int = 0
    unseen: deque[Dispatch] = field(default_factory=deque)
    unseen_blocks: int = 0


class Columns:
    """The rows of these members, in the order given. Sizes in blocks, times in seconds."""

    def __init__(self, entries: Sequence[Entry], params: DispatchParams, num_gateways: int) -> None:
        self._params = params
        self._num_gateways = num_gateways
        size = len(entries)
        self.spare = _column(size, -math.inf)
        """Free of virtual usage and of own dispatches when the report was made; -inf: it is not to be chosen."""
        self.growth_per_s = _column(size, 0.0)
        self.reported_s = _column(size, 0.0)
        self.batch = _column(size, 1.0)
        """Requests that would run there with this one."""
        self.requests_per_block = _column(size, 0.0)
        """Of the blocks that they use, or will."""
        self.behind = _column(size, 0.0)
        """Minus what waits behind the first of the queue."""
        self.total = _column(size, 0.0)
        self.unseen = _column(size, 0.0)
        self.unseen_blocks = _column(size, 0.0)
        self.first_report_s = _column(size, -math.inf)
        self._headroom = {rank: blocks for rank, blocks in params.load.headroom_blocks if blocks > 0}
        self.brought = {rank: _column(size, float(blocks)) for rank, blocks in self._headroom.items()}
        """By level: what a request of it would take beside its demand. 0 where one of its level runs or was sent."""
        self.num_usable = 0
        """Rows that may be chosen: they serve, and their reports are fresh."""
        self._usable = [False] * size
        self._lines: list[Line | None] = [None] * size
        """Of rows that have reported."""
        self._slow_start = SlowStart(params.slow_start_s, params.slow_start_share)
        self._shortlist = Shortlist(self._slow_start)
        self._num_unasked = 0
        """Choices for which the shortlist is not asked from now on."""
        self._smallest = 0.0
        """Of all totals."""
        self._largest_batch = 1
        self._by_age: OrderedDict[int, None] = OrderedDict()
        """Rows with a fresh report, the oldest report first."""
        reported = [entry for entry in entries if entry.report is not None]
        for entry in sorted(reported, key=lambda entry: entry.reported_s):
            self.write_report(entry)

    # ---- what is written
    def write_report(self, entry: Entry) -> None:
        """A report came."""
        report, row = entry.report, entry.row
        if report is None:
            return
        self._by_age[row] = None
        self._by_age.move_to_end(row)
        line = self._lines[row]
        if line is None:
            line = self._lines[row] = Line(entry.first_report_s)
            self.first_report_s[row] = entry.first_report_s
            self._slow_start.add(entry.first_report_s)
        line.reported_s = self.reported_s[row] = entry.reported_s
        line.growth_per_s = self.growth_per_s[row] = growth_blocks_per_s(report)
        line.num_running = report.num_running
        line.running_blocks = running_blocks(report)
        # As in the columns: an integer beyond 2**53 would be another number there.
        line.free = float(report.total_blocks - virtual_usage_blocks(report, self._params.load))
        self.behind[row] = report.head_of_line_blocks - max(report.waiting_blocks, report.head_of_line_blocks)
        if self.total[row] != report.total_blocks:
            self.total[row] = report.total_blocks
            self._smallest = float(self.total.min())
        self.write_load(entry)

    def write_load(self, entry: Entry) -> None:
        """A report or a dispatch changed what is on it."""
        row = entry.row
        line = self._lines[row]
        if line is None or row not in self._by_age:
            return
        # The other gateways see the same reports and choose as this one does: until an instance reports again, each is
        # taken to have sent it as much. Otherwise every gateway would fill the same gap, each believing it is alone.
        num_unseen, unseen_blocks = len(entry.unseen) * self._num_gateways, entry.unseen_blocks * self._num_gateways
        running = line.num_running + num_unseen
        line.spare = line.free - unseen_blocks
        if self._headroom:
            line.spare -= self._write_headroom(entry)
        batch_before, line.batch = line.batch, max(1, running + 1)
        self.batch[row] = line.batch
        if line.batch >= self._largest_batch:
            self._largest_batch = line.batch
        elif batch_before == self._largest_batch:
            self._largest_batch = int(self.batch.max())
        self.unseen[row], self.unseen_blocks[row] = num_unseen, unseen_blocks
        self.requests_per_block[row] = running / max(1, line.running_blocks + unseen_blocks)
        self._on_spare(row, line)

    def _write_headroom(self, entry: Entry) -> int:
        """Returns that of the levels which were sent there and do not run there yet."""
        running = entry.report.running_by_priority if entry.report is not None else ()
        there = {self._params.load.bearing(priority) for priority, count in running if count > 0}
        sent = {one.level for one in entry.unseen} - there
        for rank, blocks in self._headroom.items():
            self.brought[rank][entry.row] = 0.0 if rank in there or rank in sent else blocks
        return sum(blocks for rank, blocks in self._headroom.items() if rank in sent)

    def expire(self, now_s: float) -> None:
        """Leave out whose report is too old now."""
        while self._by_age:
            oldest = next(iter(self._by_age))
            if now_s - self.reported_s[oldest] <= self._params.max_report_age_s:
                return
            del self._by_age[oldest]
            line = self._lines[oldest]
            assert line is not None, "it has reported"
            line.spare = -math.inf
            self._on_spare(oldest, line)

    def _on_spare(self, row: int, line: Line) -> None:
        self.spare[row] = line.spare
        is_usable = line.spare > -math.inf
        self.num_usable += is_usable - self._usable[row]
        self._usable[row] = is_usable
        self._shortlist.put(row, line)

    # ---- what is read
    def is_usable(self, row: int) -> bool:
        return self._usable[row]

    def highest(self, demand_blocks: int, now_s: float) -> Highest | None:
        """The best of `scores` where nothing is left out, saved or brought. None: only they can tell. `now_s`: not
        before the last report."""
        if demand_blocks > self._smallest:
            return None
        if self._num_unasked:
            self._num_unasked -= 1
            return None
        least_fall = demand_blocks / self._largest_batch
        highest = self._shortlist.highest(demand_blocks, least_fall, now_s)
        if highest is None and self._shortlist.is_short:
            self._shortlist.refill(self.spare / self.batch, self._lines)
            highest = self._shortlist.highest(demand_blocks, least_fall, now_s)
        if highest is None:
            self._num_unasked = NUM_UNASKED
        return highest

    def scores(
        self,
        demand_blocks: int,
        now_s: float,
        left_out: Sequence[int] = (),
        saved_blocks: Scores | None = None,
        best_only: bool = False,
        level: int | None = None,
    ) -> Scores:
        """Freeness of each with this request on it, in decode steps; higher is better; -inf: not to be chosen, as those
        `left_out`. Instances too small for it count only where no other is left.

        When that would be negative the request has to wait, and the score is minus the blocks short for *everything*
        that waits there. Freeness itself would mislead: it ignores all but the head of the queue, and dividing a
        negative number by a larger batch makes the fuller instance look better.

        An old report is trusted less: what its running requests need as they go on is taken off for its age.

        `saved_blocks`: how much of the prompt each has cached. That is demand that is not there, and the instance
        counts as if so many blocks of what runs there were gone, with their share of the batch. By demand alone one
        running request more would outweigh any prefix where memory is plentiful.

        `level`: the rank of its level of priority, if that has headroom: where none of that level runs it brings it.
        Where that headroom is all that is lacking it begins at once, and the score is between -1 and 0: the higher the
        more decode steps are left if it did not count.

        `best_only`: which one is the highest is all that is asked. Where somebody has room those without keep some
        number below zero.
        """
        spare: Scores = (self.reported_s - now_s) * self.growth_per_s
        spare += self.spare
        spare -= demand_blocks
        if level is not None:
            spare -= self.brought[level]
        batch = self.batch
        if saved_blocks is not None:
            spare += saved_blocks
            gone = self._params.prefix_weight * saved_blocks * self.requests_per_block
            batch = np.maximum(1.0, batch - gone)
        steps: Scores = spare / batch
        share = self._shares(now_s)
        if share is not None:
            steps *= share
        for row in left_out:
            steps[row] = -math.inf
        if demand_blocks > self._smallest:
            large_enough = np.where(self.total >= demand_blocks, steps, -math.inf)
            if large_enough.max() > -math.inf:
                steps = large_enough
        if not (best_only and steps[steps.argmax()] >= 0.0):
            lacking = (spare < 0) & (steps > -math.inf)
            if level is not None and bool((cutting := lacking & (spare >= -self._headroom[level])).any()):
                left = (spare + self._headroom[level]) / batch * (1.0 if share is None else share)
                np.divide(-1.0, 1.0 + left, out=steps, where=cutting)
                lacking &= ~cutting
            np.add(spare, self.behind, out=steps, where=lacking)
        return steps

    def _shares(self, now_s: float) -> Scores | None:
        """What part of its freeness counts of each; None: all of it of all."""
        if self._slow_start.is_over(now_s):
            return None
        risen = (now_s - self.first_report_s) / self._params.slow_start_s
        shares: Scores = np.clip(risen, self._params.slow_start_share, 1.0)
        return shares

    def check_integrity(self, entries: Sequence[Entry]) -> None:
        """Raise AssertionError unless each value is what would be worked out anew. Only fresh rows need to be right."""
        anew = Columns(entries, self._params, self._num_gateways)
        kept = sorted(self._by_age)
        for name, values in vars(anew).items():
            if isinstance(values, np.ndarray):
                assert np.array_equal(values[kept], getattr(self, name)[kept]), f"{name} is stale"
        for rank, values in anew.brought.items():
            assert np.array_equal(values[kept], self.brought[rank][kept]), f"headroom of {rank} is stale"
        gone = [row for row in range(len(entries)) if row not in self._by_age]
        assert all(self.spare[row] == -math.inf for row in gone), "an old report still counts"
        assert [self._lines[row] for row in kept] == [anew._lines[row] for row in kept], "a line is stale"
        self._shortlist.check_integrity((self.spare / self.batch).tolist(), self._lines)
        assert self._usable == [math.isfinite(spare) for spare in self.spare], "who may be chosen"
        assert self.num_usable == sum(self._usable)
        assert self._largest_batch == max(self.batch, default=1)
        assert len(entries) == 0 or self._smallest == self.total.min()
        ages = [float(self.reported_s[row]) for row in self._by_age]
        assert ages == sorted(ages), "reports by age"


def _column(size: int, value: float) -> Any:
    return np.full(size, value, dtype=np.float64)
