"""Does the headroom of a level reach the instances, and keep who is less urgent waiting there, until it is lifted?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from instance.mailbox import Mailbox
from instance.messages import Subscribe
from orchestrator.core import Orchestrator
from orchestrator.effects import LevelSet
from orchestrator.events import InstanceStarted, LevelRequested
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.levels import parse_levels
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams
from tests.support.fake_cluster import FakeCluster
from tests.support.fleet import TOKEN, Fleet, a_request, expected_output, fleet_of

URGENT, NORMAL = a_request(1, 40, 2_000), a_request(2, 40, 30)
LEVELS = parse_levels("high:-10:256,normal:0")
"""As many blocks as the fake engine has."""


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fleet_of(1) as made:
        made.gateway.subscribe(made.members["i0"])
        yield made


async def one_waits(fleet: Fleet) -> None:
    """Beside the urgent one, which runs."""

    def is_so() -> bool:
        load = fleet.gateway.reports.get("i0")
        return load is not None and (load.running_by_priority, load.num_waiting) == (((-10, 1),), 1)

    await fleet.gateway.until(is_so)


async def run_urgent(fleet: Fleet) -> None:
    fleet.gateway.submit(fleet.members["i0"], "urgent", URGENT, priority=-10)
    await fleet.gateway.until(lambda: fleet.gateway.num_tokens("urgent") >= 3)


async def end_urgent(fleet: Fleet) -> None:
    fleet.gateway.abort(fleet.members["i0"], request_ids=("urgent",))
    await fleet.gateway.until(lambda: fleet.gateway.reports["i0"].num_running == 0)
    assert fleet.gateway.tokens("normal") == expected_output(NORMAL)


async def test_an_instance_heeds_the_headroom_that_a_subscription_names_and_keeps_it_where_others_name_none(
    fleet: Fleet,
) -> None:
    member, own = fleet.members["i0"], fleet.gateway.mailbox
    own.send(member.address, Subscribe(own.address, 5.0, headroom=((-10, 256), (0, 0))))
    own.send(member.address, Subscribe(own.address, 5.0))
    await run_urgent(fleet)
    fleet.gateway.submit(member, "normal", NORMAL)
    await one_waits(fleet)
    assert fleet.gateway.num_tokens("normal") == 0
    own.send(member.address, Subscribe(own.address, 5.0, headroom=()))
    await fleet.finish("normal")
    assert not fleet.gateway.is_finished("urgent"), "it began beside the urgent one"
    await end_urgent(fleet)
    await fleet.check_rest()


async def test_the_orchestrator_tells_it_and_a_changed_level_acts_on_who_waits(fleet: Fleet) -> None:
    mailbox = Mailbox(TOKEN)
    await mailbox.open()
    params = CoreParams(dispatch=DispatchParams(load=LEVELS.load_params), levels=LEVELS)
    loop = OrchestratorLoop(Orchestrator(params), FakeCluster(), mailbox, LoopParams(subscribe_s=0.02))
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    loop.add(InstanceStarted(fleet.members["i0"], "i0", "fake", 16, 256))
    service = fleet.services["i0"]
    try:
        async with asyncio.timeout(10):
            while not service.agent.headroom:  # noqa: ASYNC110 - it waits for sockets, which set no event of ours
                await asyncio.sleep(0.01)
        await run_urgent(fleet)
        fleet.gateway.submit(fleet.members["i0"], "normal", NORMAL)
        await one_waits(fleet)
        done = await loop.ask(lambda token: LevelRequested(token, "high", None, 0, "a test"))
        assert isinstance(done, LevelSet) and done.level.headroom_blocks == 0
        await fleet.finish("normal")
        assert not fleet.gateway.is_finished("urgent")
        await end_urgent(fleet)
    finally:
        loop.stop()
        await running
        mailbox.close()
