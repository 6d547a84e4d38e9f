"""Do streams survive scaling in and out? Real agents, mailboxes, migrations and loop in one process; fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from instance.fake_model import FakeRequest, expected_output
from instance.lifecycle import State
from instance.mailbox import Mailbox
from instance.service import InstanceService
from instance.spec import MigrationSummary
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.core import Orchestrator
from orchestrator.effects import ScalingSet, UpdateMembers, UpdatePriorities
from orchestrator.errors import ActorGone
from orchestrator.events import InstanceStarted, ScaleRequested
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams, ScalingParams, ScalingSnapshot
from tests.support.fleet import TOKEN, Fleet, fleet_of

NUM_REQUESTS = 6
PATIENCE_S = 30.0


def actor_name(instance: str, epoch: int) -> str:
    return f"kvferry-{instance}-{epoch}"


class InProcess:
    """The `Fleet` and `Launcher` ports over services in this process."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._services: dict[str, InstanceService] = {}
        self.launched: list[tuple[str, int]] = []

    async def start(self, instance: InstanceId, epoch: Epoch) -> InstanceStarted:
        self.launched.append((instance, epoch))
        incarnation = await self._fleet.add(instance, "--step-time-ms", "5", epoch=epoch)
        name, facts = actor_name(instance, epoch), self._fleet.started[instance]
        self._services[name] = self._fleet.services[instance]
        return InstanceStarted(incarnation, name, facts.model, facts.block_size, facts.total_blocks, 1)

    async def stop(self, instance: InstanceId, epoch: Epoch) -> None:
        service = self._service(actor_name(instance, epoch))
        load = await service.loop.call(lambda engine: engine.load())
        assert (load.num_running, load.num_waiting) == (0, 0), "a request would end with its instance"
        del self._fleet.services[instance]
        await service.stop()

    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        return await self._service(actor_name).migrate(request_id, destination, mode)

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None:
        service = self._service(actor_name)
        (service.drain if draining else service.undrain)()

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None:
        self._service(actor_name).member_lost(instance, epoch)

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        raise AssertionError("no gateway is told of here")

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        raise AssertionError("no gateway is told of here")

    async def set_priority(self, actor_name: str, request_id: str, priority: int, timeout_s: float) -> PriorityAnswer:
        raise AssertionError("nobody changes a priority here")

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        raise AssertionError("nobody ends a request here")

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        raise AssertionError("nobody calls a migration off here")

    async def wait_dead(self, actor_name: str) -> str:
        await self._service(actor_name).lifetime()
        return "it was stopped"

    def _service(self, actor_name: str) -> InstanceService:
        if actor_name not in self._services:
            raise ActorGone(f"no actor is named {actor_name}")
        return self._services[actor_name]


class World:
    def __init__(self, fleet: Fleet, cluster: InProcess, loop: OrchestratorLoop) -> None:
        self.fleet, self.cluster, self.loop = fleet, cluster, loop

    @property
    def scaling(self) -> ScalingSnapshot:
        scaling = self.loop.snapshot().scaling
        assert scaling is not None
        return scaling

    async def scale(self, target: int) -> None:
        """Returns when the target is reached and nothing is under way."""
        assert isinstance(await self.loop.ask(lambda token: ScaleRequested(token, target)), ScalingSet)
        await self.until(lambda: self.scaling.num_present == target and not self.scaling.retiring)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:  # the loop's ticks are what is waited for
                if is_so():
                    return
                await asyncio.sleep(0.02)


@asynccontextmanager
async def world_of(num_instances: int, linger_s: float = 0.2) -> AsyncIterator[World]:
    async with fleet_of(0) as fleet:
        cluster, mailbox = InProcess(fleet), Mailbox(TOKEN)
        await mailbox.open()
        scaling = ScalingParams(can_start=True, most=3, capacity=3, first_epoch=2, linger_s=linger_s)
        core = Orchestrator(CoreParams(is_rebalancing=False, scaling=scaling))
        loop = OrchestratorLoop(core, cluster, mailbox, LoopParams(tick_s=0.05), launcher=cluster)
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0)
        for number in range(num_instances):
            loop.add(await cluster.start(InstanceId(f"instance-{number}"), Epoch(1)))
        try:
            yield World(fleet, cluster, loop)
            core.check_integrity()
        finally:
            loop.stop()
            await running
            mailbox.close()


async def test_scaling_in_under_load_and_out_again_loses_no_token() -> None:
    """1. Streams run on both. 2. One is given up: its streams move. 3. A new one comes under the free name."""
    requests = {f"scaled-{n}": FakeRequest(prompt=tuple(range(n, n + 30)), max_tokens=600) for n in range(NUM_REQUESTS)}
    async with world_of(2) as world:
        gateway, members = world.fleet.gateway, world.fleet.members
        for number, (name, request) in enumerate(requests.items()):
            gateway.submit(members[f"instance-{number % 2}"], name, request)
        await gateway.until(lambda: all(gateway.entries[name] for name in requests))
        await world.scale(1)
        assert len(world.fleet.services) == 1
        (left,) = world.fleet.services
        assert any(not gateway.is_finished(name) for name in requests), "or nothing was tested"
        await world.scale(2)
        assert sorted(world.fleet.services) == ["instance-0", "instance-1"]
        assert world.cluster.launched[-1][1] == 2, "a new epoch"
        (new,) = world.fleet.services.keys() - {left}
        gateway.submit(members[new], "to-the-new-one", next(iter(requests.values())))
        await world.fleet.finish(*requests, "to-the-new-one")
        for name, request in requests.items():
            assert gateway.tokens(name) == expected_output(request), "scaling changes no token"
        moved = [name for name in requests if len(gateway.senders(name)) > 1]
        assert moved, "the streams of the one that left went on elsewhere"
        assert not any(answer.refusal for answer in gateway.answers.values()), "0 errors"
        await world.fleet.check_rest()


async def test_what_arrives_at_an_instance_on_its_way_out_is_refused_and_not_lost() -> None:
    request = FakeRequest(prompt=tuple(range(30)), max_tokens=300)
    async with world_of(2, linger_s=1.0) as world:
        gateway = world.fleet.gateway
        gateway.submit(world.fleet.members["instance-1"], "runs", request)
        gateway.submit(world.fleet.members["instance-0"], "too", request)
        await gateway.until(lambda: bool(gateway.entries["runs"]))
        scaling = asyncio.create_task(world.scale(1))
        await world.until(lambda: bool(world.scaling.retiring))
        (leaving,) = world.scaling.retiring
        service = world.fleet.services[leaving]
        await world.until(lambda: service.agent.state is State.DRAINING)
        gateway.submit(world.fleet.members[leaving], "late", request)
        await gateway.until(lambda: "late" in gateway.answers)
        refusal = gateway.answers["late"]
        assert refusal.refusal is not None and not refusal.final, "its gateway asks another"
        await scaling
        await world.fleet.finish("runs", "too")
        assert gateway.tokens("runs") == expected_output(request)


async def test_an_instance_that_dies_on_its_own_is_replaced_while_a_number_holds() -> None:
    async with world_of(2) as world:
        await world.scale(2)
        killed = world.fleet.services.pop("instance-1")
        await killed.break_down()
        await world.until(lambda: "instance-1" in world.fleet.services and world.scaling.num_present == 2)
        assert world.cluster.launched[-1] == ("instance-1", 2)
