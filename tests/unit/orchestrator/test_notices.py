"""Does a death notice reach everybody, and is nobody declared dead who is only hard to reach?"""

from __future__ import annotations

import asyncio

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from instance.mailbox import Mailbox
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.core import Orchestrator
from orchestrator.effects import UpdatePriorities
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.events import InstanceStarted
from orchestrator.policy.levels import DEFAULT_LEVELS, parse_levels
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.runtime.ray_cluster import RayCluster, settled, why_over
from orchestrator.state import CoreParams
from tests.support.fake_cluster import FakeCluster

PEER = "kvferry-instance-1-1"


class Lifetime:
    """Ray's `handle.lifetime`: raises these in turn, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.num_calls = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def remote(self) -> None:
        self.num_calls += 1
        await self.may_answer.wait()
        if self.errors:
            raise self.errors.pop(0)


class Handle:
    def __init__(self, *errors: Exception) -> None:
        self.lifetime = Lifetime(*errors)
        self.set_priorities = Method()


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("the connection broke", b"0" * 16)


async def test_an_actor_that_cannot_be_reached_is_asked_again_and_not_called_dead() -> None:
    handle = Handle(unavailable(), unavailable())
    assert await why_over(handle, ask_again_s=0.0) == "it was stopped"
    assert handle.lifetime.num_calls == 3


async def test_a_dead_actor_is_called_dead_at_once() -> None:
    handle = Handle(ActorDiedError())
    assert await why_over(handle, ask_again_s=0.0) == "its process ended"
    assert handle.lifetime.num_calls == 1


async def test_a_call_over_a_broken_connection_has_failed_but_its_actor_is_not_gone() -> None:
    with pytest.raises(CallFailed):
        await settled(Lifetime(unavailable()).remote(), 1.0)
    with pytest.raises(ActorGone):
        await settled(Lifetime(ActorDiedError()).remote(), 1.0)


class Method:
    """Ray's `handle.method`: raises this, or answers."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_calls = 0

    async def remote(self, *_arguments: object) -> bytes:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return b""


class NamedActors:
    """Ray's table of named actors, as far as `RayCluster` asks it: one name, whose process changes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handle = Handle()
        self.killed: list[Handle] = []
        monkeypatch.setattr(ray, "get_actor", lambda _name, namespace: self.handle)
        monkeypatch.setattr(ray, "kill", lambda handle, no_restart: self.killed.append(handle))


PRIORITIES = UpdatePriorities(parse_levels(DEFAULT_LEVELS), (), "test")


async def test_the_actor_that_takes_a_dead_ones_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    named, cluster = NamedActors(monkeypatch), RayCluster(is_ours=False)
    named.handle.set_priorities.error = ActorDiedError()
    with pytest.raises(ActorGone):
        await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    named.handle = Handle()
    await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    assert named.handle.set_priorities.num_calls == 2


async def test_an_actor_whose_connection_broke_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named, cluster = NamedActors(monkeypatch), RayCluster(is_ours=False)
    first = named.handle
    first.set_priorities.error = unavailable()
    with pytest.raises(CallFailed):
        await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    named.handle, first.set_priorities.error = Handle(), None
    await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    assert first.set_priorities.num_calls == 2


async def test_a_death_notice_ends_the_dead_one_and_not_the_one_that_took_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named, cluster = NamedActors(monkeypatch), RayCluster(is_ours=False)
    dead = named.handle
    dead.lifetime.errors, dead.set_priorities.error = [ActorDiedError()], ActorDiedError()
    dead.lifetime.may_answer.clear()
    notice = asyncio.create_task(cluster.wait_dead("kvferry-gateway-0"))
    await asyncio.sleep(0)
    with pytest.raises(ActorGone):
        await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    named.handle = Handle()
    await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    dead.lifetime.may_answer.set()
    assert await notice == "its process ended" and named.killed == [dead]
    await cluster.set_priorities("kvferry-gateway-0", PRIORITIES, 1.0)
    assert named.handle.set_priorities.num_calls == 2


async def test_the_actor_that_takes_its_name_after_the_death_notice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    named, cluster = NamedActors(monkeypatch), RayCluster(is_ours=False)
    named.handle.lifetime.errors = [ActorDiedError(), ActorDiedError()]
    await cluster.wait_dead("kvferry-gateway-0")
    named.handle = Handle()
    assert await cluster.wait_dead("kvferry-gateway-0") == "it was stopped"


async def test_whoever_has_taken_a_name_is_not_ended_by_who_never_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    named, cluster = NamedActors(monkeypatch), RayCluster(is_ours=False)
    dead = named.handle
    dead.lifetime.errors = [ActorDiedError()]
    await cluster.wait_dead("kvferry-gateway-0")
    named.handle = Handle()
    await cluster.stop_actor("kvferry-gateway-0", 1.0)
    cluster.kill_all()
    assert named.killed == [dead] * 3


async def lose_instance_0(cluster: FakeCluster) -> None:
    """Run a loop with two instances, end the first, and wait until no fence is on its way any more."""
    mailbox = Mailbox("test")
    await mailbox.open()
    loop = OrchestratorLoop(Orchestrator(CoreParams()), cluster, mailbox, LoopParams(retry_s=0.001))
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    try:
        for name in ("instance-0", "instance-1"):
            incarnation = Incarnation(InstanceId(name), Epoch(1), "tcp://127.0.0.1:1")
            loop.add(InstanceStarted(incarnation, f"kvferry-{name}-1", "tiny", 16, 1000, process_id=7))
        cluster.deaths["kvferry-instance-0-1"].set_result("killed")
        async with asyncio.timeout(5.0):
            await cluster.fence_begun.wait()
            await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name().startswith("fence-")))
    finally:
        loop.stop()
        await running
        mailbox.close()


async def test_a_fence_is_repeated_until_the_peer_knows() -> None:
    cluster = FakeCluster()
    cluster.failures_left[PEER] = 3
    await lose_instance_0(cluster)
    assert cluster.fence_tried == [PEER] * 4
    assert cluster.fenced == [(PEER, "instance-0", 1)]


async def test_a_peer_that_is_gone_itself_is_not_told_again() -> None:
    cluster = FakeCluster()
    cluster.deaths[PEER].set_result("killed too")
    await lose_instance_0(cluster)
    assert cluster.fence_tried == [PEER] and cluster.fenced == []
