"""How is one instance started and stopped on Ray, by whoever does it: the starting process, or the orchestrator?"""

from __future__ import annotations

from typing import Protocol

import msgspec

from instance.spec import InstanceSpec
from instance.spec import InstanceStarted as Facts
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.errors import ActorGone, CallFailed, StartUpError
from orchestrator.events import InstanceStarted
from orchestrator.runtime.ray_cluster import Resources, instance_actor_name

STOP_INSTANCE_S = 4.0


class Actors(Protocol):
    """What starting and stopping an instance needs of `RayCluster`."""

    def make_instance(self, spec: InstanceSpec, resources: Resources) -> str: ...

    async def process_id(self, actor_name: str, timeout_s: float) -> int: ...

    async def start_instance(self, actor_name: str, spec: InstanceSpec, timeout_s: float) -> Facts: ...

    async def stop_actor(self, actor_name: str, timeout_s: float) -> None: ...

    def kill(self, actor_name: str) -> None: ...


class RayLauncher:
    """The `Launcher` port on Ray: instances that differ from a template in name and epoch only."""

    def __init__(self, cluster: Actors, template: InstanceSpec, resources: Resources, timeout_s: float) -> None:
        """`timeout_s`: for a place on a node, and again for loading."""
        self._cluster = cluster
        self._template = template
        self._resources = resources
        self._timeout_s = timeout_s

    async def start(self, instance: InstanceId, epoch: Epoch) -> InstanceStarted:
        spec = msgspec.structs.replace(self._template, instance=instance, epoch=epoch)
        actor_name = self._cluster.make_instance(spec, self._resources)
        try:
            process_id = await find_place(self._cluster, actor_name, self._resources, self._timeout_s)
            facts = await load(self._cluster, actor_name, spec, self._timeout_s)
        except BaseException:
            # Whatever the reason, also when the orchestrator stops: nobody else knows of this actor.
            self._cluster.kill(actor_name)
            raise
        incarnation = Incarnation(instance, epoch, facts.address)
        return InstanceStarted(incarnation, actor_name, facts.model, facts.block_size, facts.total_blocks, process_id)

    async def stop(self, instance: InstanceId, epoch: Epoch) -> None:
        await self._cluster.stop_actor(instance_actor_name(instance, epoch), STOP_INSTANCE_S)


async def find_place(cluster: Actors, actor_name: str, resources: Resources, timeout_s: float) -> int:
    """The process of the actor, once Ray has found a node for it. Raises StartUpError with one line."""
    try:
        return await cluster.process_id(actor_name, timeout_s)
    except CallFailed as error:
        raise StartUpError(f"no process within {timeout_s:g} s: is there room for {resources}?") from error
    except ActorGone as error:
        raise StartUpError(str(error)) from error


async def load(cluster: Actors, actor_name: str, spec: InstanceSpec, timeout_s: float) -> Facts:
    """Returns when the instance serves. Raises StartUpError with one line."""
    try:
        return await cluster.start_instance(actor_name, spec, timeout_s)
    except (ActorGone, CallFailed) as error:
        raise StartUpError(str(error)) from error
