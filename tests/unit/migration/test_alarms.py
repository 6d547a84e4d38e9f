"""Do alarms ring in time, once, and not before what came while the process stood still has been heard?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from migration.alarms import HEARING_S, Alarms
from migration.events import Timer
from orchestrator.sim.jumping_loop import JumpingLoop, run_jumping

LEASE_S = 10.0


class Rung:
    """What rang, and when."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, timer: Timer) -> None:
        assert timer is Timer.LEASE
        self.at_s.append(asyncio.get_running_loop().time())


def run(story: Callable[[Alarms, Rung], Awaitable[None]]) -> Rung:
    rung = Rung()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            await story(Alarms(tasks, rung), rung)

    run_jumping(main(), limit_s=600.0)
    return rung


def stand_still(seconds: float) -> None:
    cast("JumpingLoop", asyncio.get_running_loop()).jump(seconds)


def test_an_alarm_rings_in_time_and_once() -> None:
    async def story(alarms: Alarms, _: Rung) -> None:
        alarms.set(Timer.LEASE, LEASE_S)
        await asyncio.sleep(3 * LEASE_S)

    assert run(story).at_s == [LEASE_S]


def test_set_again_it_rings_later_and_cleared_never() -> None:
    async def story(alarms: Alarms, _: Rung) -> None:
        alarms.set(Timer.LEASE, LEASE_S)
        await asyncio.sleep(LEASE_S / 2)
        alarms.set(Timer.LEASE, LEASE_S)
        await asyncio.sleep(LEASE_S * 2)
        alarms.set(Timer.LEASE, LEASE_S)
        alarms.clear_all()
        await asyncio.sleep(LEASE_S * 2)

    assert run(story).at_s == [LEASE_S * 1.5]


def test_what_came_while_the_process_stood_still_is_heard_before_the_lease_ends() -> None:
    """A message takes a few turns of the loop from its socket to the machine."""

    async def story(alarms: Alarms, rung: Rung) -> None:
        alarms.set(Timer.LEASE, LEASE_S)
        await asyncio.sleep(1.0)
        stand_still(3 * LEASE_S)
        for _ in range(10):
            await asyncio.sleep(0)
        assert rung.at_s == []
        alarms.set(Timer.LEASE, LEASE_S)  # the keep-alive
        await asyncio.sleep(LEASE_S / 2)
        assert rung.at_s == []
        alarms.clear_all()

    assert run(story).at_s == []


def test_where_nothing_came_it_rings_soon_after() -> None:
    async def story(alarms: Alarms, _: Rung) -> None:
        alarms.set(Timer.LEASE, LEASE_S)
        await asyncio.sleep(1.0)
        stand_still(3 * LEASE_S)
        await asyncio.sleep(LEASE_S)

    (at_s,) = run(story).at_s
    assert at_s == 1.0 + 3 * LEASE_S + HEARING_S
