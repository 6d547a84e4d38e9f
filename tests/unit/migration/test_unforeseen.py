"""What if a port raises what no port may raise, or a copy takes minutes? On a jumping clock, over in-memory ports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

import pytest

from migration.messages import Commit, Grown, Refused
from migration.params import MigrationParams, Mode
from migration.stages import Landing, StopReason, max_push_blocks, next_push
from migration.table import SourceState
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId, Outcome, StageReport
from orchestrator.sim.jumping_loop import run_jumping
from tests.support.migration_kit import REQUEST, B, Pair, ToyMover

PORT_CALLS = ["reserve", "grow", "open", "wait_ready", "cancel"]


def run(story: Callable[[Pair], Awaitable[None]], pair: Callable[[], Pair] = Pair) -> None:
    async def main() -> None:
        async with pair() as made:
            await story(made)

    run_jumping(main(), limit_s=2_000.0)


@dataclass
class RaisingMover(ToyMover):
    """Its push of this number raises what no port may raise."""

    raises_at: int = 0

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        if urgent or len(self.pushes) == self.raises_at:
            await asyncio.sleep(0.001)
            raise RuntimeError("CUDA error: an illegal memory access")
        return await super().push(migration_id, endpoints, block_table, blocks, urgent=urgent)


@dataclass
class PacedMover(ToyMover):
    """25 MB/s for blocks of 2 MiB, and a push of more than a minute fails."""

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        if not urgent:
            await asyncio.sleep(len(blocks) * 2**21 / 25e6)
        return await super().push(migration_id, endpoints, block_table, blocks, urgent=urgent)


def with_mover(mover: ToyMover, params: MigrationParams | None = None) -> Pair:
    pair = Pair(params)
    pair.mover = mover
    pair.table._mover = mover
    return pair


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.BLOCKING])
def test_a_mover_that_raises_anything_ends_as_a_fault_and_the_request_goes_on(mode: Mode) -> None:
    async def story(pair: Pair) -> None:
        report = await pair.move(mode)
        assert report.outcome is Outcome.FAULT and "illegal memory access" in report.reason
        assert pair.source.is_there and not pair.source.is_stopped
        assert ("resume" in pair.source.visits) == (mode is Mode.BLOCKING)
        await asyncio.sleep(0.1)
        assert pair.is_clean

    run(story, lambda: with_mover(RaisingMover()))


@pytest.mark.parametrize("name", ["describe", "progress", "stop"])
def test_a_source_engine_that_raises_anything_ends_as_a_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        monkeypatch.setattr(pair.source, name, raising)
        report = await pair.move()
        assert report.outcome is Outcome.FAULT and "out of order" in report.reason
        assert not pair.source.is_stopped

    run(story)


@pytest.mark.parametrize("kind", ["Reserve", "Grow", "Cancel"])
def test_a_channel_that_raises_anything_is_a_failed_send(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        send = pair.to_destination.send

        async def raises(message: object) -> None:
            if type(message).__name__ == kind:
                raise ValueError("too large")
            await send(message)  # type: ignore[arg-type]

        monkeypatch.setattr(pair.to_destination, "send", raises)
        if kind == "Cancel":
            pair.mover.fails_at = 0
        report = await pair.move()
        assert report.outcome is (Outcome.FAULT if kind == "Cancel" else Outcome.DESTINATION_LOST)
        assert not pair.source.is_stopped

    run(story)


def test_a_machine_that_breaks_after_the_stop_resumes_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        driver = pair.driver()
        monkeypatch.setattr(type(driver._machine), "_on_stopped", lambda *_: fail())
        report = await driver.run()
        assert report.outcome is Outcome.FAULT and "out of order" in report.reason
        assert pair.source.visits[-2:] == ["stop", "resume"] and not pair.source.is_stopped
        await asyncio.sleep(0.1)
        assert pair.is_clean  # the destination was told

    run(story)


def test_a_machine_that_breaks_while_the_owner_is_unknown_leaves_the_request_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(pair: Pair) -> None:
        driver = pair.driver()
        monkeypatch.setattr(type(driver._machine), "_on_timer", lambda *_: fail())
        pair.to_destination.rule = lambda message: 0 if isinstance(message, Commit) else 1
        pair.to_source.rule = lambda message: 0 if isinstance(message, Refused) else 1  # of the lease
        moving = asyncio.ensure_future(driver.run())
        await asyncio.sleep(30)
        assert driver.state is SourceState.COMMITTING and pair.source.is_stopped and not moving.done()
        driver.peer_lost()
        assert (await moving).outcome is Outcome.DESTINATION_LOST and not pair.source.is_stopped

    run(story)


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.002, 0.004, 2.5])
def test_what_is_said_to_a_driver_while_it_winds_up_raises_nothing(is_cancelled: bool, after_s: float) -> None:
    async def story(pair: Pair) -> None:
        pair.to_destination.rule = lambda message: 0 if type(message).__name__ == "Cancel" else 1
        driver = pair.driver(mode=Mode.BLOCKING)
        moving = asyncio.ensure_future(driver.run())
        async with asyncio.timeout(10):
            while driver.state is not SourceState.CLOSING:  # noqa: ASYNC110 - the clock jumps
                await asyncio.sleep(0.0005)
        if is_cancelled:
            moving.cancel()
        await asyncio.sleep(after_s)
        driver.deliver(Grown(migration_id="m", num_blocks=1), B)
        driver.client_aborted()
        driver.peer_lost()
        driver.cancel("again")
        await asyncio.wait((moving,))
        driver.peer_lost()
        assert moving.cancelled() or moving.result().outcome in (Outcome.FAULT, Outcome.ABORTED_BY_CLIENT)
        assert not pair.source.is_stopped or not pair.source.is_there
        pair.table.source_lost(driver.migration.source)
        await asyncio.sleep(0.1)

    run(story, lambda: with_mover(RaisingMover()))


@pytest.mark.parametrize("name", PORT_CALLS)
def test_a_destination_whose_ports_raise_anything_ends_that_migration_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens = 400
        if name == "cancel":
            pair.mover.fails_at = 0
        with monkeypatch.context() as patch:
            patch.setattr(pair.mover if name == "open" else pair.destination, name, raising)
            report = await pair.move()
            await asyncio.sleep(0.1)
        assert report.outcome in (Outcome.REFUSED, Outcome.FAULT) and not pair.source.is_stopped
        assert "out of order" in pair.reports[0].reason and not pair.table.num_incoming
        pair.mover.fails_at = None
        assert (await pair.driver("m2").run()).outcome is Outcome.COMMITTED  # the table goes on

    run(story)


def test_an_abort_that_raises_leaves_the_table_running(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        monkeypatch.setattr(pair.destination, "abort", raising)
        pair.destination.commit_gate = asyncio.Event()
        moving = asyncio.ensure_future(pair.move())
        async with asyncio.timeout(10):
            while "Commit" not in pair.to_destination.kinds():  # noqa: ASYNC110 - the clock jumps
                await asyncio.sleep(0.0005)
        await asyncio.sleep(0.01)
        pair.table.request_aborted(REQUEST)
        pair.destination.commit_gate.set()
        assert (await moving).outcome is Outcome.COMMITTED
        await asyncio.sleep(0.1)
        assert not pair._background[0].done()

    run(story)


def test_a_commit_that_raises_ends_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: who owns the request is unknown then, and only the end of the instance decides it."""

    async def main() -> None:
        pair = Pair()
        await pair.__aenter__()
        monkeypatch.setattr(pair.destination, "commit", raising)
        moving = asyncio.ensure_future(pair.move())
        await asyncio.wait((pair._background[0],))
        assert isinstance(pair._background[0].exception(), ExceptionGroup)
        moving.cancel()
        pair._background[1].cancel()
        await asyncio.wait((moving, pair._background[1]))

    run_jumping(main(), limit_s=600.0)


def test_four_gigabytes_at_the_budget_of_a_cpu_land() -> None:
    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens, pair.destination.num_free = 8_000, 50_000
        pair.source.max_tokens = 10**6
        report = await pair.move()
        assert report.outcome is Outcome.COMMITTED, report.reason
        assert report.stages[0].num_blocks >= 2_000 and report.stages[0].duration_s > 160
        lengths = [len(blocks) for blocks, urgent in pair.mover.pushes if not urgent]
        assert lengths[0] == 16 and max(lengths) * 2**21 / 25e6 <= 2.5 and len(lengths) > pair.params.max_stages

    run(story, lambda: with_mover(PacedMover()))


def test_a_copy_that_stands_still_is_given_up_in_time() -> None:
    """The control: only progress moves the deadline."""

    async def story(pair: Pair) -> None:
        pair.source.prompt_tokens, pair.destination.num_free = 8_000, 50_000
        report = await pair.move()
        assert report.outcome is Outcome.TIMED_OUT and not pair.source.is_stopped
        assert 30 <= report.duration_s < 40

    run(story, lambda: with_mover(PacedMover(), MigrationParams(first_push_blocks=2_000)))


def test_a_stage_of_many_pushes_is_one_stage() -> None:
    params = MigrationParams(first_push_blocks=4, max_stages=1)
    landing = Landing(2)
    pushed: list[BlockRange] = []
    while isinstance(push := next_push(landing, 30 + len(pushed), params), BlockRange):
        pushed.append(push)
        landing = landing.after(StageReport(len(push), len(push) * 100, 1.0), 30 + len(pushed) - 1)
    assert push is StopReason.MAX_STAGES
    assert [push.first for push in pushed] == [2, *(push.end for push in pushed[:-1])] and pushed[-1].end == 30
    assert len(pushed) == 3 and landing.stages == (StageReport(28, 2_800, 3.0),)


def test_a_push_grows_with_the_measured_rate_and_never_in_one_leap() -> None:
    params = MigrationParams(first_push_blocks=16, push_growth=4, push_s=2.0)
    assert max_push_blocks(None, params) == 16
    assert max_push_blocks(StageReport(16, 0, 0.0), params) == 64
    assert max_push_blocks(StageReport(16, 0, 0.001), params) == 64
    assert max_push_blocks(StageReport(16, 0, 1.0), params) == 32
    assert max_push_blocks(StageReport(2, 0, 60.0), params) == 1


async def raising(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("out of order")


def fail() -> NoReturn:
    raise RuntimeError("out of order")
