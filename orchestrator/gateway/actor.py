"""How does a gateway live in Ray? The service, and the death notices of the instances. The package's one ray import."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec
import ray

from orchestrator.gateway.priorities import PriorityRules
from orchestrator.gateway.spec import GatewayConfig, Member, Membership, PrioritiesNow
from orchestrator.policy.levels import Levels

if TYPE_CHECKING:
    from orchestrator.gateway.service import GatewayService

logger = logging.getLogger(__name__)

NAMESPACE = "kvferry"
ASK_AGAIN_S = 0.5


@ray.remote(max_restarts=0, max_concurrency=1000)
class GatewayActor:
    """Arguments and results are msgspec JSON (`spec.py`)."""

    def __init__(self) -> None:
        self._service: GatewayService | None = None
        self._watched: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._members: tuple[Member, ...] = ()

    async def start(self, config_json: bytes) -> bytes:
        """Returns GatewayStarted. Raises GatewayError (one line that says what to do)."""
        # Here and not above: whoever merely names this class (the command line) must not wait for vLLM's import.
        from orchestrator.gateway.service import GatewayService  # noqa: PLC0415

        self._service = GatewayService()
        started = await self._service.start(msgspec.json.decode(config_json, type=GatewayConfig))
        self._service.on_reset_prefix_cache(self._reset_prefix_caches)
        return msgspec.json.encode(started)

    async def set_members(self, members_json: bytes) -> None:
        """A JSON Membership."""
        if self._service is None:
            return
        told = msgspec.json.decode(members_json, type=Membership)
        self._members = told.members
        self._service.set_dispatch(told.dispatch)
        self._service.set_members(told.members, told.num_gateways)
        current = {(member.instance, member.epoch) for member in self._members}
        for gone in self._watched.keys() - current:
            self._watched.pop(gone).cancel()
        for member in self._members:
            key = (member.instance, member.epoch)
            if member.actor_name and key not in self._watched:
                self._watched[key] = asyncio.create_task(self._watch(member))

    async def set_priorities(self, priorities_json: bytes) -> None:
        """A JSON PrioritiesNow."""
        if self._service is not None:
            told = msgspec.json.decode(priorities_json, type=PrioritiesNow)
            self._service.set_priorities(PriorityRules(Levels(told.levels), dict(told.key_classes)))

    async def cancel_request(self, request_id: str) -> bool:
        """False: the stream of this request is not here."""
        return self._service is not None and self._service.cancel_request(request_id)

    async def stop(self) -> None:
        for task in self._watched.values():
            task.cancel()
        self._watched.clear()
        if self._service is not None:
            await self._service.stop()

    async def lifetime(self) -> None:
        """Returns when the gateway has stopped; raises RayActorError at the caller when its process has died."""
        if self._service is not None:
            await self._service.lifetime()

    async def _watch(self, member: Member) -> None:
        """A call that never returns while the instance lives; its end, however it comes, is the death notice."""
        is_alive = True
        while is_alive:
            is_alive = False
            try:
                await ray.get_actor(member.actor_name, namespace=NAMESPACE).lifetime.remote()
            except ray.exceptions.ActorUnavailableError:
                is_alive = True  # unknown, not dead: the connection broke; ask again
                await asyncio.sleep(ASK_AGAIN_S)
            except (ray.exceptions.RayActorError, ValueError) as error:
                logger.warning("%s (epoch %d) is gone: %s", member.instance, member.epoch, error)
        if self._service is not None:
            self._service.member_lost(member.instance, member.epoch)

    async def _reset_prefix_caches(self) -> bool:
        actors = [ray.get_actor(one.actor_name, namespace=NAMESPACE) for one in self._members if one.actor_name]
        return all(await asyncio.gather(*[actor.reset_prefix_cache.remote() for actor in actors]))
