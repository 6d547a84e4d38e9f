"""Do bounds hold in whatever order faults, operators and load come, and is the number reached once they have ceased?"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migration.types import InstanceId
from orchestrator.events import DrainRequested, ScaleRequested, Token, UndrainRequested
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.state import CoreParams, ScalingParams
from tests.support.core_play import Cluster
from tests.support.reports import request_load

UNTIMED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MOST = 4
SCALING = ScalingParams(
    can_start=True,
    most=MOST,
    capacity=MOST,
    first_epoch=2,
    start_timeout_s=20.0,
    retire_timeout_s=20.0,
    victim_rest_s=10.0,
    autoscale=AutoscaleParams(period_s=3.0, cooldown_s=3.0, settle_s=3.0),
)
NUMBER = st.integers(0, MOST - 1)
ACTIONS = st.one_of(
    *[st.tuples(st.just("tick"), st.integers(1, 25))] * 3,
    *[st.tuples(st.just("scale"), st.integers(0, MOST + 1))] * 2,
    st.tuples(st.just("fewest"), st.integers(1, MOST)),
    st.tuples(st.just("most"), st.integers(1, MOST + 1)),
    st.tuples(st.just("automatic"), st.integers(0, 1)),
    st.tuples(st.sampled_from(["die", "drain", "undrain", "silent", "heard", "load", "fixed", "ends"]), NUMBER),
    st.tuples(st.sampled_from(["starts fail", "starts hang", "starts work"]), st.just(0)),
    st.tuples(st.sampled_from(["stops hang", "stops work", "drains fail", "drains work"]), st.just(0)),
)


class Story:
    """A cluster, and what is done to it."""

    def __init__(self, laden: list[str]) -> None:
        """`laden`: what is on each instance at first."""
        self.play = Cluster(CoreParams(is_rebalancing=False, scaling=SCALING), len(laden))
        self.num = 0
        for number, kind in enumerate(laden):
            if kind:
                self.act(kind, number)

    def act(self, action: str, number: int) -> None:
        play = self.play
        self.num += 1
        there = sorted(play.there)
        instance = there[number % len(there)] if there else InstanceId("instance-0")
        match action:
            case "tick":
                play.run(number)
            case "scale":
                play.on(ScaleRequested(Token(self.num), target=number))
            case "fewest":
                play.on(ScaleRequested(Token(self.num), fewest=number))
            case "most":
                play.on(ScaleRequested(Token(self.num), most=number))
            case "automatic":
                play.on(ScaleRequested(Token(self.num), is_automatic=bool(number)))
            case "die":
                if instance in play.there:
                    play.dies(instance)
            case "drain":
                play.on(DrainRequested(Token(self.num), instance, wait=False))
            case "undrain":
                play.on(UndrainRequested(Token(self.num), instance))
            case "silent" | "heard":
                (play.silent.add if action == "silent" else play.silent.discard)(instance)
            case "load" | "fixed":
                if instance in play.there and instance not in play.draining:
                    request = request_load(f"r{self.num}", 200, movable=action == "load")
                    if sum(one.num_blocks for one in play.there[instance]) <= 800:
                        play.there[instance].append(request)
            case "ends":
                if play.there.get(instance):
                    play.there[instance].pop()
            case _:
                self.turn(action)

    def turn(self, fault: str) -> None:
        """A fault begins or ends."""
        play = self.play
        if fault.startswith("starts"):
            play.start_error = {"starts fail": "no place", "starts hang": "", "starts work": None}[fault]
        play.obeys_stop = {"stops hang": False, "stops work": True}.get(fault, play.obeys_stop)
        play.obeys_drain = {"drains fail": False, "drains work": True}.get(fault, play.obeys_drain)

    def check(self) -> None:
        scaling = self.play.scaling
        assert scaling.target is None or scaling.fewest <= scaling.target <= scaling.most <= MOST
        launches = self.play.launches()
        assert len(launches) == len(set(launches)), "an incarnation was started twice"
        assert len({epoch for _, epoch in launches}) == len(launches)
        assert scaling.num_present + len(scaling.starting) <= MOST + 1
        assert len(scaling.starting) <= SCALING.max_starting and len(scaling.retiring) <= SCALING.max_retiring


@UNTIMED
@given(
    st.lists(st.sampled_from(["fixed", "fixed", "load", ""]), min_size=1, max_size=3),
    st.integers(1, MOST).map(lambda first: [("scale", first), ("tick", 5)]),
    st.lists(ACTIONS, max_size=40),
    st.integers(1, MOST),
)
def test_bounds_hold_at_any_time_and_in_the_end_there_are_as_many_as_wanted(
    laden: list[str], opening: list[tuple[str, int]], actions: list[tuple[str, int]], wanted: int
) -> None:
    """The cluster itself asserts that no instance is stopped while a request is on it."""
    story = Story(laden)
    for action, number in (*opening, *actions):
        story.act(action, number)
        story.check()
    play = story.play
    play.start_error, play.obeys_stop, play.obeys_drain = None, True, True
    play.silent.clear()
    for requests in play.there.values():
        requests.clear()
    play.run(2)
    for instance in list(play.there):
        story.num += 1
        play.on(UndrainRequested(Token(10_000 + story.num), instance))
    play.on(ScaleRequested(Token(99_999), target=wanted, fewest=1, most=MOST, is_automatic=False))
    play.run(120)
    story.check()
    assert len(play.there) == wanted and play.scaling.num_present == wanted
    later = play.run(60)
    assert not [effect for effect in later if type(effect).__name__ in {"StartInstance", "StopInstance", "SetDraining"}]
