"""What becomes of an instance that is being emptied, whatever happens to it and to the others meanwhile?"""

from __future__ import annotations

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.effects import (
    DrainAccepted,
    Drained,
    Refused,
    SetDraining,
    Undrained,
)
from orchestrator.events import DrainRequested, Token, UndrainRequested
from tests.support.core_play import CALLER, answer, named
from tests.support.reports import request_load
from tests.unit.orchestrator.test_scaling import cluster, refusal, scale


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
