"""Does the core start and stop instances as wanted, whatever goes wrong on the way? Scripted events, no cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.effects import (
    AnnounceScaling,
    Effect,
    Refused,
    ScalingSet,
    SetDraining,
    StartInstance,
)
from orchestrator.errors import RefusalKind
from orchestrator.events import DrainRequested, ScaleRequested, Token
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.state import CoreParams, ScalingParams
from tests.support.core_play import CALLER, Cluster, answer, named
from tests.support.reports import request_load

SCALING = ScalingParams(can_start=True, most=4, capacity=4, first_epoch=2)


def cluster(num_instances: int = 2, **changes: object) -> Cluster:
    scaling = replace(SCALING, **changes)  # type: ignore[arg-type]
    made = Cluster(CoreParams(is_rebalancing=False, scaling=scaling), num_instances)
    made.tick()
    return made


def scale(play: Cluster, target: int | None = None, **limits: int | bool) -> list[Effect]:
    return play.on(ScaleRequested(CALLER, target, **limits))  # type: ignore[arg-type]


def refusal(effects: list[Effect]) -> str:
    result = answer(effects)
    assert isinstance(result, Refused) and result.kind is RefusalKind.PRECONDITION
    return result.reason


# ---------------------------------------------------------------------- by hand
def test_without_a_word_nothing_is_started_and_what_is_lost_is_not_replaced() -> None:
    play = cluster()
    play.dies(named(1))
    play.run(60)
    assert play.launches() == [] and play.stops() == [] and play.scaling.target is None


def test_scaling_out_starts_what_is_missing_under_free_names_and_new_epochs() -> None:
    play = cluster()
    result = answer(scale(play, 4))
    assert isinstance(result, ScalingSet) and (result.scaling.target, result.scaling.num_present) == (4, 2)
    play.run(3)
    assert play.launches() == [("instance-2", 2), ("instance-3", 3)]
    assert play.scaling.num_present == 4 and not play.scaling.starting
    (first, *_) = [effect for effect in play.effects if isinstance(effect, StartInstance)]
    assert first.reason == "4 instances are wanted: by hand" and first.signal_age_s == 0.0


def test_scaling_in_empties_the_cheapest_by_migration_and_stops_it_when_it_has_been_empty_for_a_moment() -> None:
    play = cluster()
    play.there[named(0)] = [request_load("r1"), request_load("r2")]
    play.there[named(1)] = [request_load("r3")]
    scale(play, 1)
    effects = play.tick()
    assert [effect.instance for effect in effects if isinstance(effect, SetDraining)] == ["instance-1"]
    assert play.scaling.retiring == (named(1),) and play.scaling.num_present == 1
    play.run(2)
    assert play.stops() == [], "empty, but not for long"
    play.run(3)
    assert play.stops() == [("instance-1", 1)]
    assert [one.request_id for one in play.there[named(0)]] == ["r1", "r2", "r3"], "nothing was lost"
    assert list(play.there) == ["instance-0"] and play.scaling.num_present == 1
    told = [effect for effect in play.effects if isinstance(effect, AnnounceScaling) and effect.instance == named(1)]
    assert told[0].reason == "scale in, the cheapest to empty; 1 instances are wanted: by hand"
    assert told[0].signal_age_s >= 0


def test_a_name_is_used_again_once_it_is_free_and_an_epoch_never_is() -> None:
    play = cluster()
    for target in (1, 2, 1, 2):
        scale(play, target)
        play.run(10)
        assert len(play.there) == target
    assert play.launches() == [("instance-1", 2), ("instance-1", 3)]
    assert play.stops() == [("instance-1", 1), ("instance-1", 2)]


def test_a_fleet_that_is_told_a_number_replaces_what_it_loses() -> None:
    play = cluster()
    scale(play, 2)
    play.dies(named(0))
    play.run(2)
    assert play.launches() == [("instance-0", 2)]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"target": 5}, "5 instances are outside the limits 1 to 4"),
        ({"target": 2, "fewest": 3}, "2 instances are outside the limits 3 to 4"),
        ({"most": 5}, "there are places for 4 instances, not for 5"),
        ({"fewest": 3, "most": 2}, "the fewest instances are 3, which is more than the most, 2"),
        ({"fewest": 0}, "there must be one at least"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(wanted: dict[str, int], words: str) -> None:
    play = cluster()
    before = play.scaling
    assert words in refusal(scale(play, **wanted))
    assert play.scaling == before


def test_an_orchestrator_that_cannot_start_instances_says_so() -> None:
    play = cluster(can_start=False, is_automatic=True)
    assert "cannot scale" in refusal(scale(play, 1))
    assert play.run(5) == []


def test_new_limits_bring_the_target_with_them() -> None:
    play = cluster()
    scale(play, fewest=3)
    assert play.scaling.target == 3
    scale(play, fewest=1, most=1)
    assert play.scaling.target == 1
    play.run(20)
    assert len(play.there) == 1


def test_the_last_one_that_serves_is_never_given_up() -> None:
    """Of two, one is drained by an operator; it counts, and is left alone."""
    play = cluster()
    play.on(DrainRequested(Token(7), named(1), wait=False))
    scale(play, 1)
    play.run(30)
    assert play.stops() == [] and len(play.there) == 2


def test_one_that_says_nothing_is_not_the_one_that_is_left() -> None:
    play = cluster()
    play.silent.add(named(0))
    play.run(3)
    scale(play, 1)
    play.run(10)
    assert play.stops() == [] and not play.scaling.retiring


def test_instances_are_given_up_one_after_the_other() -> None:
    play = cluster(4)
    scale(play, 1)
    for _ in range(40):
        play.tick()
        assert len(play.scaling.retiring) <= 1
    assert list(play.there) == ["instance-0"]


# ---------------------------------------------------------------------- by itself
FAST = AutoscaleParams(period_s=5.0, cooldown_s=5.0, settle_s=5.0)


def test_autoscaling_starts_one_for_one_need_and_gives_it_up_when_the_load_has_gone() -> None:
    play = cluster(1, is_automatic=True, autoscale=FAST)
    play.there[named(0)] = [request_load(f"r{number}", 95) for number in range(10)]
    play.start_error = ""
    play.run(60)
    assert play.launches() == [("instance-1", 2)], "while it is on its way it counts"
    play.comes(named(1), 2)
    play.there[named(0)], play.there[named(1)] = play.there[named(0)][:5], play.there[named(0)][5:]
    play.run(60)
    assert play.scaling.target == 2 and len(play.there) == 2, "one could not hold this"
    for requests in play.there.values():
        requests.clear()
    play.run(30)
    assert list(play.there) == ["instance-0"] and play.scaling.target == 1
    decisions = [effect for effect in play.effects if isinstance(effect, AnnounceScaling) and effect.instance is None]
    assert [effect.target for effect in decisions] == [2, 1]
    assert "below 160 for 5 s" in decisions[0].reason and "above 960 for 15 s" in decisions[1].reason
    assert all(0 <= effect.signal_age_s < 2 for effect in decisions)


def test_autoscaling_keeps_to_limits_and_can_be_switched_on_and_off() -> None:
    play = cluster(2, autoscale=FAST)
    scale(play, is_automatic=True, fewest=2)
    play.run(60)
    assert play.scaling.target == 2 and play.scaling.is_automatic
    scale(play, is_automatic=False, fewest=1)
    play.run(60)
    assert play.scaling.target == 2, "it was switched off"
    scale(play, is_automatic=True)
    play.run(60)
    assert play.scaling.target == 1 and len(play.there) == 1


def test_a_number_set_by_hand_holds_for_the_cool_down_when_autoscaling_is_on() -> None:
    play = cluster(1, is_automatic=True, autoscale=replace(FAST, cooldown_s=30.0))
    scale(play, 3)
    play.run(29)
    assert play.scaling.target == 3
    play.run(120)
    assert play.scaling.target == 1


def test_a_new_core_takes_what_is_there_for_what_is_wanted() -> None:
    """What an orchestrator does that replaces another: it is told who is there, and nothing else."""
    play = cluster(3, is_automatic=True, autoscale=FAST)
    play.tick()
    assert play.scaling.target == 3 and play.launches() == []
