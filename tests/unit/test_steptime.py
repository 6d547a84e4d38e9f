"""What does an instance's step time follow from, and how soon is it known?"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from instance.messages import NO_STEPS, LoadReport, StepTotals
from instance.report import add_step
from instance.types import StepWork, step_work
from migration.types import Epoch, InstanceId
from orchestrator.policy.steptime import (
    SHAPE,
    Observation,
    StepTimeModel,
    StepTimeParams,
    StepTimes,
    between,
    terms_of_step,
)
from tests.support.idle_report import report

TRUE = np.array([6e-3, 4e-5, 3e-5, 1e-5, 2e-7, 5e-9])
DECODE = terms_of_step(0, 16, 16 * 800, 0)
PREFILL = terms_of_step(1024, 4, 4 * 800, 1024 * 512)


def seconds(terms: tuple[float, ...], coefficients: np.ndarray = TRUE) -> float:
    return float(coefficients @ np.array(terms))


def steps(rng: random.Random, prefill_share: float = 0.2) -> Iterator[tuple[float, ...]]:
    while True:
        chunk = rng.choice([64, 256, 700, 1500]) if rng.random() < prefill_share else 0
        decoding = rng.randint(1, 64)
        yield terms_of_step(chunk, decoding, decoding * rng.randint(50, 3000), chunk * rng.randint(0, 2000))


def taught(num_rows: int, coefficients: np.ndarray = TRUE, noise: float = 0.05, seed: int = 1) -> StepTimeModel:
    rng, model = random.Random(seed), StepTimeModel()
    teach(model, num_rows, rng, coefficients, noise)
    return model


def teach(
    model: StepTimeModel, num_rows: int, rng: random.Random, coefficients: np.ndarray = TRUE, noise: float = 0.05
) -> None:
    for terms, _ in zip(steps(rng), range(num_rows), strict=False):
        model.observe(Observation(terms, seconds(terms, coefficients) * rng.lognormvariate(0.0, noise), terms[1] > 64))


def error(model: StepTimeModel, terms: tuple[float, ...], coefficients: np.ndarray = TRUE) -> float:
    predicted = model.predict_s(terms)
    assert predicted is not None
    return abs(predicted / seconds(terms, coefficients) - 1.0)


def test_nothing_is_predicted_before_anything_is_known() -> None:
    assert StepTimeModel().predict_s(DECODE) is None


def test_the_first_row_is_enough_for_a_prediction_and_is_itself_met() -> None:
    model = StepTimeModel()
    model.observe(Observation(DECODE, 0.05, False))
    assert model.predict_s(DECODE) == pytest.approx(0.05)
    prefill_s = model.predict_s(PREFILL)
    assert prefill_s is not None and 0.05 < prefill_s < 1.0, "the built-in proportions at the speed of the row"


def test_after_a_hundred_noisy_steps_it_knows_every_kind_of_step() -> None:
    model = taught(100)
    for terms in (DECODE, PREFILL, terms_of_step(0, 1, 100, 0), terms_of_step(0, 128, 128 * 2000, 0)):
        assert error(model, terms) < 0.05


def test_other_instances_models_are_a_prior_that_is_usable_before_the_first_row() -> None:
    model = StepTimeModel(prior=TRUE)
    assert error(model, PREFILL) == pytest.approx(0.0)
    half_as_fast = 2.0 * TRUE
    for _ in range(20):
        model.observe(Observation(DECODE, seconds(DECODE, half_as_fast), False))
    assert error(model, DECODE, half_as_fast) < 0.02
    assert error(model, PREFILL, half_as_fast) < 0.1, "its prefills are taken to be slower by the same factor, unseen"


@pytest.mark.parametrize("every", [20, 50])
def test_stalls_do_not_wreck_it(every: int) -> None:
    """A step that takes a hundred times as long comes every so often."""
    rng, model = random.Random(3), StepTimeModel()
    for number, terms in zip(range(500), steps(rng), strict=False):
        stall = 100.0 if number % every == every - 1 else 1.0
        model.observe(Observation(terms, seconds(terms) * stall, terms[1] > 64))
    assert error(model, DECODE) < 0.06
    assert error(model, PREFILL) < 0.06


def test_a_stall_that_comes_first_is_outgrown() -> None:
    model, rng = StepTimeModel(), random.Random(4)
    model.observe(Observation(DECODE, 100.0 * seconds(DECODE), False))
    teach(model, 40, rng)
    assert error(model, DECODE) < 0.1


def test_without_the_bounded_pull_a_stall_would_wreck_it() -> None:
    """The control of those above."""
    unbounded = StepTimeParams(tolerated_error=1e9, shift_error=1e9)
    rng, model = random.Random(3), StepTimeModel(params=unbounded)
    for number, terms in zip(range(500), steps(rng), strict=False):
        model.observe(Observation(terms, seconds(terms) * (100.0 if number % 50 == 49 else 1.0), terms[1] > 64))
    assert error(model, DECODE) > 0.5


def test_an_instance_that_becomes_slower_is_believed() -> None:
    model, rng = taught(400), random.Random(5)
    slower = 3.0 * TRUE
    teach(model, 400, rng, slower)
    assert error(model, DECODE, slower) < 0.05
    assert error(model, PREFILL, slower) < 0.1


def test_an_hour_of_decoding_does_not_erase_what_a_prefill_costs() -> None:
    model, rng = taught(300), random.Random(6)
    for terms, _ in zip(steps(rng, prefill_share=0.0), range(20_000), strict=False):
        model.observe(Observation(terms, seconds(terms), False))
    assert error(model, PREFILL) < 0.05


# ---- what reports tell
def test_the_difference_of_two_reports_is_what_lies_between_them() -> None:
    totals = add_step(NO_STEPS, step_work([(500, 0, False)]), 0.1)
    later = add_step(totals, step_work([(1, 500, True)]), 0.02)
    assert between(NO_STEPS, totals) == Observation((1.0, 500.0, 244.0, 0.0, 0.0, 125_000.0), 0.1, True)
    seen = between(totals, later)
    assert seen is not None and seen.terms == (1.0, 1.0, 0.0, 1.0, 500.0, 0.0) and not seen.has_prefill
    assert seen.seconds == pytest.approx(0.02)


@pytest.mark.parametrize(
    "after",
    [
        NO_STEPS,
        StepTotals(9, 0, 40, 0, 40, 100, 0, 1.0),
        StepTotals(11, 0, 60, 0, 60, 300, 0, float("inf")),
        StepTotals(11, 0, 60, 0, 60, 300, 0, float("nan")),
        StepTotals(11, 0, 60, 0, 60, 100, 0, 2.0),
    ],
)
def test_reports_that_are_old_or_cannot_be_teach_nothing(after: StepTotals) -> None:
    assert between(StepTotals(10, 0, 50, 0, 50, 200, 0, 1.0), after) is None


def test_a_report_without_a_time_does_not_end_the_learning() -> None:
    times = StepTimes()
    times.set_members([(InstanceId("a"), Epoch(1))])
    times.on_report(told("a", StepTotals(10, 0, 50, 0, 50, 200, 0, 1.0)))
    times.on_report(told("a", StepTotals(20, 0, 90, 0, 90, 400, 0, float("nan"))))
    before = times.coefficients(InstanceId("a"), Epoch(1))
    after = times.on_report(told("a", StepTotals(30, 0, 130, 0, 130, 600, 0, 9.0)))
    assert before is not None and after is not None and seconds(DECODE, after) > seconds(DECODE, before)


def told(name: str, totals: StepTotals, epoch: int = 1) -> LoadReport:
    return report(name, epoch=epoch, steps=totals)


def test_a_fleet_learns_each_instances_speed_and_newcomers_start_from_the_others() -> None:
    times, totals = StepTimes(), {"a": NO_STEPS, "b": NO_STEPS}
    times.set_members([(InstanceId(name), Epoch(1)) for name in "abc"])
    rng = random.Random(8)
    for _ in range(200):
        for name, factor in (("a", 1.0), ("b", 3.0)):
            decoding = rng.randint(1, 32)
            work = step_work([(1, rng.randint(100, 900), True)] * decoding + [(rng.randint(0, 600), 0, False)])
            took_s = factor * seconds(
                terms_of_step(work.num_prefill_tokens, decoding, work.num_context_tokens, work.num_attended_pairs)
            )
            totals[name] = add_step(totals[name], work, took_s)
            if rng.random() < 0.7:  # the others are lost on the way
                times.on_report(told(name, totals[name]))
    known = {name: times.coefficients(InstanceId(name), Epoch(1)) for name in "abc"}
    assert known["c"] is None
    a, b = known["a"], known["b"]
    assert a is not None and b is not None
    assert seconds(DECODE, b) / seconds(DECODE, a) == pytest.approx(3.0, rel=0.05)
    newcomer = times.on_report(told("c", NO_STEPS))
    assert newcomer is not None
    assert seconds(DECODE, a) < seconds(DECODE, newcomer) < seconds(DECODE, b)


def test_a_restarted_instance_is_learned_anew_and_those_that_left_are_forgotten() -> None:
    times = StepTimes()
    a, again = (InstanceId("a"), Epoch(1)), (InstanceId("a"), Epoch(2))
    times.set_members([a])
    times.on_report(told("a", StepTotals(10, 0, 50, 0, 50, 200, 0, 1.0)))
    assert times.coefficients(*a) is not None
    times.set_members([again])
    assert times.coefficients(*a) is None
    assert times.on_report(told("a", StepTotals(1, 0, 5, 0, 5, 20, 0, 0.5), epoch=2)) is not None


def test_a_step_of_nothing_but_guesses_counts_its_tokens() -> None:
    work = StepWork(num_decode_tokens=12, num_decoding=3, num_context_tokens=900)
    seen = between(NO_STEPS, add_step(NO_STEPS, work, 0.01))
    assert seen is not None and seen.terms[:4] == (1.0, 12.0, 0.0, 3.0)
    assert SHAPE.min() > 0.0
