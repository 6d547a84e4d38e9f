"""Does each gateway hear the latest, whatever another one does?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from instance.lifecycle import State
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import Member, UpdateMembers, UpdatePriorities
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.levels import DEFAULT_LEVELS, parse_levels
from orchestrator.runtime.telling import GatewayTeller
from tests.support.fake_cluster import FakeCluster

LEVELS = parse_levels(DEFAULT_LEVELS)
FIRST, SECOND = "kvferry-gateway-0", "kvferry-gateway-1"


def priorities(*ranks: int) -> UpdatePriorities:
    return UpdatePriorities(LEVELS, tuple((f"key-{rank}", rank) for rank in ranks), "test")


def members(*names: str) -> UpdateMembers:
    incarnations = [Incarnation(InstanceId(name), Epoch(1), "tcp://127.0.0.1:1") for name in names]
    listed = tuple(Member(one, f"kvferry-{one.instance}-1", State.SERVING) for one in incarnations)
    return UpdateMembers(listed, 2, DispatchParams(), reason="test")


@asynccontextmanager
async def telling(cluster: FakeCluster) -> AsyncIterator[GatewayTeller]:
    """Two gateways that know of instance-0 and of no key."""
    teller = GatewayTeller(cluster, call_timeout_s=10.0, retry_s=0.001)
    running = asyncio.create_task(teller.run())
    for gateway in ("gateway-0", "gateway-1"):
        teller.add(gateway, f"kvferry-{gateway}")
    teller.update(members("instance-0"))
    teller.update(priorities())
    try:
        async with asyncio.timeout(5.0):
            await teller.until_known()
            yield teller
    finally:
        running.cancel()
        await asyncio.wait([running])


@contextmanager
def hanging(cluster: FakeCluster, actor_name: str) -> Iterator[None]:
    """It answers nothing meanwhile."""
    cluster.answers_when[actor_name] = asyncio.Event()
    yield
    cluster.answers_when.pop(actor_name).set()


async def rounds() -> None:
    """Let every task go on as far as it can without an answer."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_gateway_that_hangs_keeps_no_other_on_the_old_priorities() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        with hanging(cluster, SECOND):
            teller.update(priorities(1))
            await rounds()
            teller.update(priorities(1, 2))
            await rounds()
            assert cluster.urgencies[FIRST] == priorities(1, 2) and cluster.urgencies[SECOND] == priorities()
            known = asyncio.create_task(teller.until_known())
            await rounds()
            assert not known.done(), "one does not know yet"
        await known
        assert cluster.urgencies[SECOND] == priorities(1, 2)


async def test_a_gateway_that_hangs_keeps_no_other_on_the_old_members() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        with hanging(cluster, SECOND):
            teller.update(members("instance-0", "instance-1"))
            await rounds()
            teller.update(members("instance-1"))
            await rounds()
            assert cluster.members[FIRST] == members("instance-1").members
            assert cluster.members[SECOND] == members("instance-0").members
        await teller.until_known()
        assert cluster.members[SECOND] == members("instance-1").members


async def test_nobody_waits_for_a_gateway_that_hangs_once_it_is_lost() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        with hanging(cluster, SECOND):
            teller.update(priorities(1))
            await rounds()
            teller.lost("gateway-1")
            await teller.until_known()
            assert cluster.urgencies[FIRST] == priorities(1)


async def test_nobody_waits_for_a_gateway_whose_process_is_gone() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        cluster.deaths[SECOND].set_result("killed")
        teller.update(priorities(1))
        await teller.until_known()
        assert cluster.urgencies[FIRST] == priorities(1) and cluster.urgencies[SECOND] == priorities()


async def test_a_gateway_that_takes_the_place_of_one_that_hangs_is_told_all() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        cluster.answers_when[SECOND] = asyncio.Event()
        teller.update(priorities(1))
        await rounds()
        del cluster.urgencies[SECOND], cluster.members[SECOND], cluster.answers_when[SECOND]
        teller.add("gateway-1", SECOND)
        await teller.until_known()
        assert cluster.urgencies[SECOND] == priorities(1)
        assert cluster.members[SECOND] == members("instance-0").members


async def test_one_whose_calls_fail_is_told_again_until_it_knows() -> None:
    cluster = FakeCluster()
    async with telling(cluster) as teller:
        cluster.failures_left[SECOND] = 3
        teller.update(priorities(1))
        await teller.until_known()
        assert cluster.urgencies[SECOND] == priorities(1) and cluster.failures_left[SECOND] == 0
