"""What becomes of requests with targets at the router: where they go, how long they wait, and what they are told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from instance.messages import StepTotals, Submit, SubmitAnswer
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Effect, Fail, Outgoing, RouterParams, Send
from orchestrator.policy.admission import Asks, OnOverload
from orchestrator.policy.targets import NO_TARGETS, Targets
from tests.support.idle_report import report

SLOW = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 100.0)
"""A second a step."""
FAST = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 1.0)
REJECT = OnOverload.REJECT


class Desk:
    """A router whose members are a, freer but slow, and b, fuller but fast; and time."""

    def __init__(self, names: str = "ab", **params: Any) -> None:
        self.router = Router("tcp://gateway", RouterParams(**params))
        self.now_s = 0.0
        self.members(names)
        self.heard(names)

    def members(self, names: str) -> None:
        self.router.set_members(
            [Incarnation(InstanceId(name), Epoch(1), f"tcp://{name}") for name in names], self.now_s
        )

    def heard(self, names: str = "ab") -> None:
        for name in names:
            load = report(name, steps=SLOW) if name == "a" else report(name, steps=FAST, num_running=3, free_blocks=50)
            self.router.on_message(msgspec.structs.replace(load, step=int(self.now_s * 1000)), self.now_s)

    def submit(self, request_id: str = "r", targets: Targets = NO_TARGETS, on: OnOverload = OnOverload.QUEUE) -> Any:
        asks = Asks(targets, on)
        outgoing = Outgoing(RequestId(request_id), "ext", 0, 31, 8, b"payload", lambda _: b"", asks)
        return self.checked(self.router.submit(outgoing, self.now_s))

    def refused(self, name: str, request_id: str = "r") -> list[Effect]:
        return self.checked(self.router.on_message(SubmitAnswer(request_id, name, 1, "its queue is full"), self.now_s))

    def after(self, seconds: float, heard: str = "ab") -> list[Effect]:
        self.now_s += seconds
        self.heard(heard)
        return self.checked(self.router.tick(self.now_s))

    def checked(self, effects: list[Effect]) -> list[Effect]:
        self.router.check_integrity()
        return effects


def sent_to(effects: list[Effect]) -> list[str]:
    return [one.address[-1] for one in effects if isinstance(one, Send) and type(one.message).__name__ == "Submit"]


def failure(effects: list[Effect]) -> Failure:
    (failed,) = [one for one in effects if isinstance(one, Fail)]
    return failed.failure


def test_a_request_in_a_hurry_goes_to_the_instance_that_is_fast_enough() -> None:
    assert sent_to(Desk().submit()) == ["a"], "the freest"
    assert sent_to(Desk().submit(targets=Targets(ttft_s=0.5))) == ["b"]
    assert sent_to(Desk().submit(targets=Targets(tpot_s=0.5))) == ["b"]


def test_one_that_nobody_can_serve_in_time_is_sent_all_the_same_unless_it_asked_to_be_rejected() -> None:
    assert sent_to(Desk().submit(targets=Targets(ttft_s=0.001))) == ["a"]
    told = failure(Desk().submit(targets=Targets(ttft_s=0.001), on=REJECT))
    assert (told.kind, told.reason, told.retry_after_s) == (FailureKind.SLO, "slo_ttft", 2.0)
    assert told.message.startswith("the first token is predicted in ") and told.message.endswith(
        "1 ms were asked for; please retry later"
    )
    told = failure(Desk().submit(targets=Targets(tpot_s=0.001), on=REJECT))
    assert (told.kind, told.reason) == (FailureKind.SLO, "slo_tpot")
    assert "further tokens are predicted every" in told.message


def test_one_that_asked_to_be_rejected_is_taken_where_its_targets_are_met() -> None:
    desk = Desk()
    assert sent_to(desk.submit(targets=Targets(ttft_s=0.5), on=REJECT)) == ["b"]
    assert desk.router.num_requests == 1


def test_it_is_rejected_when_the_one_fast_enough_refuses_it() -> None:
    desk = Desk()
    desk.submit(targets=Targets(ttft_s=0.5), on=REJECT)
    assert failure(desk.refused("b")).reason == "slo_ttft"
    assert desk.router.num_requests == 0


def test_it_does_not_wait_when_every_instance_refuses_it() -> None:
    desk = Desk()
    assert sent_to(desk.submit(on=REJECT)) == ["a"]
    assert sent_to(desk.refused("a")) == ["b"]
    told = failure(desk.refused("b"))
    assert (told.kind, told.reason) == (FailureKind.BUSY, "busy")
    assert told.message == "each of the 2 serving instances has refused it; please retry later"


def test_it_does_not_wait_behind_others_either() -> None:
    desk = Desk()
    desk.submit("first")
    desk.refused("a", "first")
    desk.refused("b", "first")
    told = failure(desk.submit("second", on=REJECT))
    assert (told.kind, told.message) == (FailureKind.BUSY, "others wait before it; please retry later")
    assert desk.router.num_requests == 1


def test_where_nobody_serves_it_waits_but_not_beyond_its_target() -> None:
    desk = Desk("", dispatch_timeout_s=5.0)
    assert desk.submit(targets=Targets(ttft_s=2.0), on=REJECT) == []
    assert desk.after(1.9, heard="") == []
    told = failure(desk.after(0.2, heard=""))
    assert told.kind is FailureKind.NOBODY


def test_one_whose_target_passed_while_it_waited_is_told_so_when_somebody_serves_again() -> None:
    desk = Desk("", dispatch_timeout_s=5.0)
    desk.submit(targets=Targets(ttft_s=2.0), on=REJECT)
    desk.now_s = 2.0
    desk.members("b")
    told = failure(desk.after(0.1, heard="b"))
    assert (told.kind, told.reason, told.retry_after_s) == (FailureKind.SLO, "slo_ttft_passed", 1.0)
    assert (
        told.message
        == "it waited 2100 ms for an instance, its first token was asked for in 2000 ms; please retry later"
    )


def test_what_is_left_of_the_target_is_what_counts_when_it_is_offered_again() -> None:
    desk = Desk("", dispatch_timeout_s=5.0)
    desk.submit("soon", targets=Targets(ttft_s=1.0), on=REJECT)
    desk.submit("later", targets=Targets(ttft_s=1.0))
    desk.now_s = 0.99
    desk.members("b")
    effects = desk.after(0.0, heard="b")
    assert failure(effects).reason == "slo_ttft", "10 ms are left"
    assert sent_to(effects) == ["b"], "the other takes what it gets"


def test_one_that_queues_waits_as_long_as_its_target_allows() -> None:
    desk = Desk(dispatch_timeout_s=5.0)
    desk.submit("patient", targets=Targets(ttft_s=60.0))
    desk.submit("ordinary")
    for _ in range(70):
        for request_id in ("patient", "ordinary"):
            desk.refused("a", request_id)
            desk.refused("b", request_id)
        desk.after(0.1)
    assert desk.router.num_requests == 1
    for _ in range(550):
        desk.refused("a", "patient")
        desk.refused("b", "patient")
        desk.after(0.1)
    assert desk.router.num_requests == 0
    assert desk.router.counts.failed[FailureKind.BUSY] == 2


@pytest.mark.parametrize("on", list(OnOverload))
def test_one_that_starts_anew_has_no_more_time_than_before(on: OnOverload) -> None:
    desk = Desk(orphan_grace_s=0.1)
    assert sent_to(desk.submit(targets=Targets(ttft_s=0.5), on=on)) == ["b"]
    desk.now_s = 0.6
    effects = desk.router.on_member_lost(InstanceId("b"), Epoch(1), desk.now_s) + desk.after(0.2, heard="a")
    if on is REJECT:
        assert failure(effects).reason == "slo_ttft_passed"
    else:
        assert sent_to(effects) == ["a"]


def test_an_instance_is_told_the_targets_and_how_long_the_request_has_waited() -> None:
    desk = Desk(orphan_grace_s=0.1)
    (first,) = desk.submit(targets=Targets(ttft_s=0.5, tpot_s=0.3))
    assert (first.message.ttft_s, first.message.tpot_s, first.message.waited_s) == (0.5, 0.3, 0.0)
    desk.now_s = 0.6
    again = desk.router.on_member_lost(InstanceId("b"), Epoch(1), desk.now_s) + desk.after(0.2, heard="a")
    (message,) = [one.message for one in again if isinstance(one, Send) and isinstance(one.message, Submit)]
    assert (message.ttft_s, message.tpot_s) == (0.5, 0.3)
    assert message.waited_s == pytest.approx(0.8)


def test_how_long_it_has_waited_is_told_without_targets_as_well() -> None:
    """Queues are in the order of arrival at the gateways."""
    desk = Desk(orphan_grace_s=0.1)
    (first,) = desk.submit()
    assert (first.message.ttft_s, first.message.tpot_s, first.message.waited_s) == (None, None, 0.0)
    desk.now_s = 0.6
    again = desk.router.on_member_lost(InstanceId("a"), Epoch(1), desk.now_s) + desk.after(0.2, heard="b")
    (message,) = [one.message for one in again if isinstance(one, Send) and isinstance(one.message, Submit)]
    assert message.waited_s == pytest.approx(0.8)
