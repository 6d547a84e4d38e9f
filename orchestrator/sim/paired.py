"""By how much does one arm differ from another over the same days? Ratios day by day, with their interval. Pure.

Each day is lived by both, so what makes days differ drops out. Days are independent draws: the mean of the logarithms
of their ratios has a Student's t interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# fmt: off
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
_Z_95 = 1.959964


def t_95(degrees: int) -> float:
    """Student's t at 97.5 %, to a thousandth. Raises ValueError below one degree of freedom."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: at least 1 is needed")
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = _Z_95  # Abramowitz and Stegun 26.7.5
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of one arm over another: the geometric mean over the days, and its 95 % interval."""

    mean: float
    low: float
    high: float
    """`low` and `high` are NaN for fewer than two days."""

    @property
    def verdict(self) -> str:
        """Of a measure of which less is better."""
        return "worse" if self.low > 1.0 else "better" if self.high < 1.0 else "not told"


def ratio(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """Of `other` over `reference`, day by day. Left out are days on which either is not there or not above 0; NaN where
    no day is left."""
    pairs = zip(reference, other, strict=True)
    logs = [math.log(ours / theirs) for theirs, ours in pairs if 0 < theirs < math.inf and 0 < ours < math.inf]
    if not logs:
        return Ratio(math.nan, math.nan, math.nan)
    mean, half = statistics.fmean(logs), half_width(logs)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
