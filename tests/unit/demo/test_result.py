"""Does a result keep its shape through the file, and what becomes of figures that could not be taken?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from bench.report import write_result as bench_write_result
from orchestrator.demo.result import Result, quantile, read_result, spread_of, this_machine, write_result


def result(**figures: float | int | None) -> Result:
    return Result(
        name="demo",
        command="kvferry demo",
        made_at="2026-01-01T00:00:00+00:00",
        figures=dict(figures),
        arms={"moved": {"requests": 3}},
        n={"requests": 3},
        spread={"downtime_ms": spread_of([1.0, 2.0, 3.0])},
        machine=this_machine(),
    )


def test_a_result_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, result(committed_migrations=21))
    assert read_result(path) == result(committed_migrations=21)
    assert not list(path.parent.glob("*.part"))


def test_the_file_has_flat_figures_beside_arms_n_spread_and_machine(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", result(a=1, b=0.5))
    value = json.loads((tmp_path / "r.json").read_text())
    assert value["figures"] == {"a": 1, "b": 0.5}
    assert {"arms", "n", "spread", "machine", "command"} <= value.keys()


def test_a_figure_that_is_no_number_becomes_null(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", result(drain_s=math.nan))
    assert read_result(tmp_path / "r.json").figures == {"drain_s": None}


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"figures": {"a": {"nested": 1}}}')
    with pytest.raises(msgspec.ValidationError):
        read_result(tmp_path / "r.json")


def test_the_spread_names_quantiles_and_is_null_without_samples() -> None:
    assert spread_of([1.0, 2.0, 3.0])["median"] == 2.0
    assert spread_of([])["n"] == 0 and spread_of([])["p99"] is None
    assert quantile([1.0, 3.0], 50) == 2.0 and quantile([4.0], 99) == 4.0


def test_the_benches_write_with_the_same_writer() -> None:
    assert bench_write_result is write_result
