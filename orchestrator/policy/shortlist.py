"""Which few of a thousand instances could have the highest score? Those that have the most to spare, in order.

The score of a request that has nothing cached anywhere only ever falls from what is spare for each request of the
batch: by its demand, by the age of the report, by a slow start. So that is a bound, the highest bounds are looked at
one after the other, and what lies below the best score by more than the demand need not be looked at. In an uneven
fleet a few are; in an even one too many would be, and `Columns.scores` works all out at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_LOOKED_AT = 48
"""One by one; more take longer than a thousand do as columns."""
REFILLED_TO = 3 * MAX_LOOKED_AT
"""Each dispatch takes one from the list, reports need not bring one back: it is to last for a while."""
MAX_LISTED = 2 * REFILLED_TO
ROUNDING = 1e-9
"""A share; far more than the few operations of a score are off by."""


@dataclass(slots=True)
class Line:
    """What the score of one row is made of, as plain numbers: to read one out of an array takes longer than to reckon
    with it."""

    first_report_s: float
    reported_s: float = 0.0
    growth_per_s: float = 0.0
    num_running: int = 0
    running_blocks: int = 0
    free: float = -math.inf
    """Blocks free of virtual usage; -inf unless it serves."""
    spare: float = -math.inf
    """Of these and of own dispatches."""
    batch: int = 1
    """Requests that would run there with this one."""


class SlowStart:
    """What part of its freeness counts of each row. `seconds`, `least_share`: as in `DispatchParams`."""

    def __init__(self, seconds: float, least_share: float) -> None:
        self._seconds = seconds
        self._least_share = least_share
        self._first_s, self._last_s = math.inf, -math.inf
        """When the rows reported first."""

    def add(self, first_report_s: float) -> None:
        self._first_s = min(self._first_s, first_report_s)
        self._last_s = max(self._last_s, first_report_s)

    def is_over(self, now_s: float) -> bool:
        """All have their whole share."""
        return now_s >= self._last_s + self._seconds

    def share(self, line: Line, now_s: float) -> float:
        """As long as it is not over."""
        return self._risen(now_s - line.first_report_s)

    def most(self, now_s: float) -> float:
        """Nobody's share is larger."""
        return 1.0 if self.is_over(now_s) else self._risen(now_s - self._first_s)

    def _risen(self, known_for_s: float) -> float:
        risen = known_for_s / self._seconds
        if risen < self._least_share:
            return self._least_share
        return min(risen, 1.0)


class Highest(NamedTuple):
    score: float
    rows: list[int]
    """That have it, in ascending order."""


class Shortlist:
    """Rows by bound: the highest, and the floor that no other is above."""

    def __init__(self, slow_start: SlowStart) -> None:
        self._slow_start = slow_start
        self._listed: list[tuple[float, int, Line]] = []
        """(bound, row, what it is made of), the lowest first."""
        self._bounds: dict[int, float] = {}
        """Of the rows that are listed."""
        self._floor = math.inf

    @property
    def is_short(self) -> bool:
        """To be filled again."""
        return len(self._listed) < MAX_LOOKED_AT and self._floor > -math.inf

    def put(self, row: int, line: Line) -> None:
        """What is spare there has changed."""
        before = self._bounds.pop(row, None)
        if before is not None:
            del self._listed[bisect_left(self._listed, (before, row))]
        bound = line.spare / line.batch
        if bound > self._floor:
            self._bounds[row] = bound
            insort(self._listed, (bound, row, line))
            if len(self._listed) > MAX_LISTED:
                self._keep_best()

    def _keep_best(self) -> None:
        dropped, self._listed = self._listed[:-REFILLED_TO], self._listed[-REFILLED_TO:]
        self._floor = dropped[-1][0]
        for _, row, _ in dropped:
            del self._bounds[row]

    def refill(self, bounds: npt.NDArray[np.float64], lines: Sequence[Line | None]) -> None:
        """List the highest of all, given by row. -inf: it is not to be chosen."""
        order = np.argpartition(bounds, -REFILLED_TO - 1) if len(bounds) > REFILLED_TO else np.arange(len(bounds))
        best, others = order[-REFILLED_TO:], order[:-REFILLED_TO]
        self._floor = float(bounds[others[-1]]) if len(others) else -math.inf
        pairs = zip(best.tolist(), bounds[best].tolist(), strict=True)
        self._bounds = {row: bound for row, bound in pairs if bound > -math.inf}
        listed = ((bound, row, lines[row]) for row, bound in self._bounds.items())
        self._listed = sorted((bound, row, line) for bound, row, line in listed if line is not None)

    def highest(self, demand_blocks: int, least_fall: float, now_s: float) -> Highest | None:
        """The best score of all rows, listed or not, to the last bit that of `Columns.scores`. None: it would take too
        many looks, or whoever has the most to spare has not enough.

        `least_fall`: the demand takes as much from every score. `now_s`: not before a report.
        """
        most_share = self._slow_start.most(now_s)
        if not most_share:
            return None
        is_slow_start = not self._slow_start.is_over(now_s)
        too_far = self._listed[-MAX_LOOKED_AT][0] if len(self._listed) >= MAX_LOOKED_AT else self._floor
        best, least_bound, rows = -math.inf, -math.inf, list[int]()
        for bound, row, line in reversed(self._listed):
            if bound < least_bound:
                break
            score = ((line.reported_s - now_s) * line.growth_per_s + line.spare - demand_blocks) / line.batch
            if is_slow_start:
                if score * most_share < best:
                    continue
                score *= self._slow_start.share(line, now_s)
            if score > best:
                best, rows = score, [row]
                least_bound = (best / most_share + least_fall) * (1.0 - ROUNDING)
                if best < 0.0 or too_far >= least_bound:
                    return None
            elif score == best:
                rows.append(row)
        return Highest(best, sorted(rows)) if rows else None

    def check_integrity(self, bounds: Sequence[float], lines: Sequence[Line | None]) -> None:
        """Raise AssertionError unless it lists the highest of these bounds, by row."""
        assert [one[:2] for one in self._listed] == sorted((bound, row) for row, bound in self._bounds.items())
        assert len(self._listed) <= MAX_LISTED
        assert all(bounds[row] == bound > -math.inf for row, bound in self._bounds.items()), "a bound is stale"
        assert all(lines[row] is line for _, row, line in self._listed), "whose line it is"
        others = [bound for row, bound in enumerate(bounds) if row not in self._bounds]
        assert max(others, default=-math.inf) <= self._floor, "somebody is left out"
