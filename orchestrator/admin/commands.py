"""How does the admin API change what runs? Moving, ending, draining: each a command to the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from migration.types import InstanceId
from orchestrator.admin import convert
from orchestrator.admin.failures import Failure, declined, invalid
from orchestrator.admin.idempotency import Repetitions
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.effects import MigrationFinished, Refused, Reprioritised, RequestEnded, Result
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    DrainRequested,
    Event,
    MigrateRequested,
    PriorityRequested,
    Token,
    UndrainRequested,
)
from orchestrator.priority_classes import Priorities
from orchestrator.state import Snapshot
from orchestrator.tuning import Policy

PROGRESS_S = 0.25
"""Time between two progress messages of a drain."""


SET_PRIORITY = "admin API SetRequestPriority"
"""Who asked, as the journal says it."""


class Brain(Protocol):
    """What the service needs of the loop."""

    def snapshot(self) -> Snapshot: ...

    def policy(self) -> Policy: ...

    def priorities(self) -> Priorities: ...

    async def until_gateways_know(self) -> None:
        """Return once every live gateway has been told what holds now."""

    async def ask(self, make: Callable[[Token], Event]) -> Result:
        """The core has the command before this first waits, so what was checked just before still holds."""


class Commander:
    """The methods that move, end and drain. All raise Failure."""

    def __init__(self, brain: Brain, repetitions: Repetitions) -> None:
        self._brain = brain
        self._repetitions = repetitions

    async def migrate_request(self, asked: pb.MigrateRequestRequest) -> pb.MigrateRequestResponse:
        destination = convert.instance_id(asked.destination, "destination")
        reference = convert.bare(asked.name, convert.REQUESTS)
        if asked.mode not in convert.MODES:
            raise invalid("mode", f"{asked.mode} is none of its values")
        mode = convert.MODES[asked.mode]
        self._check_epoch(destination, asked.destination_epoch if asked.HasField("destination_epoch") else None)
        result = await self._brain.ask(lambda token: MigrateRequested(token, reference, destination, mode))
        return pb.MigrateRequestResponse(migration=self._migration(result))

    async def set_request_priority(self, asked: pb.SetRequestPriorityRequest) -> pb.SetRequestPriorityResponse:
        reference = convert.bare(asked.name, convert.REQUESTS)
        result = await self._brain.ask(lambda token: PriorityRequested(token, reference, asked.level, SET_PRIORITY))
        if not isinstance(result, Reprioritised):
            raise declined(result)
        return convert.reprioritised(result)

    async def cancel_migration(self, asked: pb.CancelMigrationRequest) -> pb.CancelMigrationResponse:
        number = convert.migration_number(asked.name)
        result = await self._brain.ask(lambda token: CancelMigrationRequested(token, number))
        return pb.CancelMigrationResponse(migration=self._migration(result))

    async def cancel_request(self, asked: pb.CancelRequestRequest) -> pb.CancelRequestResponse:
        reference = convert.bare(asked.name, convert.REQUESTS)
        result = await self._brain.ask(lambda token: CancelRequested(token, reference, asked.validate_only))
        if not isinstance(result, RequestEnded):
            raise declined(result)
        owner = convert.find_instance(self._brain.snapshot(), result.instance)
        if owner is None:  # lost, and so long ago that it is forgotten
            return pb.CancelRequestResponse(request=pb.Request(name=convert.REQUESTS + result.request.request_id))
        return pb.CancelRequestResponse(request=convert.request(result.request, owner))

    async def drain_instance(self, asked: pb.DrainInstanceRequest) -> AsyncIterator[pb.DrainInstanceResponse]:
        name = convert.instance_id(asked.name)
        epoch = asked.epoch if asked.HasField("epoch") else None

        async def drain() -> Result:
            self._check_epoch(name, epoch)
            result = await self._brain.ask(lambda token: DrainRequested(token, name, asked.wait))
            if isinstance(result, Refused):
                raise declined(result)
            return result

        is_shared = bool(asked.request_id)
        command = (
            self._repetitions.begin(asked.request_id, asked, drain)
            if is_shared
            else asyncio.get_running_loop().create_task(drain())
        )
        try:
            while True:
                settled, _ = await asyncio.wait([command], timeout=PROGRESS_S)
                if settled:
                    break
                yield convert.drain_progress(self._brain.snapshot(), name, done=False)
        finally:
            if not is_shared:
                command.cancel()
        command.result()
        yield convert.drain_progress(self._brain.snapshot(), name, done=asked.wait)

    async def undrain_instance(self, asked: pb.UndrainInstanceRequest) -> pb.UndrainInstanceResponse:
        name = convert.instance_id(asked.name)
        self._check_epoch(name, asked.epoch if asked.HasField("epoch") else None)
        result = await self._brain.ask(lambda token: UndrainRequested(token, name))
        if isinstance(result, Refused):
            raise declined(result)
        return pb.UndrainInstanceResponse(instance=convert.drain_progress(self._brain.snapshot(), name, False).instance)

    def _migration(self, result: Result) -> pb.Migration:
        if not isinstance(result, MigrationFinished):
            raise declined(result)
        return convert.migration(result.record, self._brain.snapshot().now_s)

    def _check_epoch(self, name: InstanceId, epoch: int | None) -> None:
        """Raises Failure when the instance is in another incarnation; one that is unknown is the core's to refuse."""
        if epoch is None:
            return
        found = convert.find_instance(self._brain.snapshot(), name)
        if found is not None and found.incarnation.epoch != epoch:
            text = f"{name} is in epoch {found.incarnation.epoch}, not {epoch}"
            raise Failure(grpc.StatusCode.ABORTED, "STALE_EPOCH", text)
