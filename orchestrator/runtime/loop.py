"""How do events reach the core, and how are its effects carried out? The asyncio shell of the orchestrator.

Every effect that can fail comes back as an event. What nobody expected ends the loop, visibly: the gateways go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from typing import assert_never

from instance.messages import LoadReport, RequestReport, Subscribe
from instance.ports import Inbox
from migration.types import Epoch, InstanceId
from orchestrator.core import Orchestrator
from orchestrator.effects import (
    AnnounceScaling,
    Answer,
    Effect,
    EndRequest,
    FenceInstance,
    KeyClassSet,
    LevelSet,
    PolicyUpdated,
    Result,
    SetDraining,
    SetPriority,
    StartInstance,
    StartMigration,
    StopInstance,
    UpdateMembers,
    UpdatePriorities,
    WithdrawMigration,
)
from orchestrator.errors import ActorGone, CallFailed, LimitExceeded, RefusalKind
from orchestrator.events import (
    DrainingSet,
    Event,
    GatewayLost,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    MigrationEnded,
    PriorityAnswered,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
    WaiterGone,
)
from orchestrator.log import fields, logger
from orchestrator.priority_classes import Priorities
from orchestrator.runtime.cancelling import end_request, withdraw
from orchestrator.runtime.journal import decided
from orchestrator.runtime.keeper import InstanceKeeper, NoLauncher
from orchestrator.runtime.migrating import migrate
from orchestrator.runtime.ports import Fleet, Launcher, Recorder
from orchestrator.runtime.telling import GatewayTeller
from orchestrator.state import Snapshot
from orchestrator.tuning import Policy

_log = logger("orchestrator")


class _Stopped(Exception):
    """Ends the loop's task group."""


@dataclass(frozen=True, slots=True)
class LoopParams:
    tick_s: float = 0.5
    subscribe_s: float = 1.0
    lease_s: float = 5.0
    """Instances send reports for so long after the last subscription."""
    max_reports_per_s: float = 2_000.0
    """Load reports of all instances together; from a fleet of 200 on each sends fewer, but one a tick at least."""
    call_timeout_s: float = 10.0
    migrate_timeout_s: float = 3600.0
    """After this a migration counts as ended with FAULT, its result unknown. Long: the instances end a migration
    themselves when it makes no progress, and a paced copy of many gigabytes takes minutes."""
    retry_s: float = 0.5
    """Pause before a notice that failed is repeated; for fences it doubles up to `max_retry_s`."""
    max_retry_s: float = 10.0


class OrchestratorLoop:
    """One core, one fleet, one inbox. `run` until `stop`."""

    def __init__(
        self,
        core: Orchestrator,
        fleet: Fleet,
        mailbox: Inbox,
        params: LoopParams,
        journal: Recorder | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._core = core
        self._fleet = fleet
        self._mailbox = mailbox
        self._params = params
        self.journal = journal
        """Whoever opens it late sets it before `run`."""
        self._keeper = InstanceKeeper(launcher or NoLauncher(), self.handle)
        self._tasks: asyncio.TaskGroup | None = None
        self._is_over = False
        self._stopping = asyncio.Event()
        self._ending: set[tuple[InstanceId, Epoch]] = set()
        """Asked to end, and not heard to have ended yet: no reason to warn anybody."""
        self._tokens = count(1)
        self._callers: dict[Token, asyncio.Future[Result]] = {}
        self._teller = GatewayTeller(fleet, params.call_timeout_s, params.retry_s)

    async def run(self) -> None:
        """Carry the core until `stop`. Raises what nobody expected."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for routine in (self._receive(), self._subscribe(), self._tick(), self._teller.run()):
                    tasks.create_task(routine)
                tasks.create_task(self._await_stop())
        except* _Stopped:
            pass
        finally:
            self._tasks, self._is_over = None, True
            for caller in self._callers.values():
                caller.cancel()

    async def until_gateways_know(self) -> None:
        """Return once every gateway has been told what holds now."""
        await self._teller.until_known()

    def stop(self) -> None:
        self._stopping.set()

    # ------------------------------------------------------------------ what the admin API uses
    def snapshot(self) -> Snapshot:
        return self._core.snapshot(self._now_s())

    def policy(self) -> Policy:
        return self._core.policy()

    def priorities(self) -> Priorities:
        return self._core.priorities()

    async def ask(self, make: Callable[[Token], Event]) -> Result:
        """Put a command to the core and wait for its answer; a cancelled caller is forgotten there, too. Raises
        CancelledError once the loop is over: nothing would carry it out."""
        if self._is_over:
            raise asyncio.CancelledError
        token = Token(next(self._tokens))
        caller: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._callers[token] = caller
        try:
            self.handle(make(token))
            return await caller
        finally:
            del self._callers[token]
            if caller.cancelled():
                self.handle(WaiterGone(token))

    # ------------------------------------------------------------------ events in, effects out
    def handle(self, event: Event) -> None:
        """Give the core one event and carry out what it asks for."""
        now_s = self._now_s()
        effects = decided(self._core, event, now_s, self.journal)
        self._watch(event)
        for effect in effects:
            self._carry_out(effect)

    def add(self, event: InstanceStarted | GatewayStarted) -> None:
        """Take in a process that has started. Past its bounds the core ignores it, which is logged."""
        try:
            self.handle(event)
        except LimitExceeded as error:
            _log.error("not taken in %s", fields(actor=event.actor_name, reason=error))

    def _watch(self, event: Event) -> None:
        match event:
            case InstanceStarted(incarnation=incarnation, actor_name=actor_name):
                _log.info("instance started %s", fields(instance=incarnation.instance, epoch=incarnation.epoch))
                self._subscribe_to(incarnation.address)
                lost = (incarnation.instance, incarnation.epoch)
                self._spawn(self._await_death(actor_name, lambda reason: InstanceLost(*lost, reason)), actor_name)
            case GatewayStarted(gateway=gateway, actor_name=actor_name):
                self._teller.add(gateway, actor_name)
                self._spawn(self._await_death(actor_name, lambda reason: GatewayLost(gateway, reason)), actor_name)
            case InstanceLost(instance=instance, epoch=epoch, reason=reason):
                if (instance, epoch) in self._ending:
                    self._ending.discard((instance, epoch))
                    _log.info("instance stopped %s", fields(instance=instance, epoch=epoch))
                else:
                    _log.warning("instance lost %s", fields(instance=instance, epoch=epoch, reason=reason))
            case GatewayLost(gateway=gateway, reason=reason):
                _log.warning("gateway lost %s", fields(gateway=gateway, reason=reason))
                self._teller.lost(gateway)
            case MigrationEnded():
                _log.info(
                    "migration ended %s",
                    fields(number=event.number, outcome=event.outcome.value, reason=event.reason or "none"),
                )
            case _:
                pass

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case StartMigration():
                _log.info(
                    "migration started %s",
                    fields(
                        number=effect.number,
                        request=effect.request_id,
                        source=effect.source.instance,
                        destination=effect.destination.instance,
                        reason=effect.reason,
                        signal_age_s=effect.signal_age_s,
                    ),
                )
                self._spawn(self._migrate(effect), f"migration-{effect.number}")
            case SetDraining():
                _log.info("set draining %s", fields(instance=effect.instance, draining=effect.draining))
                self._spawn(self._set_draining(effect), f"draining-{effect.instance}")
            case SetPriority():
                _log.info(
                    "set priority %s",
                    fields(
                        number=effect.number,
                        request=effect.request_id,
                        instance=effect.owner.instance,
                        priority=effect.priority,
                        reason=effect.reason,
                    ),
                )
                self._spawn(self._set_priority(effect), f"priority-{effect.number}")
            case UpdateMembers() | UpdatePriorities():
                self._teller.update(effect)
            case FenceInstance():
                for peer in effect.peers:
                    self._spawn(self._fence(effect, self._actor_name(peer)), f"fence-{effect.instance}-{peer}")
            case StartInstance():
                self._spawn(self._keeper.start(effect), f"start-{effect.instance}-{effect.epoch}")
            case StopInstance():
                self._ending.add((effect.instance, effect.epoch))
                self._spawn(self._keeper.stop(effect), f"stop-{effect.instance}-{effect.epoch}")
            case AnnounceScaling():
                self._keeper.announce(effect)
            case EndRequest():
                _log.info("end request %s", fields(request=effect.request_id, reason=effect.reason))
                self._spawn(self._end_request(effect), f"end-{effect.request_id}")
            case WithdrawMigration():
                _log.info("call migration off %s", fields(number=effect.number, reason=effect.reason))
                self._spawn(self._withdraw(effect), f"withdraw-{effect.number}")
            case Answer(token=token, result=result):
                _audit(result)
                caller = self._callers.get(token)
                if caller is not None and not caller.done():
                    caller.set_result(result)
            case _:
                assert_never(effect)

    # ------------------------------------------------------------------ effects
    async def _migrate(self, effect: StartMigration) -> None:
        source = self._actor_name(effect.source.instance)
        self.handle(await migrate(self._fleet, effect, source, self._params.migrate_timeout_s))

    async def _set_draining(self, effect: SetDraining) -> None:
        error: str | None = None
        try:
            await self._fleet.set_draining(
                self._actor_name(effect.instance), effect.draining, self._params.call_timeout_s
            )
        except (ActorGone, CallFailed) as failure:
            error = str(failure)
        self.handle(DrainingSet(effect.instance, effect.epoch, effect.draining, error))

    async def _end_request(self, effect: EndRequest) -> None:
        inboxes = [member.incarnation.address for member in self._teller.members]
        gateways, timeout_s = self._teller.actor_names, self._params.call_timeout_s
        self.handle(await end_request(self._fleet, self._mailbox, effect, gateways, inboxes, timeout_s))

    async def _withdraw(self, effect: WithdrawMigration) -> None:
        source = self._actor_name(effect.source.instance)
        self.handle(await withdraw(self._fleet, effect, source, self._params.call_timeout_s))

    async def _set_priority(self, effect: SetPriority) -> None:
        number, owner = effect.number, effect.owner.instance
        try:
            answer = await self._fleet.set_priority(
                self._actor_name(owner), effect.request_id, effect.priority, self._params.call_timeout_s
            )
        except ActorGone as error:
            self.handle(PriorityAnswered(number, None, RefusalKind.OVERTAKEN, str(error)))
        except CallFailed as error:
            reason = f"{error}; whether it was set is not known, and setting it again is safe"
            self.handle(PriorityAnswered(number, None, RefusalKind.UNAVAILABLE, reason))
        else:
            self.handle(PriorityAnswered(number, answer))

    async def _fence(self, effect: FenceInstance, peer_actor: str) -> None:
        """Tell one peer until it knows or is gone itself: until then it heeds what the dead one still says."""
        pause_s = self._params.retry_s
        while True:
            try:
                await self._fleet.member_lost(peer_actor, effect.instance, effect.epoch, self._params.call_timeout_s)
            except ActorGone:
                return
            except CallFailed as error:
                _log.warning("peer not told %s", fields(peer=peer_actor, lost=effect.instance, reason=error))
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._params.max_retry_s)

    async def _await_death(self, actor_name: str, make: Callable[[str], Event]) -> None:
        reason = await self._fleet.wait_dead(actor_name)
        self.handle(make(reason))

    # ------------------------------------------------------------------ routines
    async def _await_stop(self) -> None:
        await self._stopping.wait()
        raise _Stopped

    async def _receive(self) -> None:
        while True:
            message = await self._mailbox.receive()
            if isinstance(message, LoadReport):
                self.handle(ReportReceived(message))
            elif isinstance(message, RequestReport):
                self.handle(RequestsReceived(message))

    async def _subscribe(self) -> None:
        while True:
            for member in self._teller.members:
                self._subscribe_to(member.incarnation.address)
            await asyncio.sleep(self._params.subscribe_s)

    def _subscribe_to(self, address: str) -> None:
        """Repeated, so that an instance that missed it hears the headroom of the levels with the next one."""
        own, params = self._mailbox.address, self._params
        interval_s = min(params.tick_s, len(self._teller.members) / params.max_reports_per_s)
        headroom = self._teller.headroom
        subscribe = Subscribe(own, params.lease_s, with_requests=True, headroom=headroom, interval_s=interval_s)
        self._mailbox.send(address, subscribe)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._params.tick_s)
            self.handle(Ticked())

    # ------------------------------------------------------------------ small things
    def _actor_name(self, instance: str) -> str:
        return next((item.actor_name for item in self._teller.members if item.incarnation.instance == instance), "")

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        if self._tasks is None:
            work.close()
            return
        self._tasks.create_task(work, name=name)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def _audit(result: Result) -> None:
    """A change of the policy or of priorities is logged with its values; the journal has it with the command."""
    if isinstance(result, KeyClassSet | LevelSet) and not result.validate_only:
        now = result.priority if isinstance(result, KeyClassSet) else result.level
        if now != result.previous:
            _log.info("priorities changed %s", fields(change=result.change))
    if isinstance(result, PolicyUpdated) and not result.validate_only:
        for path, before, after in result.changes:
            _log.info("policy changed %s", fields(parameter=path, before=before, after=after))
