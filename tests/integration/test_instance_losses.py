"""What is left when an instance drains, is full, or dies in the middle of a migration?"""

from __future__ import annotations

import asyncio

import pytest

from migration.types import Incarnation
from tests.integration.test_instance_pair import migrate, until_idle
from tests.support.fleet import a_request, expected_output, fleet_of


async def test_a_draining_instance_takes_nothing_in_and_its_requests_can_leave() -> None:
    request = a_request(9, 100, 800)
    async with fleet_of(2) as fleet:
        await asyncio.gather(fleet.run("i0", "leaver", request, 5), fleet.run("i1", "stranger", request, 5))
        fleet.gateway.subscribe(fleet.members["i0"])
        fleet.services["i0"].drain()
        await fleet.gateway.until(lambda: getattr(fleet.gateway.reports.get("i0"), "state", "") == "draining")
        fleet.gateway.submit(fleet.members["i0"], "late", request)
        await fleet.gateway.until(lambda: "late" in fleet.gateway.answers)
        late = fleet.gateway.answers["late"]
        assert (late.refusal, late.final) == ("this instance is draining", False)
        told_in = await migrate(fleet, "stranger", "i1", "i0")
        assert (told_in.outcome, "draining" in told_in.reason) == ("refused", True), told_in
        assert (await migrate(fleet, "leaver", "i0", "i1")).outcome == "committed"
        await fleet.finish("leaver", "stranger")
        assert fleet.gateway.tokens("leaver") == fleet.gateway.tokens("stranger") == expected_output(request)
        fleet.services["i0"].undrain()
        await fleet.run("i0", "welcome", request, 5)
        await fleet.finish("welcome")
        await fleet.check_rest()


async def test_a_full_destination_refuses_and_nothing_leaks() -> None:
    request = a_request(10, 800, 500)
    async with fleet_of(2, "--num-gpu-blocks-override", "90") as fleet:
        await asyncio.gather(fleet.run("i0", "mover", request, 5), fleet.run("i1", "owner", a_request(11, 900, 500), 5))
        told = await migrate(fleet, "mover", "i0", "i1")
        assert told.outcome == "refused" and "blocks" in told.reason, told
        await fleet.finish("mover", "owner")
        assert fleet.gateway.tokens("mover") == expected_output(request)
        await fleet.check_rest()


@pytest.mark.parametrize("after", [0, 3, 6, 10, 15, 25, 40])
async def test_when_the_destination_dies_in_the_middle_the_source_goes_on(after: int) -> None:
    """1. The source copies stages. 2. The destination is killed. 3. The orchestrator tells the source that this epoch
    is over. 4. The source keeps (or takes back) the request, unless it was committed before: then the gateway rescues.
    """
    request = a_request(12, 1500, 400)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        for _ in range(after):
            await asyncio.sleep(0)
        lost = await fleet.kill("i1")
        fleet.services["i0"].member_lost(lost.instance, lost.epoch)
        told = await moving
        if told.outcome != "committed":
            await fleet.finish("r")
            assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_when_the_source_dies_in_the_middle_the_destination_frees_what_it_held() -> None:
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", a_request(13, 3000, 400), 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        service = fleet.services["i1"]
        async with asyncio.timeout(10):
            while await service.loop.call(lambda engine: engine.load().reserved_blocks) == 0:
                pass
        lost = await fleet.kill("i0")
        moving.cancel()
        service.member_lost(lost.instance, lost.epoch)
        async with asyncio.timeout(10):
            while await service.loop.call(lambda engine: engine.load().reserved_blocks):
                pass
        fleet.gateway.abort(fleet.members["i1"], request_ids=("r",))  # If it had been committed just before.
        await until_idle(fleet)
        await fleet.check_rest()


async def test_a_destination_of_another_epoch_refuses() -> None:
    request = a_request(14, 100, 800)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        there = fleet.members["i1"]
        told = await fleet.services["i0"].migrate("r", Incarnation(there.instance, type(there.epoch)(7), there.address))
        assert told.outcome == "refused" and "epoch" in told.reason, told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_a_destination_that_was_declared_dead_is_refused_at_once() -> None:
    request = a_request(15, 100, 800)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        there = fleet.members["i1"]
        fleet.services["i0"].member_lost(there.instance, there.epoch)
        told = await fleet.services["i0"].migrate("r", there)
        assert told.outcome == "refused" and "known to be dead" in told.reason, told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()
