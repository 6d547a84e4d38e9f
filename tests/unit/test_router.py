"""Where each request of a gateway is, and what is sent about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from instance.messages import (
    ALL_CACHED,
    Abort,
    Frame,
    LoadReport,
    OutputEntry,
    OwnerChanged,
    Submit,
    SubmitAnswer,
    Subscribe,
)
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Deliver, Effect, Fail, Outgoing, RouterParams, Send
from orchestrator.tuning import MIN_STALE_S
from tests.support.idle_report import report

GATEWAY = "tcp://gateway"


class Desk:
    """A router with its clock, and members a, b, ... that have all reported at 0 s."""

    def __init__(self, names: str = "ab", **params: Any) -> None:
        self.router = Router(GATEWAY, RouterParams(**params))
        self.now_s = 0.0
        self.steps = 0
        self.members(names)
        for name in names:
            self.says(self.report(name))

    def members(self, names: str) -> list[Effect]:
        return self.checked(
            self.router.set_members(
                [Incarnation(InstanceId(name), Epoch(1), f"tcp://{name}") for name in names], self.now_s
            )
        )

    def report(self, name: str, **changes: Any) -> LoadReport:
        self.steps += 1
        return msgspec.structs.replace(report(name, **changes), step=self.steps)

    def says(self, message: Any) -> list[Effect]:
        return self.checked(self.router.on_message(message, self.now_s))

    def answers(
        self, name: str, request_id: str = "r", refusal: str | None = None, final: bool = False
    ) -> list[Effect]:
        return self.says(SubmitAnswer(request_id, name, 1, refusal, final))

    def frame(self, name: str, *entries: OutputEntry) -> list[Effect]:
        return self.says(Frame(name, 1, self.steps, 0.0, entries, self.report(name)))

    def submit(self, request_id: str = "r", priority: int = 0) -> list[Effect]:
        outgoing = Outgoing(
            RequestId(request_id), "ext", priority, 31, 8, b"payload", lambda name: f"payload of {name}".encode()
        )
        return self.checked(self.router.submit(outgoing, self.now_s))

    def after(self, seconds: float, heard: str = "ab") -> list[Effect]:
        """Time passes, these members report, then the tick."""
        self.now_s += seconds
        for name in heard:
            self.says(self.report(name))
        effects = self.checked(self.router.tick(self.now_s))
        return [one for one in effects if not (isinstance(one, Send) and isinstance(one.message, Subscribe))]

    def checked(self, effects: list[Effect]) -> list[Effect]:
        self.router.check_integrity()
        return effects


def submitted_to(effects: Iterable[Effect]) -> list[str]:
    return [one.address[-1] for one in effects if isinstance(one, Send) and isinstance(one.message, Submit)]


def aborted_at(effects: Iterable[Effect]) -> list[str]:
    return [one.address[-1] for one in effects if isinstance(one, Send) and isinstance(one.message, Abort)]


def failures(effects: Iterable[Effect]) -> list[Fail]:
    return [one for one in effects if isinstance(one, Fail)]


def token(offset: int, finish: int | None = None, request_id: str = "r") -> OutputEntry:
    return OutputEntry(request_id, offset, (100 + offset,), finish_reason=finish)


def test_members_are_subscribed_to_at_once_and_every_second() -> None:
    desk = Desk("")
    subscribe = Subscribe(GATEWAY, 5.0, cached_from=ALL_CACHED, interval_s=1 / 4_000)
    assert desk.members("a") == [Send("tcp://a", subscribe)]
    assert desk.router.tick(0.5) == []
    assert desk.router.tick(1.0) == [Send("tcp://a", subscribe)]


def test_the_members_of_a_large_fleet_are_asked_for_reports_less_often() -> None:
    params = RouterParams(max_reports_per_s=4.0, max_report_interval_s=0.7)
    router = Router(GATEWAY, params)

    def asked_s(names: str) -> set[float]:
        members = [Incarnation(InstanceId(name), Epoch(1), f"tcp://{name}") for name in names]
        effects = router.set_members(members, 0.0)
        return {
            one.message.interval_s for one in effects if isinstance(one, Send) and isinstance(one.message, Subscribe)
        }

    assert asked_s("a") == {0.25}
    assert asked_s("ab") == {0.5}
    assert asked_s("abcdef") == {0.7}, "but no less often than this"


def test_reports_come_before_any_operator_can_have_them_count_as_stale() -> None:
    assert RouterParams().report_interval_s(10**6) < MIN_STALE_S


def test_a_request_is_sent_with_the_epoch_and_the_sequence_and_its_tokens_come_back() -> None:
    desk = Desk()
    (sent,) = desk.submit()
    message = Submit("r", "ext", GATEWAY, 1, 1, 0, 31, 8, b"payload")
    assert sent == Send("tcp://a", message)
    assert desk.answers("a") == []
    assert desk.frame("a", token(0), token(1)) == [Deliver(("a", 1), (token(0), token(1)), 0.0)]  # type: ignore[arg-type]
    assert desk.router.num_requests == 1
    desk.frame("a", token(2, finish=1))
    assert desk.router.num_requests == 0


def test_one_request_can_be_ended_by_the_operator_and_the_others_go_on() -> None:
    desk = Desk()
    desk.submit("r")
    desk.submit("s")
    failure = Failure(FailureKind.CANCELLED, "ended")
    effects = desk.checked(desk.router.fail_all(failure, [RequestId("r")]))
    assert failures(effects) == [Fail(RequestId("r"), failure)] and sorted(aborted_at(effects)) == ["a", "b"]
    assert desk.checked(desk.router.fail_all(failure, [RequestId("r")])) == [], "it is not here any more"
    assert desk.router.num_requests == 1


def test_requests_alternate_between_equal_instances() -> None:
    desk = Desk()
    assert [submitted_to(desk.submit(f"r{n}")) for n in range(4)] == [["a"], ["b"], ["a"], ["b"]]


def test_a_refusal_sends_the_request_to_the_next_instance() -> None:
    desk = Desk()
    assert submitted_to(desk.submit()) == ["a"]
    assert submitted_to(desk.answers("a", refusal="draining")) == ["b"]
    assert desk.answers("b") == []
    assert desk.router.counts.refused == 1


def test_an_instance_that_refused_may_still_become_the_owner_by_migration() -> None:
    desk = Desk()
    desk.submit()
    desk.answers("a", refusal="queue is full")
    desk.frame("b", token(0))
    desk.says(OwnerChanged("r", "a", 1, 1))
    assert desk.frame("a", token(1)) == [Deliver((InstanceId("a"), Epoch(1)), (token(1),), 0.0)]
    assert desk.router.counts.moved == 1


def test_a_final_refusal_is_the_clients_fault_and_ends_the_request() -> None:
    desk = Desk()
    desk.submit()
    assert desk.answers("a", refusal="40 blocks are more than 32", final=True) == [
        Fail(RequestId("r"), Failure(FailureKind.IMPOSSIBLE, "40 blocks are more than 32"))
    ]


def test_when_all_refuse_it_waits_is_offered_again_and_fails_as_busy_in_the_end() -> None:
    desk = Desk(dispatch_timeout_s=5.0)
    desk.submit()
    desk.answers("a", refusal="queue is full")
    assert desk.answers("b", refusal="queue is full") == []
    assert submitted_to(desk.after(0.05)) == ["a"]
    desk.answers("a", refusal="queue is full")
    desk.answers("b", refusal="queue is full")
    message = "every instance is busy (b: queue is full); please retry later"
    assert desk.after(5.0) == [Fail(RequestId("r"), Failure(FailureKind.BUSY, message))]


def test_when_nobody_serves_it_waits_for_somebody_and_then_fails_as_nobody() -> None:
    desk = Desk("", dispatch_timeout_s=5.0)
    assert desk.submit() == []
    assert desk.submit("s") == []
    desk.members("a")
    desk.says(desk.report("a", state="starting"))
    assert desk.after(4.0, heard="") == []
    desk.says(desk.report("a"))
    assert submitted_to(desk.after(0.05, heard="")) == ["a", "a"]
    lonely = Desk("")
    lonely.submit()
    (failed,) = lonely.after(5.1, heard="")
    failure = Failure(FailureKind.NOBODY, "no instance is ready yet; please retry later")
    assert failed == Fail(RequestId("r"), failure)


def test_those_that_wait_go_by_priority_and_then_by_arrival_and_nobody_overtakes_them() -> None:
    desk = Desk("")
    for request_id, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -5)):
        desk.submit(request_id, priority)
    desk.members("a")
    desk.says(desk.report("a"))
    assert desk.submit("newcomer") == [], "others wait before it"
    sent = [one.message.request_id for one in desk.after(0.05, heard="") if isinstance(one, Send)]  # type: ignore[union-attr]
    assert sent == ["urgent", "first", "second", "newcomer", "late"]


def test_the_queue_of_those_that_wait_is_bounded() -> None:
    desk = Desk("", max_waiting=1)
    desk.submit()
    (failed,) = failures(desk.submit("s"))
    assert failed.failure.kind is FailureKind.BUSY


def wire_ids(effects: Iterable[Effect]) -> list[str]:
    return [one.message.request_id for one in effects if isinstance(one, Send) and isinstance(one.message, Submit)]


def test_an_unanswered_submission_is_taken_back_and_made_anew_a_bounded_number_of_times() -> None:
    """A lost answer is unknown, not no: the same id, sent again, could run twice (there, and where it has moved)."""
    desk = Desk(max_attempts=3)
    assert wire_ids(desk.submit()) == ["r"]
    assert desk.after(9.9) == []
    effects = desk.after(0.2)
    assert (wire_ids(effects), aborted_at(effects)) == (["r~2"], ["a", "b"])
    assert desk.answers("a") == []
    assert desk.frame("a", token(0)) == [], "the first attempt counts for nothing any more"
    assert wire_ids(desk.after(10.1)) == ["r~3"]
    (failed,) = failures(desk.after(10.1))
    assert failed.failure.message == "3 instances were lost before they answered; please retry later"


def test_a_submission_that_a_long_step_holds_up_is_not_made_anew_until_its_instance_is_silent() -> None:
    desk = Desk("a")
    desk.submit()
    for _ in range(5):
        desk.now_s += 10.0
        desk.says(desk.report("a", submits_seen=1))
        assert wire_ids(desk.checked(desk.router.tick(desk.now_s))) == []
    assert desk.after(9.9, heard="") != [], "its report is not fresh any more: it may have forgotten"
    assert desk.router.counts.redispatched == 1


def test_a_submission_the_instance_has_seen_is_made_anew_when_its_answer_must_be_lost() -> None:
    desk = Desk("a")
    desk.submit()
    desk.now_s = 120.1
    desk.says(desk.report("a", submits_seen=1))
    assert wire_ids(desk.checked(desk.router.tick(desk.now_s))) == ["r~2"]


def test_an_instance_whose_inbox_is_full_is_passed_over() -> None:
    desk = Desk()
    desk.submit()
    assert submitted_to(desk.checked(desk.router.on_unsent("r", 0.0))) == ["b"]
    assert desk.checked(desk.router.on_unsent("r", 0.0)) == []
    assert desk.router.on_unsent("r", 0.0) == [], "it waits now"


def test_a_token_counts_as_the_answer() -> None:
    desk = Desk()
    desk.submit()
    desk.frame("a", token(0))
    assert desk.after(2.0) == []
    assert desk.answers("a", refusal="too late") == []


def test_an_abort_goes_to_every_member_and_the_late_tokens_nowhere() -> None:
    desk = Desk()
    desk.submit()
    assert aborted_at(desk.checked(desk.router.abort(["r", "unknown"]))) == ["a", "b"]
    assert desk.frame("a", token(0)) == []
    assert desk.router.abort(["r"]) == []


def test_an_abort_of_one_that_was_never_sent_is_told_to_nobody() -> None:
    desk = Desk("")
    desk.submit()
    desk.members("ab")
    assert desk.router.abort(["r"]) == []
    assert desk.router.num_requests == 0


def test_stopping_fails_every_request_here_and_aborts_it_there() -> None:
    desk = Desk()
    desk.submit("r")
    desk.submit("s")
    effects = desk.checked(desk.router.fail_all(Failure(FailureKind.STOPPING, "bye")))
    assert {failed.request_id for failed in failures(effects)} == {"r", "s"}
    assert aborted_at(effects) == ["a", "b"]
    assert desk.router.num_requests == 0
