"""What does the step-time model estimate? The same least squares, slow: every row is kept, every subset tried."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from orchestrator.policy.steptime import LEAST_EXPECTED, NUM_TERMS, SHAPE, Observation, StepTimeParams


class SlowStepTime:
    def __init__(self, prior: Any = None, params: StepTimeParams | None = None) -> None:
        self._params = params or StepTimeParams()
        self._prior = (SHAPE if prior is None else prior) / SHAPE
        self.coefficients = None if prior is None else np.array(prior)
        self._rows: list[tuple[Any, float, bool, float]] = []
        """(scaled terms, seconds, has prefill, weight that it came with)."""
        self._unweighted: list[Observation] = []

    def observe(self, seen: Observation) -> None:
        self._unweighted.append(seen)
        num_rows = len(self._rows) + len(self._unweighted)
        if num_rows <= self._params.solve_each_row_until or num_rows % self._params.solve_every == 0:
            ratio = self._shift()
            kept = self._params.shift_keeps if ratio != 1.0 else 1.0
            self._rows = [(row, ratio * s, kind, kept * weight / ratio**2) for row, s, kind, weight in self._rows]
            for one in self._unweighted:
                self._rows.append((np.array(one.terms) * SHAPE, one.seconds, one.has_prefill, self._weight(one, ratio)))
            self._unweighted = []
            self.coefficients = self._fit() * SHAPE

    def _shift(self) -> float:
        """The median of measured over expected in a whole batch, if it is far from 1."""
        if self.coefficients is None or len(self._unweighted) < self._params.solve_every:
            return 1.0
        ratios = [one.seconds / self._expected_s(one) for one in self._unweighted]
        ratio = float(np.median(ratios))
        limit = 1.0 + self._params.shift_error
        return 1.0 if 1.0 / limit <= ratio <= limit else ratio

    def _expected_s(self, seen: Observation) -> float:
        assert self.coefficients is not None
        expected_s = sum(float(a) * b for a, b in zip(self.coefficients, seen.terms, strict=True))
        return max(expected_s, LEAST_EXPECTED * seen.seconds)

    def _weight(self, seen: Observation, ratio: float) -> float:
        """`ratio`: of the new speed, by which what was expected has become longer."""
        expected_s = seen.seconds
        if self.coefficients is not None:
            expected_s = max(ratio * self._expected_s(seen), LEAST_EXPECTED * seen.seconds)
        error = abs(seen.seconds - expected_s) / expected_s
        huber = 1.0 if error <= self._params.tolerated_error else self._params.tolerated_error / error
        return float(huber / expected_s**2)

    def _fit(self) -> Any:
        """Over theta >= 0, in units of SHAPE."""
        weights = []
        for number, (_, _, kind, weight) in enumerate(self._rows):
            later = sum(1 for other in self._rows[number + 1 :] if other[2] == kind)
            weights.append(weight * self._params.forgetting**later)
        roots = np.sqrt(weights)
        rows = np.array([row for row, _, _, _ in self._rows]) * roots[:, None]
        seconds = np.array([time_s for _, time_s, _, _ in self._rows]) * roots
        along_prior = rows @ self._prior
        speed = float(along_prior @ seconds) / float(along_prior @ along_prior)
        # The ridge, as rows of their own: (theta_j / (speed * prior_j) - 1) * sqrt(ridge_rows).
        root = np.sqrt(self._params.ridge_rows)
        rows = np.vstack([rows, root * np.diag(1.0 / (speed * self._prior))])
        seconds = np.append(seconds, root * np.ones(NUM_TERMS))
        best, least = np.zeros(NUM_TERMS), float(seconds @ seconds)
        for free in product([False, True], repeat=NUM_TERMS):
            theta = np.zeros(NUM_TERMS)
            if any(free):
                theta[list(free)] = np.linalg.lstsq(rows[:, list(free)], seconds, rcond=None)[0]
            off = rows @ theta - seconds
            if (theta >= 0).all() and float(off @ off) < least:
                best, least = theta, float(off @ off)
        return best
