"""The instance as a Ray actor: `InstanceService`, bytes (msgspec JSON) in and out. The package's one ray import.

Never restarted by Ray: a new one is made under a higher epoch. When its engine fails the process ends at once, so that
the end of `lifetime` is the one death notice for every way to die.
"""

from __future__ import annotations

import asyncio
import logging
import os

import msgspec
import ray

from instance.errors import EngineFailed
from instance.service import InstanceService
from instance.spec import InstanceSpec
from migration.types import Incarnation

_LOG = logging.getLogger(__name__)
ENGINE_FAILED_STATUS = 70
"""Exit status of a process whose engine failed (EX_SOFTWARE)."""
CLEAN_UP_S = 2.0


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=256)
class InstanceActor:
    """Named ``kvferry-{instance}-{epoch}`` by whoever makes it."""

    def __init__(self) -> None:
        self._service = InstanceService()
        self._guard: asyncio.Task[None] | None = None

    async def start(self, spec_json: bytes) -> bytes:
        """Returns InstanceStarted. Raises StartError: one line that says what to do."""
        started = await self._service.start(msgspec.json.decode(spec_json, type=InstanceSpec))
        self._guard = asyncio.create_task(self._die_with_the_engine())
        return msgspec.json.encode(started)

    async def migrate(self, request_id: str, destination_json: bytes, mode: str = "live") -> bytes:
        """Returns MigrationSummary, whatever the outcome. `destination_json`: migration.types.Incarnation."""
        destination = msgspec.json.decode(destination_json, type=Incarnation)
        return msgspec.json.encode(await self._service.migrate(request_id, destination, mode))

    async def cancel_migration(self, request_id: str, reason: str) -> bool:
        """False: no migration of this request leaves here."""
        return self._service.cancel_migration(request_id, reason)

    async def set_priority(self, request_id: str, priority: int) -> bytes:
        """Returns PriorityAnswer."""
        return msgspec.json.encode(await self._service.set_priority(request_id, priority))

    async def drain(self) -> None:
        self._service.drain()

    async def undrain(self) -> None:
        self._service.undrain()

    async def member_lost(self, instance: str, epoch: int) -> None:
        self._service.member_lost(instance, epoch)

    async def reset_prefix_cache(self) -> bool:
        return await self._service.reset_prefix_cache()

    async def facts(self) -> bytes:
        """EngineFacts."""
        return msgspec.json.encode(self._service.facts())

    async def stop(self) -> None:
        """Ends the engine and everything it holds; the process itself is ended by whoever made the actor."""
        if self._guard is not None:
            self._guard.cancel()
        await self._service.stop()

    async def lifetime(self) -> None:
        """Returns after `stop`. Otherwise it ends with the process: Ray's error at the caller is the death notice."""
        try:
            await self._service.lifetime()
        except EngineFailed:
            await asyncio.Event().wait()  # The guard ends the process in a moment.

    async def _die_with_the_engine(self) -> None:
        try:
            await self._service.lifetime()
        except EngineFailed as error:
            _LOG.critical("this instance ends: %s", error, exc_info=error)
            # Children of a broken engine may not answer: they get this long, then they end with our process.
            await asyncio.wait((asyncio.create_task(self._service.stop()),), timeout=CLEAN_UP_S)
            os._exit(ENGINE_FAILED_STATUS)
