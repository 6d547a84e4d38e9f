"""The step-time model against the same least squares written out, and what must hold whatever it has seen."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.policy.steptime import (
    NUM_TERMS,
    SHAPE,
    Observation,
    StepTimeModel,
    StepTimeParams,
    non_negative,
    terms_of_step,
)
from tests.support.slow_steptime import SlowStepTime

SHORT = StepTimeParams(forgetting=0.9, solve_each_row_until=5, solve_every=3)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """One to three steps that may prefill, taking anything from a tenth of a millisecond to a stall of a minute."""
    num_steps = draw(st.integers(1, 3))
    prefill = draw(st.sampled_from([0, 0, 0, 16, 500, 4000]))
    decoding = draw(st.integers(0 if prefill else 1, 200))
    one = terms_of_step(prefill, decoding, decoding * draw(st.integers(1, 8000)), prefill * draw(st.integers(0, 4000)))
    seconds = 10.0 ** draw(st.floats(-4.0, 1.8))
    return Observation(tuple(num_steps * term for term in one), seconds, prefill > 0)


priors = st.none() | st.lists(st.floats(0.05, 20.0), min_size=NUM_TERMS, max_size=NUM_TERMS).map(
    lambda factors: SHAPE * np.array(factors)
)


STEADY, SUDDEN = (Observation((1.0, 1.0, 0.0, 1.0, 1.0, 0.0), seconds, False) for seconds in (1.0, 1e-4))


@settings(max_examples=25)
@example(rows=[*[STEADY] * 7, SUDDEN, SUDDEN], prior=None, params=SHORT)
@example(rows=[SUDDEN, *[STEADY] * 8], prior=None, params=SHORT)
@given(st.lists(observations(), min_size=1, max_size=9), priors, st.sampled_from([SHORT, StepTimeParams()]))
def test_it_estimates_what_the_slow_least_squares_does(rows: list[Observation], prior: object, params: object) -> None:
    assert isinstance(params, StepTimeParams)
    fast, slow = StepTimeModel(prior, params), SlowStepTime(prior, params)  # type: ignore[arg-type]
    for row in rows:
        fast.observe(row)
        slow.observe(row)
        assert (fast.coefficients is None) == (slow.coefficients is None)
        if fast.coefficients is not None and slow.coefficients is not None:
            # Compared is what they predict: where the rows say nothing about a coefficient, only its product counts.
            for seen in rows:
                expected = float(slow.coefficients @ np.array(seen.terms))
                assert np.isclose(fast.predict_s(seen.terms) or 0.0, expected, rtol=1e-3, atol=1e-12)


@settings(max_examples=60)
@given(st.lists(observations(), min_size=1, max_size=40), st.data())
def test_predictions_are_never_negative_and_never_fall_when_a_step_does_more(
    rows: list[Observation], data: st.DataObject
) -> None:
    model = StepTimeModel(params=SHORT)
    for row in rows:
        model.observe(row)
        assert model.coefficients is not None and bool((model.coefficients >= 0.0).all())
        assert bool(np.isfinite(model.coefficients).all())
    less = [data.draw(st.integers(0, 4000)) for _ in range(4)]
    more = [value + data.draw(st.integers(0, 4000)) for value in less]
    smaller, larger = model.predict_s(terms_of_step(*less)), model.predict_s(terms_of_step(*more))
    assert smaller is not None and larger is not None
    assert 0.0 <= smaller <= larger * (1 + 1e-12)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_non_negative_solution_meets_the_conditions_of_an_optimum(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((size + 2, size)) * 10.0 ** rng.uniform(-3, 3, size)
    matrix, vector = rows.T @ rows + 1e-9 * np.eye(size), rows.T @ rng.standard_normal(size + 2)
    solution = non_negative(matrix, vector)
    scale = np.sqrt(np.diag(matrix))
    gradient = (matrix @ solution - vector) / scale
    assert bool((solution >= 0.0).all())
    assert bool((gradient >= -1e-6).all()), "making a zero positive would not help"
    assert float(np.abs(gradient[solution > 0.0]).max(initial=0.0)) < 1e-6, "nor would moving what is positive"
