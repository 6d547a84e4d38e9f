"""What becomes of a start that fails, is late or is wanted no more?"""

from __future__ import annotations

import itertools

from orchestrator.effects import (
    AnnounceScaling,
    StartInstance,
    StopInstance,
)
from orchestrator.events import InstanceStartFailed
from tests.support.core_play import named, started
from tests.unit.orchestrator.test_scaling import cluster, scale


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
