"""How does the orchestrator call its actors in the simulator? See `orchestrator.runtime.ports.Fleet`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from instance.migrations import params_for
from instance.spec import MigrationSummary
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.effects import UpdateMembers, UpdatePriorities
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.sim.instance import SimInstance

T = TypeVar("T")


class SimFleet:
    """Actors by name. A call takes `call_s` there and as long back; the dead answer nobody."""

    def __init__(self, call_s: float, notice_s: float = 0.0) -> None:
        """`notice_s`: from an actor's death until the orchestrator hears of it."""
        self._call_s = call_s
        self._notice_s = notice_s
        self.instances: dict[str, SimInstance] = {}
        """Also those that have ended."""
        self.gateways: dict[str, GatewayLoop] = {}
        self.outcomes: Counter[str] = Counter()
        """Of the migrations that have ended."""
        self.summaries: list[MigrationSummary] = []
        """Theirs, in the order of their ends."""
        self.on_commit: Callable[[MigrationSummary], None] = lambda _: None
        """Who hears of a commit, when the source does."""
        self.way: Callable[[str], Awaitable[None]] | None = None
        """Returns when a call, or its answer, may pass between the orchestrator and this actor; None: always."""

    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        async def migrate(one: SimInstance) -> MigrationSummary:
            summary = await one.agent.migrate(request_id, destination, params_for(mode))
            if summary.outcome == Outcome.COMMITTED.value:
                self.on_commit(summary)
            return summary

        summary = await self._call(actor_name, migrate, timeout_s)
        self.outcomes[summary.outcome] += 1
        self.summaries.append(summary)
        return summary

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        until_s = self._now_s() + timeout_s
        await self._pass(actor_name, until_s)
        failure = Failure(FailureKind.CANCELLED, "the operator of this service ended the request")
        was_here = self._gateway(actor_name).cancel(request_id, failure)
        await self._pass(actor_name, until_s)
        return was_here

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        async def cancel(one: SimInstance) -> bool:
            return one.agent.cancel_migration(request_id, reason)

        return await self._call(actor_name, cancel, timeout_s)

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None:
        async def set_it(one: SimInstance) -> None:
            if draining:
                one.agent.drain()
            else:
                one.agent.undrain()

        await self._call(actor_name, set_it, timeout_s)

    async def set_priority(self, actor_name: str, request_id: str, priority: int, timeout_s: float) -> PriorityAnswer:
        return await self._call(actor_name, lambda one: one.agent.set_priority(request_id, priority), timeout_s)

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None:
        if actor_name in self.gateways:
            await self._pass(actor_name, self._now_s() + timeout_s)
            self.gateways[actor_name].member_lost(instance, epoch)
            return

        async def tell(one: SimInstance) -> None:
            one.agent.member_lost(instance, epoch)

        await self._call(actor_name, tell, timeout_s)

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        until_s = self._now_s() + timeout_s
        await self._pass(actor_name, until_s)
        gateway = self._gateway(actor_name)
        gateway.set_dispatch(told.dispatch)
        gateway.set_members([member.incarnation for member in told.members], told.num_gateways)
        await self._pass(actor_name, until_s)

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        """Clients here say their priority themselves."""

    async def wait_dead(self, actor_name: str) -> str:
        if actor_name not in self.instances:
            await asyncio.Event().wait()
        await self.instances[actor_name].is_dead.wait()
        if self._notice_s:
            await asyncio.sleep(self._notice_s)
        return "its process is gone"

    # ---- inside
    def _gateway(self, actor_name: str) -> GatewayLoop:
        if actor_name not in self.gateways:
            raise ActorGone(f"there is no {actor_name}")
        return self.gateways[actor_name]

    async def _call(self, actor_name: str, call: Callable[[SimInstance], Awaitable[T]], timeout_s: float) -> T:
        """Raises ActorGone when it is gone, or goes first, and CallFailed when it takes too long or fails."""
        until_s = self._now_s() + timeout_s
        await self._pass(actor_name, until_s)
        instance = self.instances.get(actor_name)
        if instance is None or instance.is_dead.is_set():
            raise ActorGone(f"{actor_name} is gone")
        calling = asyncio.ensure_future(call(instance))
        dying = asyncio.create_task(instance.is_dead.wait())
        try:
            left_s = max(0.0, until_s - self._now_s())
            await asyncio.wait((calling, dying), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                why = f"{actor_name} is gone" if dying.done() else f"{actor_name} does not answer"
                raise ActorGone(why) if dying.done() else CallFailed(why)
        finally:
            dying.cancel()
            if not calling.done():
                calling.cancel()
        if calling.cancelled():
            raise ActorGone(f"{actor_name} is gone")  # it was in the middle of it
        error = calling.exception()
        if error is not None:
            raise CallFailed(f"{actor_name}: {error}") from error
        await self._pass(actor_name, until_s)
        return calling.result()

    async def _pass(self, actor_name: str, until_s: float) -> None:
        """One way. Raises ActorGone when it dies while the way is closed, CallFailed when that takes too long."""
        await asyncio.sleep(self._call_s)
        if self.way is None:
            return
        passing = asyncio.ensure_future(self.way(actor_name))
        waited_for: list[asyncio.Future[Any]] = [passing]
        if actor_name in self.instances:
            waited_for.append(asyncio.create_task(self.instances[actor_name].is_dead.wait()))
        try:
            left_s = max(0.0, until_s - self._now_s())
            await asyncio.wait(waited_for, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                is_gone = any(one.done() for one in waited_for)
                raise ActorGone(f"{actor_name} is gone") if is_gone else CallFailed(f"{actor_name} does not answer")
        finally:
            for one in waited_for:
                one.cancel()

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
