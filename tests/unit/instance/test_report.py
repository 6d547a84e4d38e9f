"""Who is due a report, and what does it say?"""

from __future__ import annotations

from instance.lifecycle import State
from instance.messages import WIDE_STEP_TOKENS, StepTotals
from instance.report import (
    MAX_LEASE_S,
    MAX_SUBSCRIBERS,
    Standing,
    Subscribers,
    add_step,
    load_report,
    smooth_step_time,
)
from instance.types import NO_WORK, EngineLoad, StepWork, step_work


def test_who_wants_reports_less_often_gets_them_less_often_and_news_of_a_state_at_once() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("often", 60.0, with_requests=True, now_s=0.0)
    subscribers.subscribe("seldom", 60.0, with_requests=True, now_s=0.0, interval_s=0.5)
    heard, heard_of_requests = list[str](), list[str]()
    now_s = 0.0
    while now_s < 2.0:
        heard += subscribers.take_due(now_s)
        heard_of_requests += subscribers.take_due_requests(now_s)
        now_s += min(subscribers.due_in_s(now_s), subscribers.requests_due_in_s(now_s))
    assert (heard.count("often"), heard.count("seldom")) == (20, 4)
    assert (heard_of_requests.count("often"), heard_of_requests.count("seldom")) == (8, 4)
    subscribers.make_all_due(now_s)
    assert subscribers.take_due(now_s) == ("often", "seldom")
    subscribers.subscribe("seldom", 60.0, with_requests=True, now_s=now_s)
    assert subscribers.take_due(now_s + 0.11) == ("often", "seldom"), "the last subscription says how often"


def test_a_new_subscriber_is_due_at_once_and_then_every_interval() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("a", 5.0, False, now_s=10.0)
    assert subscribers.take_due(10.0) == ("a",)
    assert subscribers.take_due(10.05) == ()
    assert subscribers.take_due(10.1) == ("a",)


def test_a_frame_counts_as_a_report() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("a", 5.0, False, now_s=10.0)
    subscribers.report_sent("a", 10.0)
    subscribers.report_sent("stranger", 10.0)
    assert subscribers.take_due(10.05) == ()
    assert subscribers.take_due(10.11) == ("a",)


def test_a_lease_ends_unless_it_is_renewed() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("a", 1.0, False, now_s=0.0)
    subscribers.subscribe("b", 1.0, False, now_s=0.0)
    subscribers.subscribe("b", 1.0, False, now_s=0.9)
    assert subscribers.take_due(1.5) == ("b",)
    assert subscribers.addresses() == ("b",)


def test_a_lease_is_bounded_whatever_is_asked_for() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("a", 1e12, False, now_s=0.0)
    assert subscribers.take_due(MAX_LEASE_S + 1.0) == ()


def test_the_stalest_subscriber_leaves_when_there_are_too_many() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("first", 5.0, False, now_s=0.0)
    for index in range(MAX_SUBSCRIBERS - 1):
        subscribers.subscribe(f"a{index}", 5.0, False, now_s=0.0)
    subscribers.subscribe("first", 5.0, False, now_s=1.0)
    subscribers.subscribe("one more", 5.0, False, now_s=1.0)
    assert len(subscribers.addresses()) == MAX_SUBSCRIBERS
    assert "first" in subscribers.addresses() and "a0" not in subscribers.addresses()


def test_requests_are_reported_only_to_those_who_asked_and_less_often() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("gateway", 5.0, False, now_s=0.0)
    subscribers.subscribe("orchestrator", 5.0, True, now_s=0.0)
    assert subscribers.take_due_requests(0.0) == ("orchestrator",)
    assert subscribers.take_due_requests(0.2) == ()
    assert subscribers.take_due_requests(0.25) == ("orchestrator",)


def test_a_change_of_state_makes_everyone_due() -> None:
    subscribers = Subscribers()
    subscribers.subscribe("a", 5.0, False, now_s=0.0)
    assert subscribers.take_due(0.0) == ("a",)
    subscribers.make_all_due(0.01)
    assert subscribers.take_due(0.01) == ("a",)


def test_the_highest_sequence_seen_is_kept_by_gateway() -> None:
    subscribers = Subscribers()
    for sequence in (1, 3, 2):
        subscribers.submit_seen("a", sequence)
    assert (subscribers.submits_seen("a"), subscribers.submits_seen("b")) == (3, 0)


def test_step_time_is_smoothed_over_decoding_steps_only() -> None:
    first = smooth_step_time(0.0, 0.02, num_decoding=3)
    assert first == 0.02
    assert smooth_step_time(first, 5.0, num_decoding=0) == first
    later = smooth_step_time(first, 0.03, num_decoding=1)
    assert 0.02 < later < 0.03


def test_a_report_carries_load_and_standing() -> None:
    load = EngineLoad(5, 2, 3, 4, ((0, 3),), 6, 7, 8)
    standing = Standing("i0", 2, 99, State.DRAINING, 16, 256, 0.01, 1, 0)
    report = load_report(standing, load, submits_seen=11)
    assert (report.instance, report.epoch, report.step, report.state) == ("i0", 2, 99, "draining")
    assert (report.free_blocks, report.reserved_blocks, report.num_running, report.num_waiting) == (5, 2, 3, 4)
    assert (report.migrations_in, report.migrations_out, report.submits_seen) == (1, 0, 11)


def test_the_work_of_a_step_is_told_by_chunk_and_by_decoding_request() -> None:
    chunks = [(100, 0, False), (10, 50, False), (1, 70, True), (3, 200, True)]
    assert step_work(chunks) == StepWork(110, 4, 2, 270, 100 * 50 + 10 * 50 + 50)
    assert step_work([]) == NO_WORK


def test_totals_grow_by_what_each_step_computed() -> None:
    wide = WIDE_STEP_TOKENS + 44
    totals = add_step(StepTotals(), step_work([(wide, 0, False)]), 0.5)
    totals = add_step(totals, step_work([(1, 300, True), (1, 20, True)]), 0.25)
    assert totals == StepTotals(2, wide, 2, 44, 2, 320, wide * wide // 2, 0.75)


def test_a_step_that_computed_nothing_or_took_no_time_is_not_counted() -> None:
    assert add_step(StepTotals(), NO_WORK, 1.0) == StepTotals()
    assert add_step(StepTotals(), StepWork(num_decode_tokens=1, num_decoding=1), 0.0) == StepTotals()
