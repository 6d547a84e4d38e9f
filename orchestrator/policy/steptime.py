"""How long does an engine step take on this instance? Learned online from the sums in its reports, without a profile.

    seconds = base * steps + per_token * tokens + per_wide_token * tokens beyond 256 a step
              + per_decode * decoding requests + per_context_token * KV tokens they read
              + per_pair * (prefilled token, earlier token) pairs,          every coefficient >= 0

Each term is linear in sums over steps, so several steps between two reports are one exact equation. The shape is that
of published fits of kernel profiles (linear with a knee, then attention by context and by pairs; non-negative least
squares on *relative* errors). Estimator: recursive least squares with exponential forgetting in information form
(Ljung, System Identification, 1999, ch. 11), each row divided by the time predicted before it, with Huber's weight
(1964) on the relative residual so that a stall moves nothing much, and the non-negative solution of the small normal
equations (Bro and de Jong, 1997). Two departures: steps that prefill and steps that only decode are forgotten by rows
of their own kind (an hour of decoding must not erase what a prefill costs), and a ridge pulls each coefficient to the
prior times the one speed factor that explains the rows best. So one row is enough for a prediction: the prior's shape
at that row's speed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from instance.messages import WIDE_STEP_TOKENS, LoadReport, StepTotals
from migration.types import Epoch, InstanceId

Floats = npt.NDArray[np.float64]

NUM_TERMS = 6
BASE, PER_TOKEN, PER_WIDE_TOKEN, PER_DECODE, PER_CONTEXT_TOKEN, PER_PAIR = range(NUM_TERMS)

SHAPE: Floats = np.array([8e-3, 3e-5, 2e-5, 2e-5, 1e-7, 3e-9])
"""Seconds a unit of each term, about those of an 8-billion-parameter model on one GPU (fits of published profiles).
Only their proportions matter: as the first guess, and as the scale in which coefficients are compared."""

MIN_SECONDS, MAX_SECONDS = 1e-7, 1e9
"""Of the time between two reports: what else a report says is no measurement."""
LEAST_EXPECTED = 1e-3
"""Of the time a row took: no row weighs as if it had been expected sooner."""
MAX_PIVOTS = 64
"""Of the non-negative solution: it needs a few, in theory finitely many."""


@dataclass(frozen=True, slots=True)
class StepTimeParams:
    forgetting: float = 1.0 - 1.0 / 256.0
    """Weight of a row when one more of its kind has come."""
    tolerated_error: float = 0.5
    """Relative residual beyond which a row counts less and less: its pull stays that of a row so far off."""
    shift_error: float = 0.5
    """When the median row of a whole batch is off by more, to one side, the instance has changed its speed."""
    shift_keeps: float = 0.1
    """Then what was known is scaled to the new speed and keeps this share of its weight."""
    ridge_rows: float = 0.1
    """So many rows' worth does it cost when a coefficient is off its prior by as much as the prior."""
    solve_each_row_until: int = 8
    solve_every: int = 32
    """From then on."""
    min_prior_rows: int = 16
    """Other instances' models are a prior once they rest on so many rows."""


DEFAULT_PARAMS = StepTimeParams()


@dataclass(frozen=True, slots=True)
class Observation:
    """What some steps computed, and how long they took together."""

    terms: tuple[float, ...]
    """NUM_TERMS sums, which the coefficients are multiplied with."""
    seconds: float
    has_prefill: bool


def terms_of_step(
    num_prefill_tokens: float, num_decoding: float, num_context_tokens: float, num_pairs: float
) -> tuple[float, ...]:
    """Of one step in which each decoding request computes one token."""
    num_tokens = num_prefill_tokens + num_decoding
    wide = max(0.0, num_tokens - WIDE_STEP_TOKENS)
    return (1.0, num_tokens, wide, num_decoding, num_context_tokens, num_pairs)


def between(before: StepTotals, after: StepTotals) -> Observation | None:
    """What lies between two reports of one incarnation. None: no step, or numbers that cannot be (they only grow)."""
    num_prefill_tokens = after.num_prefill_tokens - before.num_prefill_tokens
    terms = (
        float(after.num_steps - before.num_steps),
        float(num_prefill_tokens + after.num_decode_tokens - before.num_decode_tokens),
        float(after.num_wide_tokens - before.num_wide_tokens),
        float(after.num_decoding - before.num_decoding),
        float(after.num_context_tokens - before.num_context_tokens),
        float(after.num_attended_pairs - before.num_attended_pairs),
    )
    seconds = after.busy_s - before.busy_s
    if terms[BASE] < 1.0 or terms[PER_TOKEN] < 1.0 or min(terms) < 0.0 or not MIN_SECONDS <= seconds <= MAX_SECONDS:
        return None
    return Observation(terms, seconds, num_prefill_tokens > 0)


class StepTimeModel:
    """One instance's. Memory: two matrices of NUM_TERMS by NUM_TERMS and the rows of one batch, whatever comes.

    Coefficients change when a batch is learned: each row at first, then `solve_every` at a time, so that a row costs a
    gateway little more than its place in a list.
    """

    def __init__(self, prior: Floats | None = None, params: StepTimeParams = DEFAULT_PARAMS) -> None:
        """`prior`: coefficients of other instances of the same model (positive), else the built-in shape."""
        self._params = params
        self._prior = (SHAPE if prior is None else prior) / SHAPE
        self._coefficients: Floats | None = None if prior is None else np.array(prior)
        self._scaled = self._prior.copy()
        self._information = np.zeros((2, NUM_TERMS, NUM_TERMS))
        self._pull = np.zeros((2, NUM_TERMS))
        self._batch: list[Observation] = []
        self.num_rows = 0

    @property
    def coefficients(self) -> Floats | None:
        """(NUM_TERMS,) seconds a unit of each term, none negative. None: nothing is known yet."""
        return self._coefficients

    def predict_s(self, terms: tuple[float, ...]) -> float | None:
        """None: nothing is known yet."""
        return None if self._coefficients is None else float(self._coefficients @ np.array(terms))

    def observe(self, seen: Observation) -> None:
        """Learn from one row. The weights of earlier rows of its kind fall by `forgetting`."""
        self._batch.append(seen)
        self.num_rows += 1
        if self.num_rows <= self._params.solve_each_row_until or self.num_rows % self._params.solve_every == 0:
            self._add_batch()
            self._solve()

    def _add_batch(self) -> None:
        rows = np.array([seen.terms for seen in self._batch]) * SHAPE
        seconds = np.array([seen.seconds for seen in self._batch])
        kinds = np.array([seen.has_prefill for seen in self._batch], dtype=np.int64)
        self._batch = []
        expected_s = seconds if self._coefficients is None else rows @ self._scaled
        least_s = LEAST_EXPECTED * seconds  # a step of terms that seemed to cost nothing
        expected_s = np.maximum(expected_s, least_s)
        if len(rows) >= self._params.solve_every:
            ratio = statistics.median((seconds / expected_s).tolist())  # numpy's takes far longer for so few
            expected_s = np.maximum(expected_s * self._shift(ratio), least_s)
        weights = row_weights(seconds, expected_s, self._params)
        forgetting = self._params.forgetting
        for kind in (0, 1):
            mine = kinds == kind
            num_mine = int(np.count_nonzero(mine))
            if not num_mine:
                continue
            faded = weights[mine] * forgetting ** np.arange(num_mine - 1, -1, -1)
            weighted = rows[mine].T * faded
            self._information[kind] = forgetting**num_mine * self._information[kind] + weighted @ rows[mine]
            self._pull[kind] = forgetting**num_mine * self._pull[kind] + weighted @ seconds[mine]

    def _shift(self, ratio: float) -> float:
        """By which factor the instance has become slower (throttled, a neighbour on its cores) or faster; 1.0: neither.

        Rows weigh by the time they took, so an instance that got slower would be believed only when the fast rows are
        forgotten. A batch is median against stalls, and rows of the old speed still tell proportions.
        """
        if 1.0 / (1.0 + self._params.shift_error) <= ratio <= 1.0 + self._params.shift_error:
            return 1.0
        self._information *= self._params.shift_keeps / ratio**2
        self._pull *= self._params.shift_keeps / ratio
        return ratio

    def _solve(self) -> None:
        """argmin over x >= 0 of sum(weight * (x @ row - seconds)^2) + ridge * sum((x / (speed * prior) - 1)^2)."""
        information, pull = self._information.sum(axis=0), self._pull.sum(axis=0)
        speed = float(self._prior @ pull) / float(self._prior @ information @ self._prior)
        ridge = self._params.ridge_rows / (speed * self._prior) ** 2
        information[np.diag_indices(NUM_TERMS)] += ridge
        self._scaled = non_negative(information, pull + ridge * speed * self._prior)
        self._coefficients = self._scaled * SHAPE


def row_weights(seconds: Floats, expected_s: Floats, params: StepTimeParams) -> Floats:
    """Of squared residuals in seconds: 1 / expected^2 makes them relative, Huber's factor bounds their pull."""
    errors = np.maximum(np.abs(seconds - expected_s) / expected_s, 1e-12)
    weights: Floats = np.minimum(1.0, params.tolerated_error / errors) / expected_s**2
    return weights


def non_negative(matrix: Floats, vector: Floats) -> Floats:
    """argmin over x >= 0 of x @ matrix @ x - 2 vector @ x, for a positive definite matrix (Bro and de Jong, 1997)."""
    # Units differ by orders of magnitude: with a diagonal of ones less is lost, and the pivots compare like with like.
    scale = 1.0 / np.sqrt(np.diag(matrix))
    matrix, vector = matrix * np.multiply.outer(scale, scale), vector * scale
    solution: Floats = np.asarray(np.linalg.solve(matrix, vector), dtype=np.float64)
    if bool((solution >= 0.0).all()):
        return solution * scale
    tolerance = 1e-12 * max(1.0, float(np.abs(vector).max()))
    solution, free = np.zeros(len(vector)), np.zeros(len(vector), dtype=bool)
    for _ in range(MAX_PIVOTS):
        gradient = np.where(free, -math.inf, vector - matrix @ solution)
        if float(gradient.max()) <= tolerance:
            break
        free[int(gradient.argmax())] = True
        candidate = _solve_free(matrix, vector, free)
        while bool((candidate[free] <= 0.0).any()):
            leaving = free & (candidate <= 0.0)
            step = float((solution[leaving] / (solution[leaving] - candidate[leaving])).min())
            solution = solution + step * (candidate - solution)
            free &= solution > tolerance
            solution[~free] = 0.0
            candidate = _solve_free(matrix, vector, free)
        solution = candidate
    return solution * scale


def _solve_free(matrix: Floats, vector: Floats, free: npt.NDArray[np.bool_]) -> Floats:
    solution = np.zeros(len(vector))
    solution[free] = np.linalg.solve(matrix[np.ix_(free, free)], vector[free])
    return solution


@dataclass(slots=True)
class _Learned:
    model: StepTimeModel
    totals: StepTotals


class StepTimes:
    """The models of a fleet of one model's instances, by incarnation. Bounded by its members."""

    def __init__(self, params: StepTimeParams = DEFAULT_PARAMS) -> None:
        self._params = params
        self._learned: dict[tuple[InstanceId, Epoch], _Learned] = {}

    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Forget all others. What a restarted instance was is forgotten, too: it may be on another machine."""
        kept = set(members)
        self._learned = {key: learned for key, learned in self._learned.items() if key in kept}

    def on_report(self, report: LoadReport) -> Floats | None:
        """Learn from a member's report and return its coefficients. Reports may be lost, older ones teach nothing."""
        key = (InstanceId(report.instance), Epoch(report.epoch))
        learned = self._learned.get(key)
        if learned is None:
            # What was computed before anybody listened counts as a first row: an instance is known at once.
            learned = self._learned[key] = _Learned(StepTimeModel(self.prior(), self._params), StepTotals())
        seen = between(learned.totals, report.steps)
        if report.steps.num_steps > learned.totals.num_steps and math.isfinite(report.steps.busy_s):
            learned.totals = report.steps
        if seen is not None:
            learned.model.observe(seen)
        return learned.model.coefficients

    def coefficients(self, instance: InstanceId, epoch: Epoch) -> Floats | None:
        learned = self._learned.get((instance, epoch))
        return None if learned is None else learned.model.coefficients

    def known(self) -> dict[tuple[InstanceId, Epoch], Floats]:
        """Coefficients of all of whom there are any."""
        return {
            key: coefficients
            for key, learned in self._learned.items()
            if (coefficients := learned.model.coefficients) is not None
        }

    def check_integrity(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Raise AssertionError when it has learned of others than these."""
        assert self._learned.keys() <= set(members), "models of instances that are gone"

    def prior(self) -> Floats | None:
        """The mean of the instances that are known well; None while none is. No coefficient is zero: a prior of nothing
        would deny a cost that those instances have just not met."""
        known: list[Any] = [
            learned.model.coefficients
            for learned in self._learned.values()
            if learned.model.coefficients is not None and learned.model.num_rows >= self._params.min_prior_rows
        ]
        if not known:
            return None
        mean = np.mean(np.array(known) / SHAPE, axis=0)
        prior: Floats = np.maximum(mean, 0.01 * mean.mean()) * SHAPE
        return prior
