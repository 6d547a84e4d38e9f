"""Do tables, charts, pages and result files of simulated days say what the days were, wherever they are read?"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from orchestrator.sim.chart import Chart, Line, svg
from orchestrator.sim.page import page
from orchestrator.sim.pictures import of_fleets, of_latencies, over_rates
from orchestrator.sim.result import Result, as_json, from_json
from orchestrator.sim.scales import Kind, Scale, label, scale_of
from orchestrator.sim.sheets import sheets_of
from orchestrator.sim.studies import studies_of, told_of
from tests.support.days import day

NAN = math.nan
ASKED = {
    "workload": "M-M",
    "requests_per_s": 2.0,
    "num_requests": 9,
    "num_instances": 2,
    "engine": {"num_blocks": 1_000},
}
SVG = "{http://www.w3.org/2000/svg}"


# ---------------------------------------------------------------------- tables
def test_each_arm_has_its_row_in_the_order_in_which_it_was_asked_for() -> None:
    answers, tokens, fleets = sheets_of([day("losing", seconds=9.0, num_failed=3), day("winning")])
    assert [row[0] for row in answers.rows] == ["losing", "winning"]
    assert answers.rows[0] == (
        "losing", "all", "100", "9.000", "-", "9.000", "90.00", "90.00", "-", "90.00", "900.0", "87.5", "3",
    )  # fmt: skip
    assert tokens.rows[1][-3:] == ("2", "1.5", "300")
    assert fleets.rows[0][1:4] == ("5", "1", "1.0") and fleets.rows[0][-1] == "2.00"
    assert fleets.note.count("5 committed") == 2 and "Migrations of losing: 1 cancelled, 5 committed." in fleets.note
    assert all(len(row) == len(sheet.columns) for sheet in (answers, tokens, fleets) for row in sheet.rows)


def test_several_days_are_a_mean_with_the_interval_of_their_means() -> None:
    rows = sheets_of([day("a", 1, 1.0), day("a", 2, 3.0)])[0].rows
    assert len(rows) == 1
    assert rows[0][3:5] == ("2.000", f"{12.706 * math.sqrt(2) / math.sqrt(2):.3f}")


def test_rates_stand_in_a_column_of_their_own_from_the_lowest_on() -> None:
    sheet = sheets_of([day("a", rate=3.0), day("b", rate=3.0), day("a", rate=1.5), day("b", rate=1.5)])[0]
    assert sheet.columns[:2] == ("requests/s", "arm")
    assert [row[:2] for row in sheet.rows] == [("1.5", "a"), ("1.5", "b"), ("3", "a"), ("3", "b")]


def test_ratios_are_of_days_that_both_have_lived() -> None:
    days = [day("ref", 1, 1.0), day("ref", 2, 2.0), day("a", 1, 2.0), day("a", 2, 4.0), day("a", 3, 99.0)]
    sheet = sheets_of(days, "ref")[-1]
    assert {row[0] for row in sheet.rows} == {"a"}
    assert sheet.rows[0] == ("a", "all", "TTFT, mean", "2.000", "2.000 .. 2.000", "worse", "2")
    alone = sheets_of([day("ref"), day("a", seconds=2.0)], "ref")[-1]
    assert alone.rows[0][3:] == ("2.000", "-", "-", "1")
    with pytest.raises(ValueError, match="there is no day of 'other'"):
        sheets_of(days, "other")


# ---------------------------------------------------------------------- scales, charts
def test_ticks_are_round_and_inside() -> None:
    assert Scale(Kind.LINEAR, 0.0, 1.0).ticks() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(Kind.LINEAR, -3.0, 12.0).ticks() == [0.0, 5.0, 10.0]
    assert Scale(Kind.LOG, 0.04, 3.0).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    assert Scale(Kind.LOG, 0.001, 1e7).ticks() == pytest.approx([0.001, 0.1, 10.0, 1e3, 1e5, 1e7])
    assert Scale(Kind.LOG, 2.1, 2.4).ticks() == pytest.approx([2.1, 2.15, 2.2, 2.25, 2.3, 2.35, 2.4], abs=0.011)
    assert Scale(Kind.BOTH, -50.0, 800.0).ticks() == [-10.0, 0.0, 10.0, 100.0]
    assert [label(value) for value in (0.0, -10.0, 12_500, 3e6, 0.05)] == [
        "0",
        "\N{MINUS SIGN}10",
        "12.5k",
        "3M",
        "0.05",
    ]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_scale_is_monotonous_and_puts_its_ends_at_its_ends(kind: Kind) -> None:
    scale = scale_of([0.5, 800.0, math.nan, math.inf], kind)
    shares = [scale.share(value) for value in (0.5, 1.0, 30.0, 800.0)]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert scale.share(1e9) == 1.0
    assert all(0.5 <= value <= 800 for value in scale.ticks())
    assert scale_of([], kind).share(0.5) > 0.0
    assert scale_of([7.0], kind).ticks()


def test_a_chart_breaks_its_lines_where_nothing_is_known_and_names_its_axes() -> None:
    line = Line("a <b>", [(0.0, 1.0), (1.0, 2.0), (2.0, NAN), (3.0, 1.0), (4.0, 2.0)], 0)
    drawn = ElementTree.fromstring(svg(Chart('it\'s "<&>"', "time, s", "requests, %", (line,))))
    paths = [path.get("d", "") for path in drawn.iter(f"{SVG}path") if (path.get("class") or "").startswith("l ")]
    assert len(paths) == 1 and paths[0].count("M") == 2 and paths[0].count("L") == 2
    assert {"time, s", "requests, %"} <= {text.text for text in drawn.iter(f"{SVG}text")}
    assert drawn.get("aria-label") == 'it\'s "<&>"'


def test_failed_requests_keep_a_line_below_all() -> None:
    chart = of_latencies([day("a", num_failed=2)], {"a": 0})[0]
    assert chart.lines[0].points[-1] == pytest.approx((1.0, 80.0))


def test_a_page_s_charts_are_of_each_arm() -> None:
    days = [day("a"), day("b", rate=2.0)]
    charts = {chart.title: chart for chart in of_fleets(days, {"a": 0, "b": 1})}
    assert {"Freeness, a", "Freeness, b", "Moves", "Instances"} <= charts.keys()
    assert [line.name for line in charts["Moves"].lines] == ["a", "b"]
    assert charts["Freeness, a"].y_scale == charts["Freeness, b"].y_scale
    assert over_rates(days, {"a": 0, "b": 1}) == []
    over = over_rates([day("a", rate=1.0, seconds=1.0), day("a", rate=2.0, seconds=100.0)], {"a": 0})
    assert over[0].lines[0].points == [(1.0, 1.0), (2.0, 100.0)] and over[0].y_kind is Kind.LOG


# ---------------------------------------------------------------------- pages, files
def test_a_page_is_well_formed_and_fetches_nothing() -> None:
    studies = studies_of(
        [Result([day("a <i>"), day("b", seconds=2.0)], ASKED), Result([day("a <i>", rate=3.0)], ASKED)]
    )
    text = page(studies, "b")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "i"}
    assert not re.search(r"url\(|@import|src=|href=", text)
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "".join(root.itertext()).count("a <i>") > 3
    assert len(list(root.iter("figure"))) > 8 and "viewport" in text and "prefers-color-scheme: dark" in text
    assert "Ratios to b" in text and "engine.num_blocks" in text


def test_a_result_is_read_as_it_was_written() -> None:
    written = [day("a"), replace(day("b"), curves={})]
    text = as_json(ASKED | {"targets": None}, written)
    assert "NaN" not in text and as_json(ASKED | {"targets": None}, written) == text
    found = from_json(text)
    assert found.question == ASKED | {"targets": None}
    assert repr(found.days) == repr(written)  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing", "Expecting value"),
        ("[]", "holds no simulated days"),
        ('{"days": [], "version": 1}', "holds no simulated days"),
        ('{"days": [], "version": 2}', "of version 2, this program reads version 1"),
        ('{"days": [{"arm": 3}], "version": 1}', "Expected `str`, got `int`"),
    ],
)
def test_another_file_is_no_result(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        from_json(text)


def test_days_of_the_same_question_stand_together_whatever_their_rate() -> None:
    other = Result([day("a")], ASKED | {"workload": "S-S"})
    found = studies_of(
        [Result([day("a")], ASKED), other, Result([day("b", rate=9.0)], ASKED | {"requests_per_s": 9.0})]
    )
    assert [[one.arm for one in study.days] for study in found] == [["a", "b"], ["a"]]
    assert [study.title for study in found] == [
        "M-M, 2 to 9 requests/s, 9 requests, 2 instances",
        "S-S, 2 requests/s, 9 requests, 2 instances",
    ]
    with pytest.raises(ValueError, match="the day of a with seed 1 at 2 requests/s is there twice"):
        studies_of([Result([day("a")], ASKED), Result([day("a")], ASKED)])


def test_what_was_asked_is_told_part_by_part() -> None:
    asked = json.loads('{"a": 1000, "b": {"c": 0.5, "d": null}, "e": ""}')
    assert told_of(asked) == [("a", "1,000"), ("b.c", "0.5")]
