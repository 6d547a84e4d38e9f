"""What does the loop need from the cluster? Calls to actors by name, the notice of their death, and a journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from instance.spec import MigrationSummary
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import Effect, UpdateMembers, UpdatePriorities
from orchestrator.events import Event, InstanceStarted


class Fleet(Protocol):
    """Calls to the actors of instances and gateways. Each raises ActorGone or CallFailed, and has a deadline."""

    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        """Have the source move one request and wait for the end of it, whatever the outcome."""

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        """Have a gateway end the stream of this request, and the request; False: it has no such stream."""

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        """Have the source give the request's migration up; False: none is under way. Its `migrate` call still tells how
        it ended."""

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None: ...

    async def set_priority(
        self, actor_name: str, request_id: str, priority: int, timeout_s: float
    ) -> PriorityAnswer: ...

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None: ...

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        """Tell a gateway who is there, how many gateways dispatch to them, and how."""

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        """Tell a gateway the levels, and the classes of API keys."""

    async def wait_dead(self, actor_name: str) -> str:
        """Return, with the reason in one line, once the actor's process is gone."""


class Launcher(Protocol):
    """How instances are made and ended while the cluster runs."""

    async def start(self, instance: InstanceId, epoch: Epoch) -> InstanceStarted:
        """Return when it serves. Raises StartUpError (one line) in bounded time, having left nothing of it running."""

    async def stop(self, instance: InstanceId, epoch: Epoch) -> None:
        """End its process, in order where it answers; one that is not there is no error."""


class Recorder(Protocol):
    """Where events and what the core made of them go: the journal."""

    def write(self, event: Event, effects: Sequence[Effect], now_s: float, raised: BaseException | None = None) -> None:
        """The core was given the event, and this followed. To be called before the next event."""
