"""A client leaves, the source preempts, the destination is full, an operator or a death intervenes: in each state of
the real drivers, does it end as the table says, and is nothing left behind? On a jumping clock, over in-memory ports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from migration.driver import SourceDriver
from migration.params import MigrationParams
from migration.table import DestinationState, SourceState
from migration.types import MigrationReport, NotStopped, Outcome, RequestId, StoppedRequest
from orchestrator.sim.jumping_loop import run_jumping
from tests.support.migration_kit import REQUEST, A, Pair, ToySource

S = SourceState
D = DestinationState
NUM_BLOCKS = 1_000
STOP_S = 0.2
BEFORE_THE_STOP = (S.DESCRIBING, S.RESERVING, S.PREPARING, S.PROBING, S.GROWING, S.COPYING, S.STOPPING)
BEFORE_THE_COMMIT = (*BEFORE_THE_STOP, S.GROWING_TAIL, S.COPYING_TAIL)
HOLDING_SOMETHING = (D.HOLDING, D.HELD, D.GROWING, D.PREPARING)


@dataclass
class SlowToStop(ToySource):
    """Twenty tokens are decoded between the order to stop and the stop: more than there is slack for."""

    async def stop(self, request_id: RequestId, *, without_kv: bool) -> StoppedRequest | NotStopped:
        await asyncio.sleep(STOP_S)
        return await super().stop(request_id, without_kv=without_kv)


@dataclass
class Move:
    """A migration under way that visits every state."""

    pair: Pair
    driver: SourceDriver
    moving: asyncio.Task[MigrationReport]

    async def until(self, state: S | D) -> None:
        async with asyncio.timeout(100):
            while state not in (self.driver.state, self.state_there):  # noqa: ASYNC110 - the clock jumps
                await asyncio.sleep(0.0001)

    @property
    def state_there(self) -> D | None:
        """No port says it, so this looks inside."""
        incoming = [*self.pair.table._active.values(), *self.pair.table._ended.values()]
        return incoming[0].machine.state if incoming else None

    def client_leaves(self) -> None:
        """What both agents do then."""
        self.pair.source.is_there = False
        self.pair.destination.committed.pop(REQUEST, None)
        self.pair.table.request_aborted(REQUEST)
        self.driver.client_aborted()

    async def end(self) -> MigrationReport:
        """Nothing is reserved, no ticket is open, nothing stands still, every block is where it was or committed."""
        report = await self.moving
        await asyncio.sleep(1)
        pair = self.pair
        assert pair.is_clean
        assert not pair.source.is_stopped or not pair.source.is_there
        if not pair.destination.num_commits:
            assert pair.destination.num_free == NUM_BLOCKS
        has_moved = report.outcome is Outcome.COMMITTED
        assert bool(pair.destination.num_commits) is has_moved
        num_owners = (pair.source.is_there and not pair.source.is_stopped) + bool(pair.destination.committed)
        assert num_owners == (0 if self.driver.is_client_gone else 1)
        return report


def run(story: Callable[[Move], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Pair(MigrationParams(slack_blocks=1)) as pair:
            assert pair.destination.num_free == NUM_BLOCKS
            pair.source.is_there = False
            source = SlowToStop(prompt_tokens=400)
            pair.source = source
            decoding = asyncio.ensure_future(source.decode())
            pair.destination.ready_after_s = 0.01
            driver = pair.driver()
            await story(Move(pair, driver, asyncio.ensure_future(driver.run())))
            decoding.cancel()

    run_jumping(main(), limit_s=600.0)


@pytest.mark.parametrize("state", [*BEFORE_THE_COMMIT, S.COMMITTING, S.CLOSING])
def test_undisturbed_it_comes_through_every_state_of_the_source_and_moves(state: S) -> None:
    """The control."""

    async def story(move: Move) -> None:
        await move.until(state)
        assert (await move.end()).outcome is Outcome.COMMITTED

    run(story)


@pytest.mark.parametrize("state", BEFORE_THE_COMMIT)
def test_a_client_that_leaves_before_the_commit_ends_it_aborted(state: S) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.client_leaves()
        assert (await move.end()).outcome is Outcome.ABORTED_BY_CLIENT
        # Not yet arrived there, it is refused at the door.
        there = Outcome.REFUSED if state is S.RESERVING else Outcome.ABORTED_BY_CLIENT
        assert all(report.outcome is there for report in move.pair.reports)

    run(story)


@pytest.mark.parametrize("state", [D.COMMITTING, D.COMMITTED, S.CLOSING])
def test_a_client_that_leaves_from_the_commit_on_is_aborted_where_the_request_went(state: S | D) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.client_leaves()
        assert (await move.end()).outcome is Outcome.COMMITTED
        assert move.driver.is_client_gone and not move.pair.destination.committed
        assert move.pair.destination.aborted == ([REQUEST] if state is D.COMMITTING else [])

    run(story)


@pytest.mark.parametrize("state", HOLDING_SOMETHING)
def test_a_client_that_leaves_while_the_destination_holds_blocks_frees_them(state: D) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.client_leaves()
        assert (await move.end()).outcome is Outcome.ABORTED_BY_CLIENT
        assert [report.outcome for report in move.pair.reports] == [Outcome.ABORTED_BY_CLIENT]

    run(story)


@pytest.mark.parametrize("state", [state for state in BEFORE_THE_STOP if state is not S.DESCRIBING])
def test_a_source_that_preempts_before_the_stop_keeps_the_request(state: S) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.pair.source.num_preemptions += 1
        assert (await move.end()).outcome is Outcome.PREEMPTED
        assert [report.outcome for report in move.pair.reports] == [Outcome.PREEMPTED]

    run(story)


def test_a_preemption_before_the_description_is_part_of_it() -> None:
    async def story(move: Move) -> None:
        await move.until(S.DESCRIBING)
        move.pair.source.num_preemptions += 1
        assert (await move.end()).outcome is Outcome.COMMITTED

    run(story)


@pytest.mark.parametrize("state", [S.RESERVING, S.GROWING, S.GROWING_TAIL])
def test_a_destination_full_of_blocks_refuses_whenever_it_is_asked(state: S) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        destination = move.pair.destination
        num_taken, destination.num_free = destination.num_free, 0  # by other requests
        await move.moving
        await asyncio.sleep(1)
        destination.num_free += num_taken
        report = await move.end()
        assert report.outcome is Outcome.REFUSED and report.reason == "out of blocks"
        assert ("resume" in move.pair.source.visits) == (state is S.GROWING_TAIL)
        assert [report.outcome for report in move.pair.reports] == [Outcome.REFUSED]

    run(story)


@pytest.mark.parametrize("state", BEFORE_THE_COMMIT)
def test_an_operator_calls_it_off_before_the_commit(state: S) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.driver.cancel("not now")
        report = await move.end()
        assert report.outcome is Outcome.REFUSED and "not now" in report.reason

    run(story)


def test_an_operator_comes_too_late_for_a_commit() -> None:
    async def story(move: Move) -> None:
        await move.until(S.COMMITTING)
        move.driver.cancel("not now")
        assert (await move.end()).outcome is Outcome.COMMITTED

    run(story)


@pytest.mark.parametrize("state", HOLDING_SOMETHING)
def test_a_destination_that_hears_of_its_source_s_death_frees_what_it_holds(state: D) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.pair.table.source_lost(A)
        report = await move.end()  # the source lives, and is told no: it goes on by itself
        assert report.outcome in (Outcome.REFUSED, Outcome.FAULT, Outcome.TIMED_OUT)
        assert move.pair.reports[0].outcome is Outcome.SOURCE_LOST

    run(story)


@pytest.mark.parametrize("state", BEFORE_THE_COMMIT)
def test_a_source_that_hears_of_its_destination_s_death_goes_on_by_itself(state: S) -> None:
    async def story(move: Move) -> None:
        await move.until(state)
        move.pair.to_destination.rule = lambda _: 0
        move.driver.peer_lost()
        assert (await move.moving).outcome is Outcome.DESTINATION_LOST
        await asyncio.sleep(move.pair.params.lease_s + 1)  # it was alive: its lease ends what it held
        assert (await move.end()).outcome is Outcome.DESTINATION_LOST

    run(story)
