"""Do the drivers do what the machines decide, whatever fails? On a jumping clock, over in-memory ports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from migration.messages import Cancel, Commit, Committed, Message, Reserve
from migration.params import IncomingParams, MigrationParams, Mode
from migration.table import SourceState
from migration.types import BlockRange, Epoch, Incarnation, InstanceId, MigrationReport, Outcome
from tests.support.jumping_loop import run_jumping
from tests.support.migration_kit import BLOCK_SIZE, REQUEST, STEP_S, A, B, Pair


def run(story: Callable[[Pair], Awaitable[None]], pair: Callable[[], Pair] = Pair) -> None:
    async def main() -> None:
        async with pair() as made:
            await story(made)

    run_jumping(main(), limit_s=600.0)


def lose_first(kind: type, count: int) -> Callable[[Message], int]:
    seen = 0

    def rule(message: Message) -> int:
        nonlocal seen
        seen += isinstance(message, kind)
        return 0 if isinstance(message, kind) and seen <= count else 1

    return rule


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - the clock jumps, so this waits for nothing
            await asyncio.sleep(0.0005)


def expect_moved(pair: Pair, report: MigrationReport) -> None:
    assert report.outcome is Outcome.COMMITTED, report.reason
    assert pair.source.is_released
    assert pair.destination.num_commits == 1
    assert REQUEST in pair.destination.committed
    assert pair.is_clean


def expect_stayed(pair: Pair, report: MigrationReport, outcome: Outcome) -> None:
    assert report.outcome is outcome, report
    assert pair.source.is_there and not pair.source.is_stopped
    assert not pair.destination.committed
    assert pair.is_clean


def test_a_live_migration_copies_while_decoding_goes_on_and_only_the_tail_while_stopped() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        report = await pair.move()
        expect_moved(pair, report)
        assert report.stages and report.tail is not None
        assert report.tail.num_blocks <= 2
        urgency = [urgent for _, urgent in pair.mover.pushes]
        assert urgency == sorted(urgency) and urgency.count(True) == 1 and urgency.count(False) >= len(report.stages)
        num_blocks = -(-report.moved_tokens // BLOCK_SIZE)
        assert pair.mover.landed == set(range(num_blocks))
        assert report.num_blocks == num_blocks  # nothing is copied twice
        assert report.stopped_s < 0.02
        assert report.duration_s > report.stages[0].duration_s > 0.1

    run(story)


def test_a_blocking_migration_stops_first_and_copies_everything_then() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        report = await pair.move(Mode.BLOCKING)
        expect_moved(pair, report)
        assert report.stages == () and report.tail is not None
        assert report.tail.num_blocks == -(-report.moved_tokens // BLOCK_SIZE)
        assert report.stopped_s > 0.2

    run(story)


def test_a_recomputing_migration_moves_no_block_and_holds_none() -> None:
    async def story(pair: Pair) -> None:
        report = await pair.move(Mode.RECOMPUTE)
        expect_moved(pair, report)
        assert report.num_blocks == 0 and report.moved_tokens == 0 and not pair.mover.pushes
        assert pair.destination.committed[REQUEST] == b"0"
        reserve = pair.to_destination.sent[0]
        assert isinstance(reserve, Reserve) and reserve.settled_tokens == 0

    run(story)


def test_a_waiting_request_goes_the_same_way_with_no_block() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 0
        pair.source.tokens.clear()
        pair.source.is_stopped = True  # it is not decoding yet
        expect_moved(pair, await pair.move())
        assert not pair.mover.pushes and "Grow" not in pair.to_destination.kinds()

    run(story)


def test_what_the_destination_has_cached_is_not_copied() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        pair.destination.num_cached_tokens = 200
        report = await pair.move()
        expect_moved(pair, report)
        assert report.cached_tokens == 200
        assert pair.mover.pushes[0][0].first == 50 and min(pair.mover.landed) == 50

    run(story)


def test_the_stop_waits_until_the_destination_is_ready() -> None:
    async def story(pair: Pair) -> None:
        pair.destination.ready_after_s = 3.0
        moving = asyncio.ensure_future(pair.move())
        await asyncio.sleep(2.9)
        assert not pair.source.is_stopped and "stop" not in pair.source.visits
        report = await moving
        expect_moved(pair, report)
        assert report.stopped_s < 0.02

    run(story)


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


@pytest.mark.parametrize("where", ["reserve", "ready", "commit"])
def test_a_refusal_at_any_point_leaves_the_request_where_it_was(where: str) -> None:
    async def story(pair: Pair) -> None:
        pair.destination.refuses[where] = "not today"
        report = await pair.move()
        expect_stayed(pair, report, Outcome.REFUSED)
        assert report.reason == "not today"
        assert ("resume" in pair.source.visits) == (where == "commit")

    run(story)


def test_a_destination_out_of_blocks_refuses() -> None:
    async def story(pair: Pair) -> None:
        pair.destination.num_free = 5
        expect_stayed(pair, await pair.move(), Outcome.REFUSED)
        assert pair.destination.num_free == 5

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


def test_a_migration_of_a_request_that_was_aborted_here_before_is_refused() -> None:
    async def story(pair: Pair) -> None:
        pair.table.request_aborted(REQUEST)
        report = await pair.move()
        expect_stayed(pair, report, Outcome.REFUSED)
        assert report.reason == "aborted by the client"

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


def test_the_destination_bounds_what_comes_in() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        first = asyncio.ensure_future(pair.driver("m1").run())
        await until(lambda: pair.table.num_incoming == 1)
        second = await pair.driver("m2").run()
        assert second.outcome is Outcome.REFUSED and "already" in second.reason
        assert (await first).outcome is Outcome.COMMITTED

    run(story, lambda: Pair(incoming=IncomingParams(max_incoming=1)))


def test_ended_migrations_are_forgotten_beyond_the_bound_and_an_unknown_commit_is_not_answered() -> None:
    async def story(pair: Pair) -> None:
        pair.destination.refuses["reserve"] = "no"
        for number in range(4):
            await pair.driver(f"m{number}").run()
        pair.table.check_integrity()
        pair.to_source.sent.clear()
        for number in range(4):
            pair.table.deliver(Commit(migration_id=f"m{number}", state=b""), A)
        await asyncio.sleep(0.1)
        assert [message.migration_id for message in pair.to_source.sent] == ["m2", "m3"]
        assert pair.table.num_dropped == 2

    run(story, lambda: Pair(incoming=IncomingParams(max_remembered=2)))


def test_an_old_epoch_of_the_destination_is_not_served() -> None:
    async def story(pair: Pair) -> None:
        report = await pair.driver(destination=Incarnation(B.instance, Epoch(7), B.address)).run()
        expect_stayed(pair, report, Outcome.REFUSED)
        assert "epoch" in report.reason

    run(story)


def test_a_stranger_cannot_cancel_somebody_elses_migration() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: bool(pair.mover.pushes))
        stranger = Incarnation(InstanceId("c"), Epoch(1), "tcp://c")
        pair.table.deliver(Cancel(migration_id="m", outcome="fault"), stranger)
        expect_moved(pair, await moving)
        assert pair.table.num_dropped == 1

    run(story)


def test_closing_the_destination_gives_back_and_refuses() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        moving = asyncio.ensure_future(pair.move())
        await until(lambda: bool(pair.mover.pushes))
        await pair.table.close()
        expect_stayed(pair, await moving, Outcome.REFUSED)

    run(story)


def test_stages_stop_at_their_bound_when_decoding_outruns_the_copy() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens, pair.destination.num_free = 4_000, 2_000
        report = await pair.move()
        expect_moved(pair, report)
        assert len(report.stages) == 1
        assert report.tail is not None and report.tail.num_blocks > 10
        assert pair.mover.pushes[0][0] == BlockRange(0, pair.mover.pushes[0][0].end)
        assert report.stopped_s > STEP_S

    run(story, lambda: Pair(MigrationParams(max_stages=1)))
