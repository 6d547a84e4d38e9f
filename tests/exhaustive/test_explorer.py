"""Does the explorer find what is there, by the shortest way, and does the world do all that it is said to do?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.explorer import TooManyStates, explore
from tests.support.protocol_scenario import Disturbance
from tests.support.protocol_scenarios import CRASHES, FENCES, LIVE, ORDERS, WAITING, under
from tests.support.protocol_world import ProtocolWorld, World

WAYS = {0: (1, 2), 1: (3,), 2: (4,), 3: (5,), 4: (6,), 5: (6,), 6: (0,), 7: ()}


def steps(state: int) -> Iterator[tuple[str, int]]:
    for following in WAYS[state]:
        assert following != 7, "seven is not to be entered"
        yield f"{state} to {following}", following


def test_it_finds_the_shortest_way_to_a_fault() -> None:
    found = explore(0, steps, lambda s: "six" if s == 6 else None, is_rest=lambda _: True, max_states=10)
    assert found.broken is not None and found.broken.steps == ("0 to 2", "2 to 4", "4 to 6")
    assert str(found.broken) == "six\n  1. 0 to 2\n  2. 2 to 4\n  3. 4 to 6"


def test_a_sound_system_is_seen_as_a_whole() -> None:
    found = explore(0, steps, lambda _: None, is_rest=lambda s: s == 0, max_states=10)
    assert (found.num_states, found.num_steps, found.broken) == (7, 8, None)


def test_a_state_from_which_no_rest_can_be_reached_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, 5, (5,))
    found = explore(0, steps, lambda _: None, is_rest=lambda s: s == 0, max_states=10)
    assert found.broken is not None and found.broken.steps == ("0 to 1",)


def test_a_step_that_breaks_an_assertion_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, 4, (7,))
    found = explore(0, steps, lambda _: None, is_rest=lambda _: True, max_states=10)
    assert found.broken is not None and found.broken.why.startswith("seven") and len(found.broken.steps) == 2


def test_a_bound_that_is_reached_is_no_proof() -> None:
    with pytest.raises(TooManyStates):
        explore(0, steps, lambda _: None, is_rest=lambda _: True, max_states=3)


def test_the_world_loses_doubles_reorders_and_does_every_disturbance() -> None:
    seen: set[str] = set()
    num_crossed = 0

    def watched(world: ProtocolWorld) -> None:
        nonlocal num_crossed

        def successors(state: World) -> Iterator[tuple[str, World]]:
            nonlocal num_crossed
            following = list(world.successors(state))
            seen.update(step for step, _ in following)
            num_crossed += len({step for step, _ in following if step.endswith("arrives")}) > 1
            yield from following

        explore(world.start, successors, lambda _: None, is_rest=lambda _: True, max_states=100_000)

    watched(ProtocolWorld(under(LIVE)))
    for disturbances in (CRASHES, FENCES, ORDERS, (Disturbance.ABORT,)):
        watched(ProtocolWorld(under(WAITING, *disturbances, in_flight=1)))
    assert num_crossed > 100  # two messages on their way, either first
    for kind in ("Reserve", "Prepare", "Grow", "Commit", "Cancel", "Reserved", "Prepared", "Grown", "Committed"):
        assert {f"{kind} arrives", f"{kind} arrives, and will again", f"{kind} is lost"} <= seen
    for name in ("resend", "phase", "deadline"):
        assert f"source: timer {name}" in seen
    assert {
        "destination: timer lease",
        "the source crashes",
        "the destination crashes",
        "the source comes back, knowing nothing",
        "the destination comes back, knowing nothing",
        "the source is declared dead",
        "the destination is declared dead",
        "the source hears that the destination's epoch has ended",
        "the destination hears that the source's epoch has ended",
        "the client leaves",
        "the source hears that the client left",
        "the destination hears that the client left",
        "it finishes at the source",
        "the agent calls it off",
        "the destination shuts down",
    } <= seen
