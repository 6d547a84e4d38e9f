"""Does a request that waits at a full instance begin at another, by the core's own word, with the tokens it would have
had? Fake engines, real inboxes and migrations; the core is played its ticks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from migration.types import Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import StartMigration
from orchestrator.events import (
    InstanceStarted,
    MigrationEnded,
    MigrationFigures,
    ReportReceived,
    RequestsReceived,
    Ticked,
)
from orchestrator.state import CoreParams
from tests.support.fleet import Fleet, a_request, expected_output, fleet_of

NUM_BLOCKS = 100
FLAGS = ("--num-gpu-blocks-override", str(NUM_BLOCKS), "--step-time-ms", "4")
TICK_S = 0.05


class Shell:
    """As much of the orchestrator's loop as moves something."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.core = Orchestrator(CoreParams())
        self.started: list[StartMigration] = []
        for name, incarnation in fleet.members.items():
            fleet.gateway.subscribe(incarnation, with_requests=True)
            started = InstanceStarted(incarnation, name, "tiny", 16, NUM_BLOCKS)
            self.core.on(started, asyncio.get_running_loop().time())

    async def ticks_until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_so():
                await self._tick()
                await asyncio.sleep(TICK_S)

    async def _tick(self) -> None:
        now_s, gateway = asyncio.get_running_loop().time(), self.fleet.gateway
        for load in gateway.reports.values():
            self.core.on(ReportReceived(load), now_s)
        for told in gateway.request_reports.values():
            self.core.on(RequestsReceived(told), now_s)
        for move in [one for one in self.core.on(Ticked(), now_s) if isinstance(one, StartMigration)]:
            self.started.append(move)
            service, there = self.fleet.services[move.source.instance], self.fleet.members[move.destination.instance]
            told_end = await service.migrate(move.request_id, there, move.mode)
            assert told_end.copied_blocks == told_end.tail_blocks == 0 or not move.reason.startswith("requeue")
            figures = MigrationFigures(told_end.num_stages, told_end.copied_blocks, told_end.tail_blocks)
            self.core.on(MigrationEnded(move.number, Outcome(told_end.outcome), told_end.reason, figures), now_s)
            self.core.check_integrity()


@pytest.mark.parametrize("flags", [(), ("--pipelined",)])
async def test_one_that_waits_at_a_full_instance_begins_at_the_idle_one(flags: tuple[str, ...]) -> None:
    """1. A long request fills i0. 2. Another waits behind it for memory. 3. i1 is idle: it goes there, and begins
    while the long one is still running."""
    long, waits = a_request(1, 1000, 590), a_request(2, 700, 100)
    async with fleet_of(2, *FLAGS, *flags) as fleet:
        await fleet.run("i0", "long", long, 5)
        shell = Shell(fleet)
        fleet.gateway.submit(fleet.members["i0"], "waits", waits)
        await shell.ticks_until(lambda: fleet.gateway.num_tokens("waits") > 0)
        assert not fleet.gateway.is_finished("long"), "it did not begin because there was room at last"
        await fleet.finish("long", "waits")
        assert fleet.gateway.tokens("waits") == expected_output(waits)
        assert fleet.gateway.tokens("long") == expected_output(long)
        assert (fleet.gateway.senders("waits"), fleet.gateway.senders("long")) == (["i1"], ["i0"])
        (move,) = shell.started
        assert move.request_id == "waits" and move.reason.startswith(
            "requeue: the first in the queue wants 44 blocks, "
        )
        await fleet.check_rest()


@pytest.mark.parametrize("flags", [(), ("--pipelined",)])
async def test_one_that_was_preempted_goes_on_at_the_idle_one(flags: tuple[str, ...]) -> None:
    """1. Two requests grow until i0 is full, and one is preempted. 2. The core begins to look: i1 is idle. 3. It
    computes there anew what it had, and goes on with the next token."""
    stays, goes = a_request(3, 400, 1100), a_request(4, 400, 700, seed=9)
    async with fleet_of(2, *FLAGS, *flags) as fleet:
        await fleet.run("i0", "stays", stays, 1)
        fleet.gateway.subscribe(fleet.members["i0"], with_requests=True)
        fleet.gateway.submit(fleet.members["i0"], "goes", goes)
        await fleet.gateway.until(lambda: status_of(fleet, "goes") == "preempted")
        shell = Shell(fleet)
        await shell.ticks_until(lambda: fleet.gateway.senders("goes") == ["i0", "i1"])
        assert not fleet.gateway.is_finished("stays")
        await fleet.finish("stays", "goes")
        assert fleet.gateway.tokens("goes") == expected_output(goes)
        assert fleet.gateway.tokens("stays") == expected_output(stays)
        first = shell.started[0]
        assert first.request_id == "goes" and first.reason.startswith("requeue: ")
        await fleet.check_rest()


def status_of(fleet: Fleet, request_id: str) -> str:
    told = fleet.gateway.request_reports.get("i0")
    return next((one.status for one in told.requests if one.request_id == request_id), "") if told else ""
