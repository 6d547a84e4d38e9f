"""How long are the gaps between the tokens of an answer (ITL), as far as a simulated client can tell? Pure.

A run of decode steps reaches a client as one delivery of several tokens, RUN_S after the one before it at most, where
production sends each step's token by itself. So the gaps inside a delivery are not seen, only their sum. Of a delivery
of k tokens, g seconds after the one before:

- g <= RUN_S: nothing stood still, and the steps of a run take nearly the same time: k gaps of g / k;
- g > RUN_S: the request stood still (preempted, moved, beside a long prompt) before a run whose steps took RUN_S / k
  each at most: one gap of g - (k - 1) RUN_S / k, and k - 1 of RUN_S / k.

The sum of all gaps is right, and so is their mean. The longest one is right for k = 1, which is each step that computes
a prompt, too; else it is too short by less than RUN_S, and never too long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from instance.report import REPORT_INTERVAL_S

RUN_S = 2 * REPORT_INTERVAL_S
"""A run of steps takes half as long at most, and all is told at the first end of a run that comes half as long after it
was told last (`host.py`, `runs.py`)."""
_PER_S = 2_000
"""Buckets a second: quantiles are right to half a millisecond."""
_NUM_BUCKETS = 2_000


@dataclass(slots=True)
class Gaps:
    """Of many requests."""

    num: int = 0
    sum_s: float = 0.0
    _counts: list[int] = field(default_factory=lambda: [0] * _NUM_BUCKETS)
    _long: list[float] = field(default_factory=list)
    """Those that have no bucket, each."""

    def add(self, gap_s: float, num_tokens: int) -> float:
        """One delivery, so long after the one before. Returns the longest gap in it."""
        self.num += num_tokens
        self.sum_s += gap_s
        if num_tokens == 1 or gap_s <= RUN_S:
            longest_s = gap_s / num_tokens
            self._count(longest_s, num_tokens)
            return longest_s
        step_s = RUN_S / num_tokens
        longest_s = gap_s - (num_tokens - 1) * step_s
        self._count(step_s, num_tokens - 1)
        self._count(longest_s, 1)
        return longest_s

    def _count(self, gap_s: float, times: int) -> None:
        bucket = int(gap_s * _PER_S)
        if bucket < _NUM_BUCKETS:
            self._counts[bucket] += times
        else:
            self._long += [gap_s] * times

    @property
    def mean_s(self) -> float:
        """NaN where there is none."""
        return self.sum_s / self.num if self.num else math.nan

    def quantile_s(self, share: float) -> float:
        """So many of the gaps are no longer; to half a millisecond up to a second. NaN where there is none."""
        if not self.num:
            return math.nan
        rank = max(1, math.ceil(share * self.num))
        for bucket, count in enumerate(self._counts):
            rank -= count
            if rank <= 0:
                return (bucket + 0.5) / _PER_S
        return sorted(self._long)[rank - 1]


def together(several: Iterable[Gaps]) -> Gaps:
    """All of them."""
    whole = Gaps()
    for one in several:
        whole.num += one.num
        whole.sum_s += one.sum_s
        whole._counts = [mine + theirs for mine, theirs in zip(whole._counts, one._counts, strict=True)]
        whole._long += one._long
    return whole
