"""What becomes of the requests of an instance that dies or falls silent, and of tokens that are missing?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from instance.messages import (
    OutputEntry,
    OwnerChanged,
    PriorityChanged,
    Submit,
)
from migration.types import Epoch, InstanceId, RequestId
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.types import Deliver, Effect, Fail, Forget, Send
from tests.unit.test_router import Desk, aborted_at, failures, submitted_to, token, wire_ids


def test_a_request_without_tokens_starts_again_when_its_instance_dies() -> None:
    desk = Desk()
    desk.submit()
    desk.answers("a")
    assert desk.checked(desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)) == [Forget("tcp://a")]
    assert desk.after(0.4, heard="b") == [], "it may have moved; the news has a moment to arrive"
    effects = desk.after(0.2, heard="b")
    (sent,) = [one.message for one in effects if isinstance(one, Send) and isinstance(one.message, Submit)]
    assert (sent.request_id, sent.external_id, sent.payload) == ("r~2", "ext", b"payload of r~2")
    assert submitted_to(effects) == ["b"]
    assert desk.frame("a", token(0)) == [], "what the dead one still says is dropped"
    assert desk.frame("b", token(0, request_id="r~2")) == [Deliver((InstanceId("b"), Epoch(1)), (token(0),), 0.0)], (
        "and the client's id comes back"
    )
    assert aborted_at(desk.checked(desk.router.abort(["r"]))) == ["b"]


def priorities(effects: Iterable[Effect]) -> list[int]:
    return [one.message.priority for one in effects if isinstance(one, Send) and isinstance(one.message, Submit)]


def test_what_is_dispatched_anew_has_the_priority_it_was_given_meanwhile() -> None:
    """1. a takes the request. 2. Its priority is changed there. 3. a dies before any token, b gets it, refuses, and a
    third attempt waits here."""
    desk = Desk()
    assert priorities(desk.submit(priority=5)) == [5]
    desk.answers("a")
    assert desk.says(PriorityChanged("r", "a", 1, -10)) == []
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    anew = desk.after(0.6, heard="b")
    assert submitted_to(anew) == ["b"] and priorities(anew) == [-10]
    desk.answers("b", "r~2", refusal="queue is full")
    desk.submit("later", priority=-9)
    assert priorities(desk.after(0.05, heard="b"))[0] == -10, "and its place among those that wait here is by it"


def test_a_new_priority_of_a_request_nobody_has_heard_of_changes_nothing() -> None:
    desk = Desk()
    assert desk.says(PriorityChanged("r", "a", 1, -10)) == []
    assert priorities(desk.submit(priority=5)) == [5]


def submits(effects: Iterable[Effect]) -> list[Submit]:
    return [one.message for one in effects if isinstance(one, Send) and isinstance(one.message, Submit)]


def test_a_request_with_tokens_goes_on_after_them_elsewhere_when_its_instance_dies() -> None:
    desk = Desk()
    desk.submit("r")
    desk.submit("s")
    desk.frame("a", token(0), token(1))
    desk.frame("b", token(0, request_id="s"))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    effects = desk.after(0.6, heard="b")
    (sent,) = submits(effects)
    assert (sent.request_id, sent.output_token_ids, sent.num_prompt_tokens) == ("r~2", (100, 101), 31)
    assert failures(effects) == [] and submitted_to(effects) == ["b"]
    assert desk.frame("b", token(1, request_id="s"))
    assert desk.frame("a", token(2)) == [], "what the dead one still says is dropped"
    assert desk.frame("b", token(2, request_id="r~2")) == [Deliver((InstanceId("b"), Epoch(1)), (token(2),), 0.0)]
    assert desk.frame("b", token(1, request_id="r~2")) == [], "each token once"
    assert (desk.router.counts.redispatched, desk.router.counts.revived) == (1, 1)


def test_what_was_delivered_after_it_had_gone_on_elsewhere_goes_along_when_that_dies_too() -> None:
    desk = Desk("abc")
    desk.submit("r")
    desk.frame("a", token(0))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    (first,) = submits(desk.after(0.6, heard="bc"))
    assert first.output_token_ids == (100,)
    desk.answers("b", "r~2")
    desk.frame("b", token(1, request_id="r~2"), token(2, request_id="r~2"))
    desk.router.on_member_lost(InstanceId("b"), Epoch(1), desk.now_s)
    (second,) = submits(desk.after(0.6, heard="c"))
    assert (second.request_id, second.output_token_ids) == ("r~3", (100, 101, 102))


def test_a_request_that_engines_die_of_ends_with_an_error_before_it_has_ended_all() -> None:
    desk = Desk("abc", max_attempts=2)
    desk.submit("r")
    desk.frame("a", token(0))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    assert submitted_to(desk.after(0.6, heard="bc")) == ["b"]
    desk.answers("b", "r~2")
    desk.router.on_member_lost(InstanceId("b"), Epoch(1), desk.now_s)
    effects = desk.after(0.6, heard="c")
    message = "2 instances were lost while they ran this request; please retry later"
    assert failures(effects) == [Fail(RequestId("r"), Failure(FailureKind.INSTANCE_LOST, message))]
    assert submitted_to(effects) == []


def test_one_that_no_other_instance_can_go_on_with_may_be_asked_anew() -> None:
    """Such as where vLLM runs without what moves requests: no mistake of its client's."""
    desk = Desk()
    desk.submit("r")
    desk.frame("a", token(0))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    desk.after(0.6, heard="b")
    (failed,) = failures(desk.answers("b", "r~2", refusal="it cannot", final=True))
    assert failed.failure.kind is FailureKind.INSTANCE_LOST and "(it cannot); please retry" in failed.failure.message


def test_its_demand_is_that_of_its_prompt_and_its_output() -> None:
    desk = Desk()
    desk.submit("r")
    desk.frame("a", OutputEntry("r", 0, tuple(range(49))))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    assert submitted_to(desk.after(0.6, heard="b")) == ["b"]
    (seen,) = desk.router.view(desk.now_s).instances
    assert seen.dispatched_blocks == -(-(31 + 49 + 1) // 16)


def test_a_request_that_moved_just_before_its_source_died_goes_on() -> None:
    """1. a runs it; 2. b commits; 3. a dies; 4. the death is heard before the change of owner."""
    desk = Desk()
    desk.submit()
    desk.frame("a", token(0))
    desk.router.on_member_lost(InstanceId("a"), Epoch(1), 0.0)
    desk.says(OwnerChanged("r", "b", 1, 1))
    assert desk.after(1.0, heard="b") == []
    assert desk.frame("b", token(1)) == [Deliver((InstanceId("b"), Epoch(1)), (token(1),), 0.0)]


def test_a_request_that_moved_unheard_to_an_instance_that_died_does_not_hang_for_ever() -> None:
    """1. a runs it; 2. c commits and dies before a word of it arrives; 3. a has it no more, and says nothing."""
    desk = Desk("abc")
    desk.submit("r")
    desk.answers("a")
    desk.submit("s")
    desk.answers("b", "s")
    desk.router.on_member_lost(InstanceId("c"), Epoch(1), 0.0)
    assert desk.after(59.0) == []
    desk.frame("b", token(0, request_id="s"))
    effects = desk.after(1.1)
    assert wire_ids(effects) == ["r~2"]
    assert aborted_at(effects) == ["a", "b"]
    assert failures(effects) == [], "the one that goes on is under no suspicion"


def test_an_instance_that_was_empty_and_took_nothing_when_it_ended_makes_nobody_suspect() -> None:
    """1. `b` is drained. 2. It says that it drains and is empty. 3. It is stopped. 4. A request at `a` is silent for
    long, since it waits for memory there."""
    desk = Desk(suspect_for_s=60.0)
    desk.submit()
    desk.frame("a", token(0))
    desk.says(desk.report("b", state="draining"))
    desk.router.on_member_lost(InstanceId("b"), Epoch(1), desk.now_s)
    desk.members("a")
    for _ in range(100):
        assert failures(desk.after(1.0, heard="a")) == []
    assert desk.frame("a", token(1)) == [Deliver(("a", 1), (token(1),), 0.0)]  # type: ignore[arg-type]


@pytest.mark.parametrize("last_word", [{"state": "draining", "num_running": 1}, {"state": "serving"}])
def test_an_instance_that_was_not_empty_or_not_draining_when_it_ended_makes_others_suspect(
    last_word: dict[str, Any],
) -> None:
    desk = Desk(suspect_for_s=60.0)
    desk.submit()
    desk.frame("a", token(0))
    desk.says(desk.report("b", **last_word))
    desk.members("a")
    assert desk.after(60.0, heard="a") == []
    assert wire_ids(desk.after(1.0, heard="a")) == ["r~2"]


def test_a_silent_instance_loses_its_requests_and_its_late_tokens_do_not_mix_in() -> None:
    """1. a falls silent; 2. its request starts again at b; 3. a wakes up and has tokens, too."""
    desk = Desk()
    desk.submit()
    desk.answers("a")
    effects = desk.after(10.1, heard="b")
    assert submitted_to(effects) == ["b"]
    assert aborted_at(effects) == ["a", "b"]
    assert desk.frame("a", OutputEntry("r", 0, (1, 2, 3))) == []
    assert desk.frame("b", token(0, request_id="r~2")) == [Deliver((InstanceId("b"), Epoch(1)), (token(0),), 0.0)]


def test_a_member_that_is_not_listed_any_more_has_ended() -> None:
    desk = Desk()
    desk.submit()
    assert Forget("tcp://a") in desk.members("b")
    assert submitted_to(desk.after(0.6, heard="b")) == ["b"]
    assert desk.members("ab") != [], "but that incarnation stays dead"
    assert desk.router.why_nobody_serves(desk.now_s) is None
    assert [one.instance for one in desk.router.view(desk.now_s).instances] == ["b"]


def test_missing_tokens_are_made_anew_after_a_while() -> None:
    desk = Desk()
    desk.submit()
    desk.frame("a", token(0))
    assert desk.frame("a", token(2)) == []
    assert desk.after(9.0) == []
    effects = desk.after(1.1)
    assert aborted_at(effects) == ["a", "b"]
    (sent,) = submits(effects)
    assert failures(effects) == [] and sent.output_token_ids == (100,), "those after the gap count for nothing"


def test_a_gap_that_is_filled_in_time_is_no_gap() -> None:
    desk = Desk()
    desk.submit()
    desk.frame("a", token(1))
    desk.frame("b", token(0))
    assert desk.after(11.0) == []
