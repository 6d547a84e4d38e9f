"""Where does a value lie on an axis, and which values are written there? Linear, logarithmic, and both in one. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

_LINEAR_UNTIL = 10.0
"""Of `Kind.BOTH`: about linear below it, on either side of 0, logarithmic beyond."""
_ROUND = 1e-9


class Kind(Enum):
    LINEAR = "linear"
    LOG = "log"
    BOTH = "both"
    """For values of any sign over several powers of ten: asinh(value / 10)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Of the values `low` to `high`."""

    kind: Kind
    low: float
    high: float

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`; what lies beyond them is put there."""
        low, high = self._bent(self.low), self._bent(self.high)
        inside = self._bent(min(max(value, self.low), self.high))
        return (inside - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values, both ends at most among them, in order."""
        if self.kind is Kind.LOG:
            return _log_ticks(self.low, self.high, most)
        if self.kind is Kind.BOTH and max(-self.low, self.high) > 3 * _LINEAR_UNTIL:
            return _both_ticks(self.low, self.high, most)
        return _linear_ticks(self.low, self.high, most)

    def _bent(self, value: float) -> float:
        match self.kind:
            case Kind.LINEAR:
                return value
            case Kind.LOG:
                return math.log10(value)
            case Kind.BOTH:
                return math.asinh(value / _LINEAR_UNTIL)


def scale_of(values: list[float], kind: Kind = Kind.LINEAR, from_zero: bool = False) -> Scale:
    """One that holds all of these that it can; from 0 to 1 (LOG: 0.1 to 1) where there is none."""
    known = [value for value in values if math.isfinite(value) and (kind is not Kind.LOG or value > 0)]
    if not known:
        return Scale(kind, 0.1 if kind is Kind.LOG else 0.0, 1.0)
    low, high = min(known), max(known)
    if kind is Kind.LOG:
        return Scale(kind, low, high) if high > 1.05 * low else Scale(kind, low / 2, high * 2)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= _ROUND * max(1.0, abs(high)):
        high = low + max(1.0, abs(low) / 10)
    return Scale(kind, low, high)


def label(value: float) -> str:
    """Short: thousands as k, millions as M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        if (high - low) / (factor * step) <= most:
            step *= factor
            break
    first = math.ceil(low / step - _ROUND)
    count = math.floor(high / step + _ROUND) - first + 1
    return [round((first + index) * step, 12) for index in range(count)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [value for value in found if low * (1 - _ROUND) <= value <= high * (1 + _ROUND)]
        if len(inside) <= most:
            return inside if len(inside) > 1 else _linear_ticks(low, high, most)
    every = math.ceil(len(inside) / most)
    return inside[::every]


def _both_ticks(low: float, high: float, most: int) -> list[float]:
    top = math.ceil(math.log10(max(-low, high)))
    inside = [0.0]
    for factors, every in (((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        beyond = [factor * 10.0**power for power in range(1, top + 1, every) for factor in factors]
        found = [-value for value in reversed(beyond)] + [0.0] + beyond
        inside = [value for value in found if low <= value <= high]
        if len(inside) <= most:
            break
    return inside
