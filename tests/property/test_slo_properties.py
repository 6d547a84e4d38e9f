"""Predicted attainment: the columns against the formula step by step, and dispatch that heeds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.messages import LoadReport, StepTotals
from migration.types import Epoch, InstanceId
from orchestrator.policy.admission import (
    MAX_PATIENCE_S,
    Admit,
    Asks,
    OnOverload,
    Queue,
    Reason,
    Reject,
    admit,
    patience_s,
)
from orchestrator.policy.dispatch import Choice, DispatchBook, NoChoice
from orchestrator.policy.slo import Pace, Predicted, SloParams, Wanted
from orchestrator.policy.targets import Targets
from tests.support.idle_report import report
from tests.support.slow_slo import predicted_tpot_s, predicted_ttft_s

OUTPUT = 100.0
NAMES = "abcd"


@st.composite
def loads(draw: st.DrawFn, name: str) -> LoadReport:
    total = draw(st.integers(1, 2000))
    free = draw(st.integers(0, total))
    head = draw(st.integers(0, 60))
    num_decoding = draw(st.integers(1, 5000))
    prefill = draw(st.integers(0, 100_000))
    return report(
        name,
        total_blocks=total,
        free_blocks=free,
        reserved_blocks=draw(st.integers(0, total - free)),
        num_running=draw(st.integers(0, 64)),
        num_waiting=draw(st.integers(0, 9)),
        head_of_line_blocks=head,
        waiting_blocks=draw(st.integers(0, 200)),
        max_step_tokens=draw(st.sampled_from([0, 16, 512, 8192])),
        max_running=draw(st.sampled_from([0, 8, 256])),
        steps=StepTotals(
            draw(st.integers(0, 1000)), prefill, num_decoding, prefill // 2, num_decoding, 300 * num_decoding,
            prefill * draw(st.integers(0, 500)), draw(st.floats(0.001, 100.0)),
        ),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_predictions_are_those_of_the_formula_step_by_step(data: st.DataObject) -> None:
    reports = [data.draw(loads(name)) for name in NAMES]
    pace = Pace(SloParams(expected_output_tokens=OUTPUT))
    pace.set_members([(InstanceId(name), Epoch(1)) for name in NAMES])
    for one in reports:
        pace.on_report(one)
    unseen = [data.draw(st.integers(0, 5)) for _ in NAMES]
    blocks = [count * data.draw(st.integers(1, 40)) for count in unseen]
    prompt = data.draw(st.integers(0, 9000))
    saved = [data.draw(st.integers(0, prompt)) for _ in NAMES]
    columns = np.array(unseen, dtype=float), np.array(blocks, dtype=float)
    ttft_s = pace.predicted_ttft_s(*columns, prompt, np.array(saved, dtype=float))
    tpot_s = pace.predicted_tpot_s(*columns, prompt)
    for row, one in enumerate(reports):
        learned = pace.times.coefficients(InstanceId(one.instance), Epoch(1))
        per = [0.0] * 6 if learned is None else [float(value) for value in learned]
        slow_s = predicted_ttft_s(
            one, per, unseen[row], blocks[row], prompt, expected_output_tokens=OUTPUT, saved_tokens=saved[row]
        )
        assert ttft_s[row] == pytest.approx(slow_s, rel=1e-9, abs=1e-12)
        slow_s = predicted_tpot_s(one, per, unseen[row], blocks[row], prompt)
        assert tpot_s[row] == pytest.approx(slow_s, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.data())
def test_one_that_is_predicted_to_meet_the_targets_is_chosen_before_all_others(data: st.DataObject) -> None:
    book = DispatchBook()
    book.set_members([(InstanceId(name), Epoch(1)) for name in NAMES])
    for name in NAMES:
        book.on_report(data.draw(loads(name)), 0.0)
    targets = Targets(data.draw(st.none() | st.floats(0.001, 30.0)), data.draw(st.none() | st.floats(0.0001, 1.0)))
    prompt = data.draw(st.integers(1, 900))
    demand = -(-(prompt + 1) // 16)
    excluded = {InstanceId(name) for name in data.draw(st.sets(st.sampled_from(NAMES), max_size=3))}
    plain = book.choose(demand, 0.0, excluded)
    found = book.choose(demand, 0.0, excluded, Wanted(prompt, targets))
    assert isinstance(plain, Choice) and isinstance(found, Choice) and found.predicted is not None
    zeros = np.zeros(len(NAMES))
    attainment = book.pace.attainment(Wanted(prompt, targets), zeros, zeros)
    large_enough = [one.report.total_blocks >= demand for one in book.view(0.0).instances]
    eligible = [row for row, name in enumerate(NAMES) if name not in excluded]
    eligible = [row for row in eligible if large_enough[row]] or eligible
    assert found.predicted.meets == any(attainment.meets[row] for row in eligible)
    chosen = next(row for row, name in enumerate(NAMES) if name == found.instance)
    if not found.predicted.meets:
        in_ttft = [bool(attainment.within_ttft[row]) for row in eligible]
        in_tpot = [bool(attainment.within_tpot[row]) for row in eligible]
        assert attainment.within_ttft[chosen] == any(in_ttft)
        assert attainment.within_tpot[chosen] == (any(in_tpot) and not any(in_ttft))
        if any(in_ttft) in (all(in_ttft), False) and any(in_tpot) == all(in_tpot):
            assert found.instance == plain.instance, "none is better than another: the freest"
    assert plain.predicted is None and found.instance not in excluded


def test_without_the_attainment_the_freest_is_chosen_though_it_is_too_slow() -> None:
    """The control: a free instance that is slow against a fuller one that is fast."""
    book = DispatchBook()
    book.set_members([(InstanceId(name), Epoch(1)) for name in "ab"])
    slow = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 100.0)
    fast = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 1.0)
    book.on_report(report("a", free_blocks=100, steps=slow), 0.0)
    book.on_report(report("b", free_blocks=60, num_running=2, steps=fast), 0.0)
    for_any, for_soon = (
        book.choose(2, 0.0),
        book.choose(2, 0.0, (), Wanted(20, Targets(ttft_s=0.2))),
    )
    assert isinstance(for_any, Choice) and isinstance(for_soon, Choice)
    assert (for_any.instance, for_soon.instance) == ("a", "b")


def test_where_no_instance_meets_both_targets_the_one_that_can_be_met_counts() -> None:
    book = DispatchBook()
    book.set_members([(InstanceId(name), Epoch(1)) for name in "abc"])
    slow = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 100.0)
    fast = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 1.0)
    busy: dict[str, object] = {"num_waiting": 8, "waiting_blocks": 300, "head_of_line_blocks": 8, "max_step_tokens": 16}
    book.on_report(report("a", free_blocks=100, steps=slow), 0.0)  # the freest; a second a step
    book.on_report(report("b", free_blocks=80, num_running=2, steps=fast, **busy), 0.0)  # fast, but many wait there
    book.on_report(report("c", free_blocks=60, num_running=2, steps=slow), 0.0)
    for targets, chosen in (
        (Targets(tpot_s=0.5), "b"),
        (Targets(ttft_s=1e-6, tpot_s=0.5), "b"),
        (Targets(ttft_s=2.0, tpot_s=1e-6), "a"),
        (Targets(ttft_s=1e-6, tpot_s=1e-6), "a"),
    ):
        found = book.choose(2, 0.0, (), Wanted(20, targets))
        assert isinstance(found, Choice) and found.instance == chosen, targets
    only_first = book.pace.attainment(Wanted(20, Targets(2.0, 0.5)), np.zeros(3), np.zeros(3))
    assert not only_first.meets.any() and list(only_first.narrow(np.array([True] * 3))) == list(only_first.within_ttft)


# ---- admission
choices = st.builds(
    Choice,
    st.just(InstanceId("a")),
    st.just(Epoch(1)),
    st.just("score"),
    st.just(0.1),
    st.none() | st.builds(Predicted, st.floats(0, 100), st.floats(0, 5), st.booleans(), st.floats(0, 100)),
)
founds = choices | st.builds(NoChoice, st.just("each has refused it"), st.booleans())
asks = st.builds(
    Asks,
    st.builds(Targets, st.none() | st.floats(0.001, 50), st.none() | st.floats(0.001, 2)),
    st.sampled_from(OnOverload),
)


@given(asks, founds, st.floats(0, 60))
def test_only_who_asked_for_it_is_sent_away_and_always_with_a_time_to_come_back(
    wants: Asks, found: Choice | NoChoice, waited_s: float
) -> None:
    verdict = admit(wants, found, waited_s)
    if isinstance(verdict, Reject):
        assert wants.on_overload is OnOverload.REJECT
        assert 1.0 <= verdict.retry_after_s <= 60.0 and verdict.retry_after_s == math.floor(verdict.retry_after_s)
        assert verdict.message and "\n" not in verdict.message
    elif isinstance(verdict, Queue):
        assert isinstance(found, NoChoice)
        assert wants.on_overload is OnOverload.QUEUE or verdict.reason is Reason.NOBODY
    else:
        assert isinstance(verdict, Admit) and verdict.choice is found
        is_met = found.predicted is None or found.predicted.meets
        assert is_met or wants.on_overload is OnOverload.QUEUE


@given(asks, st.floats(0.1, 60))
def test_a_target_lengthens_the_patience_of_who_queues_and_shortens_that_of_who_does_not(
    wants: Asks, timeout_s: float
) -> None:
    patience = patience_s(wants, timeout_s)
    if wants.targets.ttft_s is None:
        assert patience == timeout_s
    elif wants.on_overload is OnOverload.QUEUE:
        assert patience == max(timeout_s, min(wants.targets.ttft_s, MAX_PATIENCE_S))
    else:
        assert patience == min(timeout_s, wants.targets.ttft_s)
