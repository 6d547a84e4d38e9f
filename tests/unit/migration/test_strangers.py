"""Whose answers does a source obey? Those of the incarnation it asked; on a jumping clock, over in-memory ports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from migration.driver import SourceDriver
from migration.messages import Cancelled, Committed, Refused, Reserved, ToSource
from migration.table import SourceState as S
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.sim.jumping_loop import run_jumping
from tests.support.migration_kit import REQUEST, B, Pair

STRANGERS = {
    "another instance": Incarnation(InstanceId("c"), Epoch(1), "tcp://c"),
    "another instance that says it is at the same address": Incarnation(InstanceId("c"), Epoch(1), B.address),
    "the destination's next epoch": Incarnation(B.instance, Epoch(2), "tcp://b2"),
    "the destination's epoch before": Incarnation(B.instance, Epoch(0), B.address),
}
LIES: dict[str, ToSource] = {
    "committed": Committed(migration_id="m"),
    "refused": Refused(migration_id="m", reason="a stranger says no"),
    "cancelled": Cancelled(migration_id="m"),
    "reserved": Reserved(migration_id="m", num_cached_tokens=0, num_blocks=99, endpoints=("memory://elsewhere",)),
}


def run(story: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Pair() as pair:
            await story(pair)

    run_jumping(main(), limit_s=600.0)


async def until_state(driver: SourceDriver, state: S) -> None:
    async with asyncio.timeout(100):
        while driver.state is not state:  # noqa: ASYNC110 - the clock jumps
            await asyncio.sleep(0.0005)


@pytest.mark.parametrize("sender", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_while_a_commit_is_unanswered_no_strangers_answer_decides_who_owns_the_request(
    lie: ToSource, sender: Incarnation
) -> None:
    """1. The source has sent `Commit`. 2. A stranger says that it owns the request, or that it does not. 3. Obeyed, the
    source frees or resumes what the destination may be about to take: no owner, or two."""

    async def story(pair: Pair) -> None:
        pair.destination.commit_gate = asyncio.Event()
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await until_state(driver, S.COMMITTING)
        driver.deliver(lie, sender)
        await asyncio.sleep(0.05)
        assert driver.state is S.COMMITTING and driver.num_strangers == 1
        assert pair.source.is_stopped and not pair.source.is_released
        pair.destination.commit_gate.set()
        report = await moving
        assert report.outcome is Outcome.COMMITTED and REQUEST in pair.destination.committed
        assert driver.num_strangers == 1

    run(story)


@pytest.mark.parametrize("name", [name for name in STRANGERS if name.startswith("another")])
def test_before_blocks_are_held_a_stranger_can_neither_refuse_nor_take_the_copy_elsewhere(name: str) -> None:
    async def story(pair: Pair) -> None:
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await until_state(driver, S.RESERVING)
        for lie in LIES.values():
            driver.deliver(lie, STRANGERS[name])
            assert driver.state is S.RESERVING
        assert (await moving).outcome is Outcome.COMMITTED
        assert driver.num_strangers == len(LIES) and driver.num_protocol_errors == 0

    run(story)


def test_the_destinations_next_epoch_may_refuse_to_reserve_and_say_nothing_else() -> None:
    """A destination that has been started anew says so at once: nothing of the migration is anywhere then."""
    again = STRANGERS["the destination's next epoch"]

    async def story(pair: Pair) -> None:
        pair.to_destination.rule = lambda _: 0
        driver = pair.driver()
        moving = asyncio.ensure_future(driver.run())
        await until_state(driver, S.RESERVING)
        driver.deliver(LIES["reserved"], again)
        driver.deliver(LIES["committed"], again)
        assert driver.state is S.RESERVING and driver.num_strangers == 2
        driver.deliver(Refused(migration_id="m", reason="epoch 2 here, not 1"), again)
        report = await moving
        assert (report.outcome, driver.num_strangers) == (Outcome.REFUSED, 2)
        assert "epoch 2" in report.reason and pair.source.is_there and not pair.source.is_stopped

    run(story)
