"""How does a test run the orchestrator's loop without Ray? A fake of the `Fleet` and `Launcher` ports: actors that obey
or die."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from instance.spec import MigrationSummary
from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import Member, UpdateMembers, UpdatePriorities
from orchestrator.errors import ActorGone, CallFailed, StartUpError
from orchestrator.events import InstanceStarted


class FakeCluster:
    """Remembers what it was told. `deaths[name].set_result(reason)` ends an actor."""

    def __init__(self) -> None:
        self.outcome = "committed"
        self.broken: set[str] = set()
        """Actors whose calls fail without their being dead."""
        self.failures_left: dict[str, int] = defaultdict(int)
        """So many more calls to this actor fail."""
        self.fence_tried: list[str] = []
        self.fence_begun = asyncio.Event()
        self.deaths: dict[str, asyncio.Future[str]] = defaultdict(lambda: asyncio.get_running_loop().create_future())
        self.migrated: list[tuple[str, str, str, str]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.holds_streams = True
        """Whether gateways say that the stream to be ended is theirs."""
        self.withdrawn: list[tuple[str, str]] = []
        self.may_end = asyncio.Event()
        """Migrations end when it is set, as it is unless a test clears it."""
        self.may_end.set()
        self.priorities: list[tuple[str, str, int]] = []
        self.priority_answers: list[PriorityAnswer] = []
        """What instances answer to a change of priority, one after the other; without any, it is set."""
        self.draining: list[tuple[str, bool]] = []
        self.fenced: list[tuple[str, str, int]] = []
        self.members: dict[str, tuple[Member, ...]] = {}
        self.urgencies: dict[str, UpdatePriorities] = {}
        """Levels and classes of keys that each gateway was told last."""
        self.answers_when: dict[str, asyncio.Event] = {}
        """Gateways that answer what they are told only once this is set."""
        self.told = asyncio.Event()
        self.launched: list[tuple[str, int]] = []
        """Instances asked for, as (name, epoch)."""
        self.stopped: list[tuple[str, int]] = []
        self.launch_errors: list[str] = []
        """The next launches fail with these, one each."""
        self.launch_hangs = False
        """Launches never end by themselves."""
        self.launch_cancelled: list[str] = []

    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        self._check(actor_name)
        self.migrated.append((actor_name, request_id, destination.instance, mode))
        await self.may_end.wait()
        return MigrationSummary(
            migration_id="m",
            request_id=request_id,
            source=actor_name,
            destination=destination.instance,
            outcome=self.outcome,
            reason="",
            cached_tokens=0,
            moved_tokens=160,
            num_stages=2,
            copied_blocks=9,
            tail_blocks=1,
            num_bytes=1 << 20,
            duration_s=0.02,
            stopped_s=0.001,
            steps_during_copy=3,
        )

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        self._check(actor_name)
        self.cancelled.append((actor_name, request_id))
        return self.holds_streams

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        self._check(actor_name)
        self.withdrawn.append((actor_name, request_id))
        self.outcome = "refused"
        self.may_end.set()
        return True

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None:
        self._check(actor_name)
        self.draining.append((actor_name, draining))

    async def set_priority(self, actor_name: str, request_id: str, priority: int, timeout_s: float) -> PriorityAnswer:
        self._check(actor_name)
        self.priorities.append((actor_name, request_id, priority))
        if self.priority_answers:
            return self.priority_answers.pop(0)
        return PriorityAnswer(PriorityOutcome.SET, 0, RequestStatus.RUNNING)

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None:
        self.fence_tried.append(actor_name)
        self.fence_begun.set()
        self._check(actor_name)
        self.fenced.append((actor_name, instance, epoch))

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        await self._told_to(actor_name)
        self.members[actor_name] = told.members
        self.told.set()

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        await self._told_to(actor_name)
        self.urgencies[actor_name] = told

    async def wait_dead(self, actor_name: str) -> str:
        return await self.deaths[actor_name]

    # ---- the Launcher port
    async def start(self, instance: InstanceId, epoch: Epoch) -> InstanceStarted:
        self.launched.append((instance, epoch))
        self.told.set()
        if self.launch_hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.launch_cancelled.append(instance)
                raise
        if self.launch_errors:
            raise StartUpError(self.launch_errors.pop(0))
        incarnation = Incarnation(instance, epoch, "tcp://127.0.0.1:1")
        return InstanceStarted(incarnation, f"kvferry-{instance}-{epoch}", "tiny", 16, 1000, process_id=7)

    async def stop(self, instance: InstanceId, epoch: Epoch) -> None:
        self.stopped.append((instance, epoch))
        death = self.deaths[f"kvferry-{instance}-{epoch}"]
        if not death.done():
            death.set_result("it was stopped")

    async def _told_to(self, actor_name: str) -> None:
        self._check(actor_name)
        if actor_name in self.answers_when:
            await self.answers_when[actor_name].wait()

    def _check(self, actor_name: str) -> None:
        if actor_name in self.deaths and self.deaths[actor_name].done():
            raise ActorGone("its process ended")
        if actor_name in self.failures_left and self.failures_left[actor_name] > 0:
            self.failures_left[actor_name] -= 1
            raise CallFailed("its connection broke")
        if actor_name in self.broken:
            raise CallFailed("no answer within 1 s")
