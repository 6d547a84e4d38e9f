"""Does the core start and stop instances as wanted, whatever goes wrong on the way? Scripted events, no cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.effects import (
    AnnounceScaling,
    DrainAccepted,
    Drained,
    Effect,
    Refused,
    ScalingSet,
    SetDraining,
    StartInstance,
    StopInstance,
    Undrained,
)
from orchestrator.errors import RefusalKind
from orchestrator.events import DrainRequested, InstanceStartFailed, ScaleRequested, Token, UndrainRequested
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.state import CoreParams, ScalingParams
from tests.support.core_play import CALLER, Cluster, answer, named, started
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


# ---------------------------------------------------------------------- starts that fail
def test_a_start_that_fails_is_tried_again_later_and_later_and_in_the_end_hardly_ever() -> None:
    play = cluster(1)
    play.start_error = "no node has a place"
    scale(play, 2)
    times: list[float] = []
    for _ in range(7200):
        if any(isinstance(effect, StartInstance) for effect in play.tick()):
            times.append(play.now_s)
    pauses = [round(later - earlier) for earlier, later in itertools.pairwise(times)]
    assert pauses == [10, 20, 40, 80, 160, 3600]
    assert len(set(play.launches())) == 7, "no epoch comes twice"
    assert {name for name, _ in play.launches()} == {"instance-1"}
    assert play.scaling.num_start_failures == 7 and play.scaling.retry_in_s > 0
    said = [effect.reason for effect in play.effects if isinstance(effect, AnnounceScaling)]
    assert "it did not start: no node has a place; next try in 10 s at the earliest" in said


def test_a_word_by_hand_has_it_tried_again_at_once() -> None:
    play = cluster(1)
    play.start_error = "no node has a place"
    scale(play, 2)
    play.tick()
    play.start_error = None
    scale(play, 2)
    play.tick()
    assert list(play.there) == ["instance-0", "instance-1"]
    play.run(40)
    assert play.scaling.num_start_failures == 0


def test_a_start_that_is_never_answered_is_given_up_and_ended_and_unwelcome_when_it_comes_after_all() -> None:
    play = cluster(1, start_timeout_s=60.0)
    play.start_error = ""
    scale(play, 2)
    play.run(59)
    assert play.scaling.starting == ("instance-1",) and play.stops() == []
    play.run(3)
    assert play.stops() == [("instance-1", 2)] and play.scaling.num_start_failures == 1
    effects = play.on(started(named(1), epoch=2))
    assert [type(effect) for effect in effects] == [StopInstance], "it is ended, and no gateway hears of it"
    assert play.on(InstanceStartFailed(named(1), play.effects[-1].epoch, "killed")) == []  # type: ignore[union-attr]
    play.start_error = None
    play.run(20)
    assert play.launches() == [("instance-1", 2), ("instance-1", 3)]


def test_an_instance_that_dies_soon_after_its_start_counts_as_a_start_that_failed() -> None:
    play = cluster(1)
    scale(play, 2)
    play.tick()
    play.dies(named(1))
    play.run(9)
    assert len(play.launches()) == 1 and play.scaling.num_start_failures == 1
    play.run(2)
    assert len(play.launches()) == 2
    play.run(31)
    play.dies(named(1))
    play.run(2)
    assert len(play.launches()) == 3, "after a while it is a loss like any other: replaced at once"


def test_a_start_that_is_wanted_no_more_is_ended() -> None:
    play = cluster(2)
    play.start_error = ""
    scale(play, 3)
    play.tick()
    scale(play, 2)
    play.tick()
    assert play.stops() == [("instance-2", 2)] and not play.scaling.starting
    play.run(10)
    assert len(play.launches()) == 1


def test_not_more_are_started_at_once_than_the_bound() -> None:
    play = cluster(1, max_starting=2)
    play.start_error = ""
    scale(play, 4)
    play.run(5)
    assert len(play.launches()) == 2


# ---------------------------------------------------------------------- on the way out
def test_what_cannot_be_moved_runs_to_its_end_and_then_the_instance_stops() -> None:
    play = cluster()
    for number in (0, 1):
        play.there[named(number)] = [request_load(f"fixed-{number}", movable=False)]
    scale(play, 1)
    play.run(300)
    assert play.stops() == [] and play.scaling.retiring == ("instance-1",)
    play.there[named(1)].clear()
    play.run(5)
    assert play.stops() == [("instance-1", 1)]


def test_an_instance_that_does_not_get_empty_is_put_back_and_left_alone_for_a_while() -> None:
    play = cluster(2, retire_timeout_s=60.0, victim_rest_s=120.0)
    play.there[named(1)] = [request_load("fixed", movable=False)]
    play.there[named(0)] = [request_load("fixed-too", movable=False, num_blocks=20)]
    scale(play, 1)
    play.run(59)
    assert play.draining == {named(0)} or play.draining == {named(1)}
    first = next(iter(play.draining))
    play.run(3)
    assert first not in play.draining and play.stops() == []
    back = [effect for effect in play.effects if isinstance(effect, SetDraining) and not effect.draining]
    assert back[0].reason == "not empty after 60 s, 1 requests are left"
    play.run(30)
    assert first not in play.draining, "the other is tried meanwhile"
    assert play.core.snapshot(play.now_s).instances[0].requests, "nothing was killed"


def test_an_instance_that_dies_while_it_is_emptied_is_what_was_wanted() -> None:
    play = cluster()
    play.there[named(1)] = [request_load("fixed", movable=False)]
    play.there[named(0)] = [request_load("a", 100), request_load("b", 100, movable=False)]
    scale(play, 1)
    play.run(2)
    assert play.scaling.retiring == ("instance-1",)
    play.dies(named(1))
    play.run(60)
    assert play.launches() == [] and play.scaling.num_start_failures == 0 and not play.scaling.retiring


def test_the_other_dies_while_one_is_emptied_and_that_one_is_put_back() -> None:
    play = cluster()
    for number in (0, 1):
        play.there[named(number)] = [request_load(f"fixed-{number}", movable=False)]
    scale(play, 1)
    play.run(2)
    (leaving,) = play.scaling.retiring
    play.dies(named(0) if leaving == named(1) else named(1))
    play.run(1)
    assert play.draining == set() and not play.scaling.retiring and play.launches() == []


def test_an_undrain_by_an_operator_stands_and_the_target_follows() -> None:
    play = cluster()
    for number in (0, 1):
        play.there[named(number)] = [request_load(f"fixed-{number}", movable=False)]
    scale(play, 1)
    play.run(2)
    (leaving,) = play.scaling.retiring
    assert answer(play.on(UndrainRequested(Token(5), InstanceId(leaving))), Token(5)) == Undrained(leaving)
    assert play.scaling.target == 2 and play.scaling.reason == f"{leaving} was put back by hand"
    play.run(300)
    assert play.stops() == [] and play.draining == set()


def test_one_that_was_told_to_stop_cannot_be_put_back_and_is_told_again() -> None:
    play = cluster(2, stop_retry_s=15.0)
    play.obeys_stop = False
    scale(play, 1)
    play.run(5)
    assert play.stops() == [("instance-1", 1)]
    assert "being stopped" in refusal(play.on(UndrainRequested(CALLER, named(1))))
    scale(play, 2)
    play.run(3)
    assert play.launches() == [("instance-2", 2)], "its name is not free yet"
    play.run(15)
    assert play.stops() == [("instance-1", 1)] * 2


def test_a_drain_by_an_operator_joins_the_one_that_is_under_way() -> None:
    play = cluster()
    scale(play, 1)
    play.obeys_stop = False
    play.there[named(1)], play.there[named(0)] = [request_load("fixed", movable=False)], [request_load("big", 500)]
    play.tick()
    (leaving,) = play.scaling.retiring
    again = play.on(DrainRequested(CALLER, InstanceId(leaving), wait=False))
    assert isinstance(answer(again), Refused)
    play.on(DrainRequested(Token(2), InstanceId(leaving), wait=True))
    play.there[InstanceId(leaving)].clear()
    assert answer(play.run(3), Token(2)) == Drained(InstanceId(leaving))


def test_an_instance_that_an_operator_has_drained_counts_and_is_not_replaced() -> None:
    play = cluster()
    scale(play, 2)
    assert isinstance(answer(play.on(DrainRequested(CALLER, named(1), wait=False))), DrainAccepted)
    play.run(60)
    assert play.launches() == [] and play.stops() == []


def test_an_instance_that_does_not_carry_out_the_drain_serves_on_and_is_left_alone_for_a_while() -> None:
    play = cluster()
    play.obeys_drain = False
    scale(play, 1)
    play.run(30)
    asked = [effect for effect in play.effects if isinstance(effect, SetDraining)]
    assert [effect.instance for effect in asked] == ["instance-1", "instance-0"], "each once, then both rest"
    assert all(item.state is State.SERVING for item in play.core.snapshot(play.now_s).instances)


def test_when_more_are_wanted_again_the_one_being_emptied_is_put_back_instead_of_starting_another() -> None:
    play = cluster()
    for number in (0, 1):
        play.there[named(number)] = [request_load(f"fixed-{number}", movable=False)]
    scale(play, 1)
    play.run(2)
    scale(play, 2)
    play.run(2)
    assert play.draining == set() and play.launches() == [] and play.scaling.num_present == 2


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
    assert "below 160 for 5 s" in decisions[0].reason and "above 960 for 5 s" in decisions[1].reason
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
