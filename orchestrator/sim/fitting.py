"""Which step times explain what an engine did? Non-negative least squares over the windows of a journal; pure.

    seconds = base * steps + prompt * prompt tokens + wide * tokens beyond 256 a step
              + sequence * decoding requests + context * KV tokens they read
              + pair * (prompt token, earlier token) pairs,              every coefficient >= 0

The terms, the weights and the solution are those of production's online model (`orchestrator/policy/steptime.py`):
errors are relative, and Huber's weight bounds the pull of a stall. It forgets and leans on a prior; here all windows
count alike, and what the run did not exercise is said to be unknown. A prompt's token may cost more or less than a
decoded one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instance.messages import WIDE_STEP_TOKENS
from orchestrator.errors import ConfigError
from orchestrator.policy.steptime import (
    BASE,
    PER_CONTEXT_TOKEN,
    PER_DECODE,
    PER_PAIR,
    PER_TOKEN,
    PER_WIDE_TOKEN,
    Floats,
    Observation,
    StepTimeParams,
    non_negative,
    row_weights,
)
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.observed import Observed, Window
from orchestrator.sim.steptime import Attention, StepTimes

NAMES = ("base", "prompt", "wide", "sequence", "context", "pair")
UNITS = (
    "a step",
    "a prompt token",
    f"a token beyond {WIDE_STEP_TOKENS} a step",
    "a decoding request",
    "a token of its context",
    "a pair of a prompt token and an earlier one",
)
NUM_TERMS = len(NAMES)
PROMPT, SEQUENCE = PER_TOKEN, PER_DECODE
"""Where production's model has all tokens of a step there are those of prompts here."""
MIN_WINDOWS = 32
STRETCH = 10
"""Windows, of about a tenth of a second each."""
ROUNDS = 30
"""Of weighting and solving."""
RIDGE = 1e-9
"""Of each term's own weight: decides between terms that the run cannot tell apart."""
LEAST_ERROR = 0.01
"""Relative, of a window: no run is told more exactly than this."""
WORTH_A_WORD = 0.25
"""Of the time of a full step: a term that is known no better than to this is named."""
PARAMS = StepTimeParams()


@dataclass(frozen=True, slots=True)
class Term:
    name: str
    unit: str
    seconds: float
    """Of one `unit`."""
    error_s: float
    """Its standard error; infinite where the run has nothing of it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found. `times` has the coefficients in the simulator's terms."""

    terms: tuple[Term, ...]
    between_s: float
    """Between two steps of an engine that has work: the agent's and the thread's. Part of `times.base_s`."""
    times: StepTimes
    num_windows: int
    num_steps: int
    busy_s: float
    median_error: float
    """Relative, of a window."""
    p95_error: float
    stalled_share: float
    """Of the busy time: in windows that took much longer than the fit explains, and so count less."""
    warnings: tuple[str, ...]

    def busy_s_of(self, work: Observation) -> float:
        """What these steps take together, without the time between them."""
        return float(_terms_of(work) @ np.array([term.seconds for term in self.terms]))


def fitted(seen: Observed) -> Fit:
    """Raises ConfigError when there is too little to fit to."""
    windows = seen.windows
    if len(windows) < MIN_WINDOWS:
        raise ConfigError(
            f"its reports tell of steps {len(windows)} times, and a fit needs {MIN_WINDOWS}: let the run be longer"
        )
    rows, seconds = _rows(windows)
    coefficients, pull = _solved(rows, seconds)
    predicted_s = rows @ coefficients
    errors = np.abs(seconds - predicted_s) / predicted_s
    spread = math.sqrt(float((pull * errors**2).sum()) / max(1, len(rows) - NUM_TERMS))
    error_s = _errors_of(rows, predicted_s, pull, coefficients, max(LEAST_ERROR, spread))
    between_s = _between_s(windows)
    return Fit(
        terms=tuple(
            Term(name, unit, float(seconds_of), float(error))
            for name, unit, seconds_of, error in zip(NAMES, UNITS, coefficients, error_s, strict=True)
        ),
        between_s=between_s,
        times=_times(coefficients, between_s),
        num_windows=len(windows),
        num_steps=int(rows[:, BASE].sum()),
        busy_s=float(seconds.sum()),
        median_error=float(np.median(errors)),
        p95_error=float(np.percentile(errors, 95)),
        stalled_share=float(seconds[seconds > (1.0 + PARAMS.tolerated_error) * predicted_s].sum() / seconds.sum()),
        warnings=tuple(_warnings(seen, coefficients, error_s)),
    )


def _rows(windows: Sequence[Window]) -> tuple[Floats, Floats]:
    """((windows, NUM_TERMS), (windows,) seconds)."""
    rows = np.array([_terms_of(window.work) for window in windows])
    return rows, np.array([window.work.seconds for window in windows])


def _terms_of(work: Observation) -> Floats:
    """(NUM_TERMS,)"""
    terms = np.array(work.terms)
    terms[PROMPT] = max(0.0, terms[PROMPT] - terms[SEQUENCE])  # more than one token a step where guesses are verified
    return terms


def _solved(rows: Floats, seconds: Floats) -> tuple[Floats, Floats]:
    """(coefficients, Huber's weight of each window)."""
    found, has_any = np.zeros(NUM_TERMS), rows.any(axis=0)
    columns = rows[:, has_any]
    weights = 1.0 / seconds**2
    for _ in range(ROUNDS):
        information = (columns.T * weights) @ columns
        information[np.diag_indices(len(information))] *= 1.0 + RIDGE
        found[has_any] = non_negative(information, columns.T @ (weights * seconds))
        predicted_s = np.maximum(rows @ found, 1e-3 * seconds)
        weights = row_weights(seconds, predicted_s, PARAMS)
    pull = weights * predicted_s**2
    # Relative errors do not add up to none: together the windows are to take as long as they did.
    found *= float((pull * seconds).sum() / (pull * predicted_s).sum())
    return found, pull


def _errors_of(rows: Floats, predicted_s: Floats, pull: Floats, coefficients: Floats, spread: float) -> Floats:
    """Standard errors: of a coefficient that is held at zero as if it alone were let go."""
    scaled = rows * (np.sqrt(pull) / predicted_s)[:, np.newaxis]
    information = scaled.T @ scaled
    diagonal = np.diag(information)
    has_any = diagonal > 0.0
    scale = 1.0 / np.sqrt(np.where(has_any, diagonal, 1.0))
    information *= np.multiply.outer(scale, scale)
    found = np.full(NUM_TERMS, math.inf)
    for index in np.flatnonzero(has_any):
        free = coefficients > 0.0
        free[index] = True
        own = int(free[:index].sum())
        # The ridge: those that cannot be told apart get a large error, not none.
        inverse = np.linalg.inv(information[np.ix_(free, free)] + RIDGE * np.eye(int(free.sum())))
        found[index] = spread * scale[index] * math.sqrt(max(0.0, float(inverse[own, own])))
    return found


def _between_s(windows: Sequence[Window]) -> float:
    """Median over stretches of windows in which an engine was busy whenever it reported; in some it rested for a moment
    all the same. A report comes up to a step after the last one it tells of: over a stretch that evens out."""
    stretches: list[float] = []
    open_ones: dict[str, list[Window]] = {}
    for window in windows:
        stretch = open_ones.setdefault(window.instance, [])
        if window.was_busy:
            stretch.append(window)
        if len(stretch) == STRETCH:
            rest_s = sum(one.wall_s - one.work.seconds for one in stretch)
            stretches.append(rest_s / sum(one.work.terms[BASE] for one in stretch))
        if len(stretch) == STRETCH or not window.was_busy:
            stretch.clear()
    return max(0.0, statistics.median(stretches)) if stretches else 0.0


def _times(coefficients: Floats, between_s: float) -> StepTimes:
    base_s, prompt_s, wide_s, sequence_s, context_s, pair_s = (float(one) for one in coefficients)
    token_s = min(prompt_s, sequence_s)
    return StepTimes(
        base_s=base_s + between_s,
        token_s=token_s,
        bend_tokens=WIDE_STEP_TOKENS,
        bent_token_s=wide_s,
        attention=Attention(
            sequence_s=sequence_s - token_s,
            context_s=context_s,
            token_s=prompt_s - token_s,
            square_s=pair_s / 2,
            cross_s=pair_s,
        ),
    )


def full_steps(engine: LengthConfig) -> tuple[Floats, Floats]:
    """Terms of the largest steps that the engine can make: (all of a prompt at once, all requests that decode)."""
    most = engine.max_num_batched_tokens
    prompt, decode = np.zeros(NUM_TERMS), np.zeros(NUM_TERMS)
    prompt[[BASE, PROMPT, PER_WIDE_TOKEN, PER_PAIR]] = 1, most, max(0, most - WIDE_STEP_TOKENS), most * most / 2
    decode[[BASE, SEQUENCE, PER_CONTEXT_TOKEN]] = 1, engine.max_num_seqs, engine.num_blocks * engine.block_size
    decode[PER_WIDE_TOKEN] = max(0, engine.max_num_seqs - WIDE_STEP_TOKENS)
    return prompt, decode


def _warnings(seen: Observed, coefficients: Floats, error_s: Floats) -> list[str]:
    found = []
    for step, what, longer in zip(
        full_steps(seen.engine),
        (
            f"a step of {seen.engine.max_num_batched_tokens:,} prompt tokens",
            f"a step that decodes {seen.engine.max_num_seqs} requests of {seen.engine.num_blocks} blocks together",
        ),
        ("longer prompts", "more requests at once, and longer ones"),
        strict=True,
    ):
        takes_s = float(coefficients @ step)
        for index in np.flatnonzero(step):
            off_s = 2.0 * float(error_s[index]) * float(step[index])
            if math.isinf(off_s):
                found.append(f"{NAMES[index]}: the run has nothing of it, so it is taken for 0; {longer} would tell")
            elif off_s > WORTH_A_WORD * takes_s:
                found.append(
                    f"{NAMES[index]}: known to +-{1e3 * off_s:.3g} ms of the {1e3 * takes_s:.3g} ms of {what};"
                    f" {longer} in the run would tell"
                )
    if seen.speculates:
        found.append("requests got several tokens in a step, which the simulator does not know")
    return list(dict.fromkeys(found))
