"""What does a choice among a thousand instances need to know of each? Columns, one row an instance, kept up to date.

Whatever only changes with a report or a dispatch is worked out when that comes, so that a choice is a dozen array
operations whatever the size of the fleet (`python -m bench.decide`).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from instance.messages import LoadReport
from migration.types import Epoch
from orchestrator.policy.load import LoadParams, growth_blocks_per_s, running_blocks, virtual_usage_blocks

Scores = npt.NDArray[np.float64]
"""One of each row."""


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


@dataclass(frozen=True, slots=True)
class Dispatch:
    sequence: int
    demand_blocks: int


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
        self.num_usable = 0
        """Rows that may be chosen: they serve, and their reports are fresh."""
        self._usable = [False] * size
        self._smallest = 0.0
        self._all_warm_s = -math.inf
        """From then on no row starts slowly."""
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
        self.reported_s[row] = entry.reported_s
        self.first_report_s[row] = entry.first_report_s
        self._all_warm_s = max(self._all_warm_s, entry.first_report_s + self._params.slow_start_s)
        self.growth_per_s[row] = growth_blocks_per_s(report)
        self.behind[row] = report.head_of_line_blocks - max(report.waiting_blocks, report.head_of_line_blocks)
        if self.total[row] != report.total_blocks:
            self.total[row] = report.total_blocks
            self._smallest = float(self.total.min())
        self.write_load(entry)

    def write_load(self, entry: Entry) -> None:
        """A report or a dispatch changed what is on it."""
        report, row = entry.report, entry.row
        if report is None or row not in self._by_age:
            return
        # The other gateways see the same reports and choose as this one does: until an instance reports again, each is
        # taken to have sent it as much. Otherwise every gateway would fill the same gap, each believing it is alone.
        num_unseen, unseen_blocks = len(entry.unseen) * self._num_gateways, entry.unseen_blocks * self._num_gateways
        spare = report.total_blocks - virtual_usage_blocks(report, self._params.load) - unseen_blocks
        self.spare[row] = spare
        self.batch[row] = max(1, report.num_running + num_unseen + 1)
        self.unseen[row], self.unseen_blocks[row] = num_unseen, unseen_blocks
        used = running_blocks(report) + unseen_blocks
        self.requests_per_block[row] = (report.num_running + num_unseen) / max(1, used)
        self._set_usable(row, math.isfinite(spare))

    def expire(self, now_s: float) -> None:
        """Leave out whose report is too old now."""
        while self._by_age:
            oldest = next(iter(self._by_age))
            if now_s - self.reported_s[oldest] <= self._params.max_report_age_s:
                return
            del self._by_age[oldest]
            self.spare[oldest] = -math.inf
            self._set_usable(oldest, False)

    def _set_usable(self, row: int, usable: bool) -> None:
        self.num_usable += usable - self._usable[row]
        self._usable[row] = usable

    # ---- what is read
    def is_usable(self, row: int) -> bool:
        return self._usable[row]

    def scores(
        self,
        demand_blocks: int,
        now_s: float,
        left_out: Sequence[int] = (),
        saved_blocks: Scores | None = None,
        best_only: bool = False,
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

        `best_only`: which one is the highest is all that is asked. Where somebody has room those without keep some
        number below zero.
        """
        spare: Scores = (self.reported_s - now_s) * self.growth_per_s
        spare += self.spare
        spare -= demand_blocks
        batch = self.batch
        if saved_blocks is not None:
            spare += saved_blocks
            gone = self._params.prefix_weight * saved_blocks * self.requests_per_block
            batch = np.maximum(1.0, batch - gone)
        steps: Scores = spare / batch
        if now_s < self._all_warm_s:
            risen = (now_s - self.first_report_s) / self._params.slow_start_s
            np.maximum(risen, self._params.slow_start_share, out=risen)
            steps *= np.minimum(risen, 1.0, out=risen)
        for row in left_out:
            steps[row] = -math.inf
        if demand_blocks > self._smallest:
            large_enough = np.where(self.total >= demand_blocks, steps, -math.inf)
            if large_enough.max() > -math.inf:
                steps = large_enough
        if not (best_only and steps[steps.argmax()] >= 0.0):
            np.add(spare, self.behind, out=steps, where=(spare < 0) & (steps > -math.inf))
        return steps

    def check_integrity(self, entries: Sequence[Entry]) -> None:
        """Raise AssertionError unless each value is what would be worked out anew. Only fresh rows need to be right."""
        anew = Columns(entries, self._params, self._num_gateways)
        kept = sorted(self._by_age)
        for name, values in vars(anew).items():
            if isinstance(values, np.ndarray):
                assert np.array_equal(values[kept], getattr(self, name)[kept]), f"{name} is stale"
        gone = [row for row in range(len(entries)) if row not in self._by_age]
        assert all(self.spare[row] == -math.inf for row in gone), "an old report still counts"
        assert self._usable == [math.isfinite(spare) for spare in self.spare], "who may be chosen"
        assert self.num_usable == sum(self._usable)
        assert len(entries) == 0 or self._smallest == self.total.min()
        ages = [float(self.reported_s[row]) for row in self._by_age]
        assert ages == sorted(ages), "reports by age"


def _column(size: int, value: float) -> Any:
    return np.full(size, value, dtype=np.float64)
