"""How does the demo see and steer the cluster? Through the admin API alone, like any operator."""

from __future__ import annotations

import asyncio
import time

from orchestrator.admin.client import AdminClient
from orchestrator.admin.convert import INSTANCES, MIGRATIONS, OUTCOMES, REQUESTS
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.demo.answers import Move
from orchestrator.demo.watch import InstanceView, Observation

OUTCOME_NAMES = {number: outcome.value for outcome, number in OUTCOMES.items()}
STATE_NAMES = {
    pb.INSTANCE_STATE_STARTING: "starting",
    pb.INSTANCE_STATE_SERVING: "serving",
    pb.INSTANCE_STATE_DRAINING: "draining",
    pb.INSTANCE_STATE_STOPPED: "stopped",
}
RECENT_MIGRATIONS = 200
"""Asked for at each look: more cannot end between two of them."""
GRACE_S = 1.0
"""A drain's thread gives up so long after the caller did, so that none is left behind."""


class AdminFleet:
    """The `Fleet` of a cluster whose admin API is served at `address`. Errors are the admin client's."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = AdminClient(address)

    def close(self) -> None:
        self._client.__exit__(None, None, None)

    async def observe(self) -> Observation:
        return await asyncio.to_thread(self._observe)

    def _observe(self) -> Observation:
        instances = self._client.instances().instances
        migrations = self._client.migrations(RECENT_MIGRATIONS)
        now_s = time.monotonic()
        return Observation(
            instances=tuple(sorted((_view(one) for one in instances), key=lambda view: view.instance)),
            moves=tuple(_move(one, now_s) for one in migrations if one.HasField("ended_age_s")),
        )

    async def drain(self, instance: str, within_s: float) -> None:
        """Returns when the orchestrator says that the instance is empty."""
        await asyncio.to_thread(self._drain, instance, within_s + GRACE_S)

    def _drain(self, instance: str, deadline_s: float) -> None:
        for _ in self._client.drain(instance, wait=True, deadline_s=deadline_s):
            pass

    async def undrain(self, instance: str) -> None:
        await asyncio.to_thread(self._client.undrain, instance)


def _view(one: pb.Instance) -> InstanceView:
    return InstanceView(
        instance=one.name.removeprefix(INSTANCES),
        state=STATE_NAMES.get(one.state, "unknown"),
        total_blocks=one.total_blocks,
        used_blocks=max(0, one.total_blocks - one.free_blocks),
        num_running=one.num_running,
        num_waiting=one.num_waiting,
    )


def _move(one: pb.Migration, now_s: float) -> Move:
    return Move(
        migration_id=one.name.removeprefix(MIGRATIONS),
        request_id=one.request.removeprefix(REQUESTS),
        source=one.source.removeprefix(INSTANCES),
        destination=one.destination.removeprefix(INSTANCES),
        outcome=OUTCOME_NAMES[one.outcome],
        reason=one.reason,
        moved_tokens=one.moved_tokens,
        num_blocks=one.copied_blocks + one.tail_blocks,
        num_bytes=one.num_bytes,
        stopped_s=one.stopped_s,
        ended_s=now_s - one.ended_age_s,
    )
