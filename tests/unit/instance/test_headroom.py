"""How much must who comes leave free, beside whom?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.headroom import Headroom, kept_from, level_of
from orchestrator.policy.load import LoadParams

LEVELS: Headroom = ((-10, 30), (0, 0), (5, 7))


@pytest.mark.parametrize(
    ("priority", "running", "kept"),
    [
        (0, (), 0),
        (0, (-10,), 30),
        (0, (-10, -12, -40), 30),  # one level, counted once
        (-10, (-10,), 0),
        (-11, (-10,), 0),  # of the same level
        (-3, (-9,), 0),  # -9 does not reach the level of -10
        (0, (0, 5), 0),
        (5, (-10, 5), 30),  # its own level is not kept from it
        (6, (-10, 0, 5), 37),  # it reaches no level: whatever runs is more urgent
        (6, (7,), 0),
    ],
)
def test_what_is_kept_from_one_that_comes(priority: int, running: tuple[int, ...], kept: int) -> None:
    assert kept_from(LEVELS, priority, running) == kept


def test_without_headroom_nothing_is_kept() -> None:
    assert kept_from((), 0, (-10,)) == 0
    assert kept_from(((-10, 0), (0, 0)), 0, (-10,)) == 0


RANKS = st.lists(st.integers(-20, 20), max_size=5, unique=True)
PRIORITIES = st.lists(st.integers(-25, 25), max_size=6)


@given(RANKS, PRIORITIES)
def test_the_least_urgent_must_leave_what_virtual_usage_counts(ranks: list[int], running: list[int]) -> None:
    """Who reaches no level is kept from all that the fleet's policies count as used beside those that run."""
    levels = tuple((rank, abs(rank) % 7) for rank in sorted(ranks))
    counted = LoadParams(levels).headroom_of(tuple((one, 1) for one in set(running)))
    least_urgent = 1 + max([*ranks, *running], default=0)
    assert level_of(levels, least_urgent) is None
    assert kept_from(levels, least_urgent, running) == counted


@given(RANKS, PRIORITIES, st.integers(-25, 25), st.integers(0, 20))
def test_who_is_less_urgent_must_leave_no_less(ranks: list[int], running: list[int], priority: int, by: int) -> None:
    levels = tuple((rank, 3) for rank in sorted(ranks))
    assert kept_from(levels, priority, running) <= kept_from(levels, priority + by, running)
