"""Do a suite's figures say what its days were: who waits longer, what priority costs, how many instances it took?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator import cli_simulate
from orchestrator.errors import ConfigError
from orchestrator.sim.compare import Question
from orchestrator.sim.day import Day
from orchestrator.sim.suite import (
    BANDS,
    INFAAS,
    OURS,
    PLAIN,
    SERVING,
    SWEEP_LOADS,
    THEIRS,
    URGENT_HEADROOM_BLOCKS,
    Asked,
    Lasted,
    Told,
    jobs,
)
from orchestrator.sim.suite_sheets import suite_sheets
from tests.support.days import day, figure, score


def told(make: Callable[[Asked], Day]) -> Told:
    return Told([Lasted(one, replace(make(one), seed=one.job[2])) for one in jobs(1)])


def as_it_is(asked: Asked) -> Day:
    """Every day alike."""
    scores = {"": score(1.0), "urgent": score(1.0), "normal": score(1.0)}
    return replace(day(asked.arm), scores=scores)


def test_days_alike_are_neither_better_nor_worse() -> None:
    figures = told(as_it_is).figures()
    for name in ("p99_ttft_gain_over_llumnix_geomean", "worst_mean_e2e_ratio", "high_gain", "high_gain_worst"):
        assert figures[name] == pytest.approx(1.0)
    for name in ("normal_p99_cost", "normal_p99_ttft_cost", "instance_hours_saving_matched", "never_worse_violations"):
        assert figures[name] == pytest.approx(0.0)
    assert figures["never_worse_rows"] == 2 * len(SERVING) * len(SWEEP_LOADS)


def test_a_shorter_tail_on_one_trace_is_its_root_in_the_mean_and_a_longer_latency_is_told_whole() -> None:
    def make(asked: Asked) -> Day:
        if (asked.part, asked.arm) == ("serving", OURS):
            return replace(as_it_is(asked), scores={"": score({"S-S": 0.5, "L-L": 1.5}.get(asked.row, 1.0))})
        return as_it_is(asked)

    figures = told(make).figures()
    assert figures["p99_ttft_gain_over_llumnix_geomean"] == pytest.approx((2.0 / 1.5) ** (1 / 5))
    assert figures["worst_mean_e2e_ratio"] == pytest.approx(1.5)


def test_what_the_urgent_gain_and_what_the_others_pay() -> None:
    def make(asked: Asked) -> Day:
        if (asked.part, asked.row, asked.arm) == ("priority", "CV 4", OURS):
            return replace(as_it_is(asked), scores={"": score(1.0), "urgent": score(0.25), "normal": score(1.2)})
        return as_it_is(asked)

    figures = told(make).figures()
    assert figures["high_gain"] == pytest.approx(4.0 ** (1 / 4)) and figures["high_gain_worst"] == pytest.approx(1.0)
    assert figures["normal_p99_cost"] == pytest.approx(0.2) and figures["normal_p99_ttft_cost"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("theirs", "ours", "saving"),
    [
        # (seconds, of which P99 is ten times as much; instances) by band
        (((0.1, 16.0), (0.5, 12.0), (1.0, 8.0)), ((0.1, 8.0), (0.5, 6.0), (1.0, 4.0)), 0.5),
        (((0.4, 12.0), (0.8, 10.0), (1.6, 8.0)), ((0.1, 12.0), (0.2, 10.0), (0.3, 8.0)), math.nan),
        (((1.0, 12.0), (2.0, 10.0), (4.0, 8.0)), ((1.0, 9.0), (2.0, 8.0), (4.0, 7.0)), 0.25),  # at 10 s: nearest to 5
        (((0.25, 12.0), (1.0, 8.0), (4.0, 4.0)), ((0.25, 10.0), (0.5, 10.0), (4.0, 10.0)), 0.0),  # half way by log
    ],
)
def test_instances_are_compared_at_equal_tails(
    theirs: tuple[tuple[float, float], ...], ours: tuple[tuple[float, float], ...], saving: float
) -> None:
    def make(asked: Asked) -> Day:
        if asked.part != "scaling":
            return as_it_is(asked)
        at = [f"{band.low_steps:g} to {band.high_steps:g}" for band in BANDS].index(asked.row)
        seconds, instances = {INFAAS: theirs, OURS: ours}[asked.arm][at]
        made = replace(as_it_is(asked), scores={"": score(seconds)})
        return replace(made, fleet=replace(made.fleet, mean_instances=instances))

    assert told(make).saving() == pytest.approx(saving, nan_ok=True)


def test_a_row_whose_whole_interval_lies_above_the_bar_is_a_violation() -> None:
    def make(asked: Asked) -> Day:
        if asked.part == "sweep" and asked.arm == OURS and asked.row in {"M-M 0.7", "L-L 1.1"}:
            sure = 1.3 if asked.row == "M-M 0.7" else (0.5, 3.0)[asked.job[2] % 2]
            worse = replace(score(1.0), latency_s=figure(10.0 * sure))
            return replace(as_it_is(asked), scores={"": worse})
        return as_it_is(asked)

    assert told(make).figures()["never_worse_violations"] == 1.0


def test_each_part_has_a_table_with_all_its_rows() -> None:
    sheets = suite_sheets(told(as_it_is))
    assert [len(sheet.rows) for sheet in sheets] == [5, 4, 2, 20]
    assert all(len(row) == len(sheet.columns) for sheet in sheets for row in sheet.rows)


def test_arms_of_a_row_get_the_same_requests_and_only_priority_tells_them_apart() -> None:
    by_row: dict[tuple[str, str, int], list[Question]] = {}
    for one in jobs(5):
        by_row.setdefault((one.part, one.row, one.job[2]), []).append(one.job[0])
    assert all(len(questions) == 2 for questions in by_row.values())
    for (part, _, seed), (first, second) in by_row.items():
        if part == "priority":
            times = [[arrival.at_s for arrival in question.arrivals(seed)] for question in (first, second)]
            assert times[0] == times[1]
            assert {first.urgent_headroom_blocks, second.urgent_headroom_blocks} == {0, URGENT_HEADROOM_BLOCKS}
        else:
            assert first == second
    assert {one.arm for one in jobs(5)} == {OURS, THEIRS, PLAIN, INFAAS, "nobody urgent"}


def test_a_suite_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--suite nothing: there is paper"):
        cli_simulate.compare(suite="nothing")
    with pytest.raises(ConfigError, match="--requests is 0"):
        cli_simulate.compare(suite="paper", requests=0)
