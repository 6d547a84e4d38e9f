"""Does the step-time model learn real engines? Published times (KVFERRY_DATA) in random order, each predicted first.

`python -m bench.steptime` reports the whole tables.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from bench.steptime import WARM_UP, by_mean, by_model, p90
from bench.steptime_tables import Row, splitwise, vidur

NUM_ROWS = 400


def a_life(rows: list[Row]) -> list[Row]:
    rows = rows.copy()
    random.Random(0).shuffle(rows)
    return rows[:NUM_ROWS]


@pytest.fixture(scope="module")
def lives(data_dir: Path) -> dict[str, list[Row]]:
    tables = dict(splitwise(data_dir / "profiles" / "splitwise_perf_model.csv.gz"))
    tables["a100 llama2-70b tp2 (kernels)"] = vidur(data_dir / "profiles")
    return {name: a_life(rows) for name, rows in tables.items()}


def test_measured_steps_are_predicted_within_a_tenth_in_the_median(lives: dict[str, list[Row]]) -> None:
    assert len(lives) == 9
    for name, life in lives.items():
        errors = by_model(life)
        assert statistics.median(errors[WARM_UP:]) < 0.10, name
        assert p90(errors[WARM_UP:]) < 0.35, name
        assert statistics.median(errors[:WARM_UP]) < 0.15, f"{name}: from the first rows on"


def test_stalls_among_them_change_little(lives: dict[str, list[Row]]) -> None:
    for name, life in lives.items():
        assert statistics.median(by_model(life, stalls=True)[WARM_UP:]) < 0.12, name


def test_one_mean_for_all_steps_predicts_none_of_them(lives: dict[str, list[Row]]) -> None:
    """The control: what is predicted is not easy."""
    for name, life in lives.items():
        assert statistics.median(by_mean(life)[WARM_UP:]) > 0.5, name
