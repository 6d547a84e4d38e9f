"""Freeness, and the choice of an instance for a new request."""

from __future__ import annotations

import math

import pytest

from instance.messages import LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams, NoChoice, Rule
from orchestrator.policy.load import LoadParams, freeness, running_blocks, virtual_usage_blocks
from tests.support.idle_report import report

AT_ONCE = DispatchParams(slow_start_s=0.0)


def book(*reports: LoadReport, now_s: float = 0.0, params: DispatchParams = AT_ONCE, gateway: str = "") -> DispatchBook:
    it = DispatchBook(params, gateway=gateway)
    it.set_members([(InstanceId(one.instance), Epoch(one.epoch)) for one in reports], 2 if gateway else 1)
    for one in reports:
        assert it.on_report(one, now_s)
    return it


def chosen(it: DispatchBook, demand: int = 10, now_s: float = 0.0, excluded: tuple[str, ...] = ()) -> str:
    choice = it.choose(demand, now_s, tuple(InstanceId(name) for name in excluded))
    assert isinstance(choice, Choice), choice
    return choice.instance


def test_freeness_is_spare_blocks_over_the_batch() -> None:
    busy = report(free_blocks=40, reserved_blocks=10, num_running=5, head_of_line_blocks=15, waiting_blocks=60)
    assert running_blocks(busy) == 50
    assert virtual_usage_blocks(busy) == 75
    assert freeness(busy) == 5.0


def test_a_blocked_head_of_line_makes_freeness_negative() -> None:
    assert freeness(report(free_blocks=10, num_running=2, head_of_line_blocks=30)) == -10.0


@pytest.mark.parametrize("state", ["starting", "draining", "stopped"])
def test_an_instance_that_does_not_serve_has_no_freeness(state: str) -> None:
    assert freeness(report(state=state)) == -math.inf


def test_headroom_counts_once_for_each_priority_that_runs() -> None:
    params = LoadParams(headroom_blocks=((-1, 20), (0, 5)))
    busy = report(free_blocks=60, num_running=4, running_by_priority=((-1, 3), (0, 1), (7, 0)))
    assert virtual_usage_blocks(busy, params) == 65
    assert freeness(busy) == 15.0


def test_the_freest_instance_is_chosen() -> None:
    assert chosen(book(report("a", free_blocks=20, num_running=1), report("b", free_blocks=80, num_running=1))) == "b"


def test_ties_go_to_the_smallest_id() -> None:
    assert chosen(book(report("b"), report("a"), report("c"))) == "a"


def test_each_of_several_gateways_breaks_ties_in_an_order_of_its_own() -> None:
    equals = [report(name) for name in "abcdef"]
    first = {chosen(book(*equals, gateway=f"tcp://127.0.0.1:{5000 + number}")) for number in range(20)}
    assert len(first) > 1
    assert chosen(book(*equals, gateway="tcp://x")) == chosen(book(*reversed(equals), gateway="tcp://x"))


def test_an_old_report_loses_what_its_running_requests_need_by_now() -> None:
    """10 requests, a step of 0.1 s: 100 tokens a second, 6.25 blocks of 16. After 2 s it has 12.5 blocks less."""
    it = book(report("a", free_blocks=90, num_running=10, step_time_s=0.1), report("b", free_blocks=80, num_running=10))
    assert chosen(it) == "a"
    it.on_report(report("b", free_blocks=80, num_running=10, step=1), 2.0)
    assert chosen(it, now_s=2.0) == "b"
    choice = it.choose(10, 2.0, {InstanceId("b")})
    assert isinstance(choice, Choice) and choice.reason.startswith(f"score {(90 - 12.5 - 10) / 11:.2f} "), choice


def test_an_instance_that_has_just_come_gets_a_part_of_its_share_at_first() -> None:
    params = DispatchParams(slow_start_s=10.0, slow_start_share=0.1)
    it = book(report("old", free_blocks=40), params=params)
    it.set_members([(InstanceId("old"), Epoch(1)), (InstanceId("new"), Epoch(1))])
    for name in ("new", "old"):
        it.on_report(report(name, free_blocks=100 if name == "new" else 40, step=1), 20.0)
    assert chosen(it, now_s=20.0) == "old", "30 blocks against a tenth of 90"
    for name in ("new", "old"):
        it.on_report(report(name, free_blocks=100 if name == "new" else 40, step=2), 24.0)
    assert chosen(it, now_s=24.0) == "new", "30 blocks against four tenths of 90"


def test_looking_who_serves_takes_no_turn() -> None:
    it = book(report("a"), report("b"), params=DispatchParams(rule=Rule.ROUND_ROBIN))
    turns = []
    for _ in range(4):
        assert it.why_nobody(0.0) is None
        turns.append(chosen(it))
    assert turns == ["a", "b", "a", "b"]
    assert it.why_nobody(3.1) == "no instance has reported lately"


def test_what_a_choice_goes_by_can_change_while_it_serves() -> None:
    it = book(report("a"), report("b", free_blocks=50))
    it.on_dispatched(InstanceId("a"), 10, 0.0)
    it.set_params(DispatchParams(rule=Rule.ROUND_ROBIN))
    it.check_integrity()
    assert [chosen(it), chosen(it), chosen(it)] == ["a", "b", "a"]
    it.set_params(AT_ONCE)
    it.check_integrity()
    assert chosen(it, demand=45) == "a", "what was dispatched is still counted: 45 of 1 + 1, 5 of 1 elsewhere"


def test_an_instance_that_has_just_come_is_still_better_than_one_that_is_full() -> None:
    it = book(report("old", free_blocks=0, num_running=9), params=DispatchParams())
    it.set_members([(InstanceId("old"), Epoch(1)), (InstanceId("new"), Epoch(1))])
    for name in ("new", "old"):
        it.on_report(report(name, free_blocks=100 if name == "new" else 0, num_running=9, step=1), 20.0)
    assert chosen(it, now_s=20.0) == "new"


def test_own_dispatches_count_until_a_report_has_seen_them() -> None:
    it = book(report("a"), report("b"))
    sequence = it.on_dispatched(InstanceId("a"), 10, 0.0)
    assert sequence == 1
    assert chosen(it) == "b"
    it.on_report(report("a", step=1, submits_seen=0), 0.1)
    assert chosen(it) == "b"
    it.on_report(report("a", step=2, submits_seen=1), 0.2)
    assert chosen(it) == "a"
    it.check_integrity()


def test_a_level_brings_its_headroom_once_to_an_instance_and_with_the_dispatch_at_once() -> None:
    """So the urgent ones gather where their headroom is kept already, until it is fuller by more than that."""
    params = DispatchParams(slow_start_s=0.0, load=LoadParams(((-10, 40), (0, 0))))

    def chosen_for(it: DispatchBook, priority: int) -> str:
        choice = it.choose(10, 0.0, priority=priority)
        assert isinstance(choice, Choice)
        return choice.instance

    it = book(report("a", free_blocks=90), report("b", free_blocks=100), params=params)
    assert (chosen_for(it, -10), chosen_for(it, 0)) == ("b", "b")
    it.on_dispatched(InstanceId("b"), 10, 0.0, -10)
    it.check_integrity()
    assert chosen_for(it, 0) == "a", "90 are more than 100 without 10 and the 40 that are kept free"
    assert chosen_for(it, -10) == "a", "80 - 40 of 1, and 90 - 40 of 2"
    urgent = {"num_running": 1, "running_by_priority": ((-11, 1),)}
    it = book(report("a", free_blocks=90, num_running=1), report("b", free_blocks=100, **urgent), params=params)
    assert (chosen_for(it, 0), chosen_for(it, -10)) == ("a", "b")
    it = book(report("a", free_blocks=90, num_running=1), report("b", free_blocks=80, **urgent), params=params)
    assert chosen_for(it, -12) == "a", "90 - 40 are more than 80 - 40: it is fuller"
    it = book(report("a", free_blocks=70, num_running=1), report("b", free_blocks=80, **urgent), params=params)
    assert chosen_for(it, -12) == "b"


def test_where_nobody_has_its_headroom_free_an_urgent_one_goes_where_most_is_left_for_each() -> None:
    """It begins at once there, beside other urgent ones or not: it is its own level's headroom that it cuts into."""
    params = DispatchParams(slow_start_s=0.0, load=LoadParams(((-10, 40), (0, 0))))

    def urgent(name: str, count: int, free_blocks: int) -> LoadReport:
        running = ((-10, count),)
        return report(name, free_blocks=free_blocks, num_running=count, running_by_priority=running)

    def chosen_for(priority: int, *reports: LoadReport) -> str:
        choice = book(*reports, params=params).choose(10, 0.0, priority=priority)
        assert isinstance(choice, Choice)
        return f"{choice.instance}: {choice.reason.split(' highest')[0]}"

    crowded, long, full = urgent("a", 5, free_blocks=45), urgent("b", 1, free_blocks=42), urgent("c", 1, free_blocks=9)
    assert chosen_for(-10, crowded, long, full) == "b: score -0.06", "-1 / (1 + 32 / 2); 35 / 6 are left at a"
    assert chosen_for(0, crowded, long, full) == "a: score -5.00", "control: who has no headroom waits, there the least"
    calm = report("d", free_blocks=49, num_running=0)
    assert chosen_for(-10, crowded, long, calm) == "d: score -0.03", "an instance of its own is better than company"
    busy = report("d", free_blocks=49, num_running=9)
    assert chosen_for(-10, crowded, long, busy) == "b: score -0.06"
    assert chosen_for(-10, crowded, urgent("e", 1, free_blocks=51)) == "e: score 0.50", "headroom that is there is best"


def test_a_refused_dispatch_is_no_load_any_more() -> None:
    it = book(report("a"), report("b"))
    sequence = it.on_dispatched(InstanceId("a"), 10, 0.0)
    it.on_not_taken(InstanceId("a"), Epoch(1), sequence)
    assert chosen(it) == "a"


def test_unseen_dispatches_are_bounded_in_number_and_time() -> None:
    it = DispatchBook(max_unseen=3, unseen_for_s=10.0)
    it.set_members([(InstanceId("a"), Epoch(1))])
    it.on_report(report("a"), 0.0)
    for _ in range(5):
        it.on_dispatched(InstanceId("a"), 1, 0.0)
    it.check_integrity()
    assert it.view(10.0).instances[0].num_dispatched == 3
    assert it.view(10.1).instances[0].num_dispatched == 0


def test_a_request_goes_where_it_fits_rather_than_where_freeness_is_highest_without_it() -> None:
    small_but_idle = report("a", total_blocks=10, free_blocks=10)
    large_and_busy = report("b", total_blocks=400, free_blocks=100, num_running=20)
    assert freeness(small_but_idle) > freeness(large_and_busy)
    assert chosen(book(small_but_idle, large_and_busy), demand=50) == "b"


def test_between_two_full_instances_the_shorter_queue_wins() -> None:
    long_queue = report("a", free_blocks=0, num_running=50, num_waiting=9, head_of_line_blocks=1, waiting_blocks=90)
    short_queue = report("b", free_blocks=0, num_running=2, num_waiting=1, head_of_line_blocks=10, waiting_blocks=10)
    assert freeness(long_queue) > freeness(short_queue), "the paper's number sees only the head of the queue"
    assert chosen(book(long_queue, short_queue)) == "b"


def test_refused_draining_and_silent_instances_are_not_chosen_and_the_reason_says_so() -> None:
    it = book(report("a"), report("b", state="draining"))
    assert chosen(it) == "a"
    refused = it.choose(1, 0.0, {InstanceId("a")})
    assert refused == NoChoice("each of the 1 serving instances has refused it", any_serving=True)
    silent = it.choose(1, 3.1)
    assert silent == NoChoice("no instance has reported lately", any_serving=False)
    draining = book(report("b", state="draining")).choose(1, 0.0)
    assert draining == NoChoice("no instance serves (b is draining)", any_serving=False)
    assert DispatchBook().choose(1, 0.0) == NoChoice("no instance is ready yet", False)


def test_a_choice_tells_its_reason_and_the_age_of_its_signal() -> None:
    choice = book(report("a")).choose(10, 0.25)
    assert choice == Choice(InstanceId("a"), Epoch(1), "score 90.00 highest of 1 (0 dispatched since its report)", 0.25)


def test_reports_of_strangers_other_epochs_and_the_past_are_left_out() -> None:
    it = book(report("a", step=5))
    assert not it.on_report(report("b"), 0.0)
    assert not it.on_report(report("a", epoch=2, step=9), 0.0)
    assert not it.on_report(report("a", step=4), 0.0)
    it.on_dispatched(InstanceId("a"), 10, 0.0)
    it.set_members([(InstanceId("a"), Epoch(2))])
    assert it.view(0.0).instances == ()
    assert it.on_dispatched(InstanceId("a"), 10, 0.0) == 1


def test_what_was_sent_is_remembered_in_proportion_to_what_is_unseen() -> None:
    names = ("a", "b", "c")
    it = book(*(report(name) for name in names))
    for name in names:
        for _ in range(3_000):
            it.on_dispatched(InstanceId(name), 1, 0.0)
    for name in names:
        it.on_report(report(name, step=1, submits_seen=3_000), 0.1)
        it.check_integrity()


def test_a_member_that_comes_back_is_not_charged_for_its_past() -> None:
    it = book(report("a"))
    for _ in range(5):
        it.on_dispatched(InstanceId("a"), 1, 0.0)
    it.set_members([])
    it.set_members([(InstanceId("a"), Epoch(1))])
    it.on_report(report("a"), 9.0)
    it.on_dispatched(InstanceId("a"), 1, 9.0)
    assert it.view(10.5).instances[0].num_dispatched == 1
