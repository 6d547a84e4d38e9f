"""How are levels of priority written, and to which level does a number belong?"""

from __future__ import annotations

import pytest

from orchestrator.policy.levels import DEFAULT_LEVELS, BadLevel, Level, Levels, parse_levels
from orchestrator.policy.load import LoadParams, virtual_usage_blocks
from tests.support.idle_report import report

THREE = parse_levels("normal:0,high:-10:2048,low:10:64")


def test_levels_are_read_in_any_order_and_kept_the_most_urgent_first() -> None:
    assert THREE.levels == (Level("high", -10, 2048), Level("normal", 0, 0), Level("low", 10, 64))
    assert parse_levels(" High : -10 : 2048 , normal:0, low:+10:64,") == THREE


def test_the_default_has_three_ranks_and_no_headroom() -> None:
    default = parse_levels(DEFAULT_LEVELS)
    assert [level.name for level in default.levels] == ["high", "normal", "low"]
    assert default.load_params == LoadParams()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no level is named"),
        (" , ", "no level is named"),
        ("high", "'high' is no level: write NAME:RANK"),
        ("high:1:2:3", "is no level"),
        ("high:fast", "the rank of level high is 'fast', it must be a whole number"),
        ("high:99999999999", "the rank of level high"),
        ("high:2147483648", "the rank of level high"),
        ("high:0:-1", "the headroom of level high is '-1', it must be a whole number from 0"),
        ("high:0:1.5", "the headroom of level high"),
        ("high:0,high:1", "two levels have the name high"),
        ("high:0,higher:0", "two levels have the rank 0"),
        ("7:0", "'7' is no name of a level"),
        ("-a:0", "is no name of a level"),
        ("a b:0", "is no name of a level"),
        (",".join(f"l{n}:{n}" for n in range(17)), "17 levels are named, 16 are the most"),
    ],
)
def test_levels_that_make_no_sense_are_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(BadLevel, match=words) as caught:
        parse_levels(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "priority"),
    [("high", -10), (" HIGH ", -10), ("normal", 0), ("-3", -3), ("+4", 4), ("2147483647", 2**31 - 1)],
)
def test_a_priority_is_a_levels_name_or_a_number(text: str, priority: int) -> None:
    assert THREE.priority(text) == priority


@pytest.mark.parametrize("text", ["", "urgent", "1.5", "2147483648", "-2147483648", "1e3", "²", "9" * 5000])
def test_what_is_neither_is_told_with_the_levels_there_are(text: str) -> None:
    with pytest.raises(BadLevel, match=r"give a level \(high, normal, low\) or a whole number") as caught:
        THREE.priority(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("priority", "name"),
    [(-11, "high"), (-10, "high"), (-9, "normal"), (0, "normal"), (1, "low"), (10, "low"), (11, None)],
)
def test_a_number_is_of_the_most_urgent_level_whose_rank_it_reaches(priority: int, name: str | None) -> None:
    level = THREE.of(priority)
    assert (None if level is None else level.name) == name
    assert THREE.load_params.headroom(priority) == (0 if level is None else level.headroom_blocks)


def test_a_priority_is_shown_by_name_where_it_has_one() -> None:
    assert [THREE.shown(priority) for priority in (-10, 0, 3)] == ["high (-10)", "normal (0)", "3"]


def test_headroom_counts_once_for_each_level_that_runs_whatever_the_numbers() -> None:
    levels = Levels((Level("high", -10, 30), Level("normal", 0, 5)))
    busy = report(free_blocks=60, num_running=7, running_by_priority=((-12, 2), (-10, 3), (-1, 1), (4, 1), (9, 0)))
    assert virtual_usage_blocks(busy, levels.load_params) == 40 + 30 + 5
