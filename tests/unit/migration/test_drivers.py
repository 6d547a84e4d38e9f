"""Do the drivers do what the machines decide, and refuse what they must? On a jumping clock, over in-memory ports."""

from __future__ import annotations

import asyncio

import pytest

from migration.messages import Cancel, Commit, Reserve
from migration.params import IncomingParams, MigrationParams, Mode
from migration.types import BlockRange, Epoch, Incarnation, InstanceId, Outcome
from tests.support.driver_stories import expect_moved, expect_stayed, run, until
from tests.support.migration_kit import BLOCK_SIZE, REQUEST, STEP_S, A, B, Pair


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


def test_a_migration_of_a_request_that_was_aborted_here_before_is_refused() -> None:
    async def story(pair: Pair) -> None:
        pair.table.request_aborted(REQUEST)
        report = await pair.move()
        expect_stayed(pair, report, Outcome.REFUSED)
        assert report.reason == "aborted by the client"

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
