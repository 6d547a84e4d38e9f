"""What do the drivers do when messages, copies, engines, clients, peers or they themselves fail? On a jumping clock."""

from __future__ import annotations

import asyncio

import pytest

from migration.messages import Cancel, Commit, Committed, Message
from migration.table import SourceState
from migration.types import Epoch, Incarnation, Outcome
from tests.support.driver_stories import expect_moved, expect_stayed, lose_first, run, until
from tests.support.migration_kit import REQUEST, A, Pair


@pytest.mark.parametrize("num_lost", [1, 5])
def test_a_lost_answer_to_commit_is_asked_again_and_never_taken_for_a_no(num_lost: int) -> None:
    async def story(pair: Pair) -> None:
        pair.to_source.rule = lose_first(Committed, num_lost)
        report = await pair.move()
        expect_moved(pair, report)
        assert pair.to_destination.kinds().count("Commit") == num_lost + 1
        assert "resume" not in pair.source.visits

    run(story)


def test_a_source_never_resumes_by_itself_once_commit_was_sent() -> None:
    async def story(pair: Pair) -> None:
        pair.to_source.rule = lose_first(Committed, 10_000)
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await asyncio.sleep(300)
        assert driver.state is SourceState.COMMITTING and pair.source.is_stopped
        driver.cancel("tired of waiting")
        await asyncio.sleep(1)
        assert pair.source.is_stopped and "resume" not in pair.source.visits
        driver.peer_lost()
        report = await moving
        assert report.outcome is Outcome.DESTINATION_LOST and not pair.source.is_stopped

    run(story)


def test_doubled_messages_change_nothing() -> None:
    async def story(pair: Pair) -> None:
        pair.to_source.rule = pair.to_destination.rule = lambda _: 2
        expect_moved(pair, await pair.move())

    run(story)


@pytest.mark.parametrize("kind", ["Reserve", "Prepare", "Grow", "Commit"])
def test_a_lost_question_is_asked_again(kind: str) -> None:
    async def story(pair: Pair) -> None:
        seen: list[str] = []

        def rule(message: Message) -> int:
            name = type(message).__name__
            seen.append(name)
            return 0 if name == kind and seen.count(kind) == 1 else 1

        pair.to_destination.rule = rule
        expect_moved(pair, await pair.move())
        assert seen.count(kind) >= 2

    run(story)


@pytest.mark.parametrize("push", [0, 1])
def test_a_broken_copy_cancels_and_resumes(push: int) -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400 if push == 0 else 30
        pair.mover.fails_at = push
        report = await pair.move()
        expect_stayed(pair, report, Outcome.FAULT)
        assert "the cable was cut" in report.reason

    run(story)


def test_a_preemption_during_the_copy_is_noticed() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: bool(pair.mover.pushes))
        pair.source.num_preemptions += 1
        expect_stayed(pair, await moving, Outcome.PREEMPTED)

    run(story)


def test_a_request_that_finishes_during_the_copy_ends_the_migration() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens, pair.source.max_tokens = 400, 20
        report = await pair.move()
        assert report.outcome is Outcome.FINISHED_AT_SOURCE and pair.is_clean
        assert pair.reports[0].outcome is Outcome.FINISHED_AT_SOURCE

    run(story)


@pytest.mark.parametrize("engine_call", ["describe", "progress", "stop"])
def test_a_failing_engine_visit_ends_as_a_fault_with_nothing_held(engine_call: str) -> None:
    async def story(pair: Pair) -> None:
        pair.source.fails.add(engine_call)
        expect_stayed(pair, await pair.move(), Outcome.FAULT)

    run(story)


def test_an_unreachable_destination_is_given_up_in_time() -> None:
    async def story(pair: Pair) -> None:
        pair.to_destination.rule = lambda _: 0
        report = await pair.move()
        expect_stayed(pair, report, Outcome.TIMED_OUT)
        assert report.duration_s < 5.0 + 4 * 0.5 + 0.1

    run(story)


def test_a_channel_that_closes_before_the_commit_means_a_lost_destination() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: bool(pair.mover.pushes))
        pair.to_destination.is_closed = True
        assert (await moving).outcome is Outcome.DESTINATION_LOST
        assert not pair.source.is_stopped
        await asyncio.sleep(pair.params.lease_s + 1)  # nobody cancelled: the lease does
        assert pair.is_clean and pair.reports[0].outcome is Outcome.TIMED_OUT

    run(story)


def test_the_keep_alive_holds_the_lease_through_a_long_copy() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 40_000  # 20 s of copying under a lease of 10 s
        pair.destination.num_free = 20_000
        expect_moved(pair, await pair.move())

    run(story)


def test_a_commit_after_the_lease_is_refused_and_the_source_goes_on() -> None:
    async def story(pair: Pair) -> None:
        pair.to_destination.rule = lambda message: 0 if isinstance(message, Commit) else 1
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: pair.source.is_stopped)
        await asyncio.sleep(pair.params.lease_s + 1)
        assert not pair.destination.held
        pair.to_destination.rule = lambda _: 1
        report = await moving
        expect_stayed(pair, report, Outcome.REFUSED)
        assert report.reason == "the lease expired"

    run(story)


@pytest.mark.parametrize("after_s", [0.0005, 0.002, 0.005, 0.01, 0.05, 0.2, 0.22, 0.24])
def test_a_client_that_leaves_at_any_time_leaves_nothing_behind(after_s: float) -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await asyncio.sleep(after_s)
        driver.client_aborted()
        pair.source.is_there = False  # the agent aborts in the engine as well
        pair.table.request_aborted(REQUEST)
        pair.destination.committed.pop(REQUEST, None)
        report = await moving
        assert report.outcome in (Outcome.ABORTED_BY_CLIENT, Outcome.COMMITTED)
        assert not pair.destination.committed
        await asyncio.sleep(1)
        assert pair.is_clean

    run(story)


def test_a_client_that_leaves_while_the_engine_commits_is_aborted_right_after() -> None:
    async def story(pair: Pair) -> None:
        pair.destination.commit_gate = asyncio.Event()
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await until(lambda: "Commit" in pair.to_destination.kinds())
        await asyncio.sleep(0.01)
        driver.client_aborted()
        pair.table.request_aborted(REQUEST)
        pair.destination.commit_gate.set()
        report = await moving
        assert report.outcome is Outcome.COMMITTED and driver.is_client_gone
        await asyncio.sleep(0.1)
        assert pair.destination.aborted == [REQUEST] and not pair.destination.committed

    run(story)


def test_a_lost_source_gives_its_blocks_back_at_once() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: bool(pair.mover.pushes))
        pair.table.source_lost(Incarnation(A.instance, Epoch(0), A.address))
        await asyncio.sleep(0.01)
        assert pair.destination.held  # that was an older epoch
        pair.table.source_lost(A)
        await asyncio.sleep(0.01)
        assert pair.is_clean and pair.reports[0].outcome is Outcome.SOURCE_LOST
        await moving

    run(story)


@pytest.mark.parametrize("after_s", [0.0005, 0.002, 0.004, 0.01, 0.1, 0.215, 0.22, 0.222, 0.225])
def test_a_cancelled_driver_never_leaves_a_stopped_request(after_s: float) -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await asyncio.sleep(after_s)
        is_committing = driver.state is SourceState.COMMITTING
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert is_committing or not pair.source.is_stopped
        await asyncio.sleep(pair.params.lease_s + 1)
        assert pair.is_clean or is_committing

    run(story)


def test_a_cancelled_driver_waits_for_a_stop_under_way_and_undoes_it() -> None:
    async def story(pair: Pair) -> None:
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: "stop" in pair.source.visits)
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert pair.source.visits[-1] == "resume" and not pair.source.is_stopped
        assert isinstance(pair.to_destination.sent[-1], Cancel)

    run(story)
