"""Which migrations come into this instance? The destination's shell: a machine each, their leases, and a memory of
those ended.

The memory answers what is said again after the end; above all a repeated `Commit` must get the same answer for ever.
It is bounded: the migration that has been silent longest is forgotten, and a `Commit` for one that is not known is not
answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from migration import effects as ef
from migration import events as ev
from migration.alarms import Alarms
from migration.destination import NO_REQUEST, DestinationMachine
from migration.effects import DestinationEffect
from migration.errors import ChannelClosed, CopyFailed, EngineFault, RemoteProtocolError
from migration.events import DestinationEvent
from migration.messages import Cancel, Message, Reserve, ToDestination
from migration.params import IncomingParams
from migration.ports import BlockMover, ControlChannel, DestinationEngine
from migration.types import Description, Incarnation, MigrationId, Outcome, Refusal, RequestId, Reservation

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IncomingReport:
    """The end of one migration at its destination."""

    migration_id: MigrationId
    request_id: RequestId
    source: Incarnation
    outcome: Outcome
    reason: str


@dataclass(slots=True)
class _Incoming:
    machine: DestinationMachine
    source: Incarnation
    channel: ControlChannel
    alarms: Alarms | None = None
    """None once it has ended."""
    waiting: asyncio.Task[None] | None = None
    """The wait for readiness, called off when the blocks are given back."""


class IncomingTable:
    """Every migration that comes into one instance. All calls come from one loop."""

    def __init__(
        self,
        own: Incarnation,
        params: IncomingParams,
        *,
        engine: DestinationEngine,
        mover: BlockMover,
        open_channel: Callable[[Incarnation], ControlChannel],
        on_end: Callable[[IncomingReport], None],
    ) -> None:
        self.num_dropped = 0
        """Messages of a stranger, for an unknown migration, or against the protocol."""
        self._own = own
        self._params = params
        self._engine = engine
        self._mover = mover
        self._open_channel = open_channel
        self._on_end = on_end
        self._active: dict[MigrationId, _Incoming] = {}
        self._ended: OrderedDict[MigrationId, _Incoming] = OrderedDict()
        self._aborted: OrderedDict[RequestId, None] = OrderedDict()
        self._tasks: asyncio.TaskGroup | None = None
        self._children: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._idle = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def num_incoming(self) -> int:
        """Migrations that hold, or ask for, blocks now."""
        return len(self._active)

    async def run(self) -> None:
        """Serve until `close`, in the agent's TaskGroup. It raises for a failed commit (and bugs): end the instance."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._stop.wait()
                if self._children:  # the last refusals
                    await asyncio.wait(set(self._children), timeout=self._params.close_grace_s)
                for task in tuple(self._children):
                    task.cancel()
        finally:
            self._tasks = None

    async def close(self) -> None:
        """Refuse what comes, give back what is held, wait (bounded) for commits under way; then `run` returns."""
        self._is_closing = True
        for incoming in tuple(self._active.values()):
            self._apply(incoming, ev.Withdrawn("the destination is shutting down"))
        self._idle.clear()
        try:
            async with asyncio.timeout(self._params.close_grace_s):
                if self._active:
                    await self._idle.wait()
        except TimeoutError:
            _LOG.error("closed with %d migrations under way", len(self._active))
        for incoming in self._active.values():
            if incoming.alarms is not None:
                incoming.alarms.clear_all()
        self._stop.set()

    def deliver(self, message: ToDestination, sender: Incarnation) -> None:
        """A message from an inbox; `sender` (of the envelope) is where the answer goes."""
        if self._tasks is None:
            self.num_dropped += 1  # not running: as good as lost
            return
        migration_id = MigrationId(message.migration_id)
        incoming = self._active.get(migration_id) or self._ended.get(migration_id)
        if incoming is None:
            incoming = self._admit(message, sender)
        elif migration_id in self._ended:
            self._ended.move_to_end(migration_id)
        if incoming is None or (incoming.source.instance, incoming.source.epoch) != (sender.instance, sender.epoch):
            self._drop(message, f"not a migration of {sender.instance} in epoch {sender.epoch}")
            return
        try:
            self._apply(incoming, message)
        except RemoteProtocolError as error:
            self._drop(message, str(error))

    def request_aborted(self, request_id: RequestId) -> None:
        """The client left: no migration brings the request here any more. The agent aborts it in the engine as well."""
        self._aborted[request_id] = None
        self._aborted.move_to_end(request_id)
        if len(self._aborted) > self._params.max_aborted:
            self._aborted.popitem(last=False)
        for incoming in tuple(self._active.values()):
            if incoming.machine.request_id == request_id:
                self._apply(incoming, ev.ClientAborted())

    def source_lost(self, lost: Incarnation) -> None:
        """This epoch of a source (and every lower one) has ended: give back what is held for it, forget its past."""
        for incoming in tuple(self._active.values()):
            if incoming.source.instance == lost.instance and incoming.source.epoch <= lost.epoch:
                self._apply(incoming, ev.SourceLost())
        for migration_id, incoming in tuple(self._ended.items()):
            if incoming.source.instance == lost.instance and incoming.source.epoch <= lost.epoch:
                del self._ended[migration_id]

    def check_integrity(self) -> None:
        assert len(self._active) <= self._params.max_incoming
        assert len(self._ended) <= self._params.max_remembered
        assert not self._active.keys() & self._ended.keys()
        for incoming in (*self._active.values(), *self._ended.values()):
            incoming.machine.check_integrity()
        assert not any(incoming.machine.is_over for incoming in self._active.values())
        assert all(incoming.machine.is_over for incoming in self._ended.values())

    def _admit(self, message: ToDestination, sender: Incarnation) -> _Incoming | None:
        """A migration we have not heard of: None if the message cannot be its first."""
        if not isinstance(message, Reserve | Cancel):
            return None
        migration_id = MigrationId(message.migration_id)
        machine = DestinationMachine(migration_id, self._params.max_lease_s)
        incoming = _Incoming(machine, sender, self._open_channel(sender))
        refusal = self._refusal(message) if isinstance(message, Reserve) else None
        if refusal is not None or isinstance(message, Cancel):
            machine.request_id = RequestId(message.request_id) if isinstance(message, Reserve) else NO_REQUEST
            self._remember(incoming)
            if refusal is not None:
                self._apply(incoming, ev.Withdrawn(refusal))
            return incoming
        assert self._tasks is not None
        incoming.alarms = Alarms(self._tasks, lambda timer: self._apply(incoming, ev.TimerFired(timer)))
        self._active[migration_id] = incoming
        return incoming

    def _refusal(self, reserve: Reserve) -> str | None:
        if self._is_closing:
            return "the destination is shutting down"
        if reserve.destination_epoch != self._own.epoch:
            return f"epoch {self._own.epoch} here, not {reserve.destination_epoch}"
        if RequestId(reserve.request_id) in self._aborted:
            return "aborted by the client"
        if len(self._active) >= self._params.max_incoming:
            return f"{self._params.max_incoming} migrations are coming in already"
        return None

    def _drop(self, message: Message, why: str) -> None:
        self.num_dropped += 1
        _LOG.warning("%s: dropped %s: %s", message.migration_id, type(message).__name__, why)

    def _apply(self, incoming: _Incoming, event: DestinationEvent) -> None:
        was_over = incoming.machine.is_over
        for effect in incoming.machine.on(event, asyncio.get_running_loop().time()):
            self._start(incoming, effect)
        if incoming.machine.is_over and not was_over:
            self._end(incoming)

    def _end(self, incoming: _Incoming) -> None:
        machine = incoming.machine
        if incoming.alarms is not None:
            incoming.alarms.clear_all()
            incoming.alarms = None
        self._remember(incoming)
        if self._active.pop(machine.migration_id, None) is not None and not self._active:
            self._idle.set()
        assert machine.outcome is not None
        report = IncomingReport(
            machine.migration_id, machine.request_id, incoming.source, machine.outcome, machine.reason
        )
        self._on_end(report)

    def _remember(self, incoming: _Incoming) -> None:
        self._ended[incoming.machine.migration_id] = incoming
        if len(self._ended) > self._params.max_remembered:
            self._ended.popitem(last=False)

    def _start(self, incoming: _Incoming, effect: DestinationEffect) -> None:
        match effect:
            case ef.SetTimer(timer, after_s):
                assert incoming.alarms is not None
                incoming.alarms.set(timer, after_s)
            case ef.ClearTimer(timer):
                if incoming.alarms is not None:
                    incoming.alarms.clear(timer)
            case ef.Send(message):
                self._spawn(self._send(incoming, message))
            case ef.HoldBlocks(description):
                self._spawn(self._hold(incoming, description))
            case ef.GrowBlocks(num_tokens):
                self._spawn(self._grow(incoming, num_tokens))
            case ef.AwaitReady():
                incoming.waiting = self._spawn(self._await_ready(incoming))
            case ef.CommitRequest(state):
                self._spawn(self._commit(incoming, state))
            case ef.GiveBack():
                if incoming.waiting is not None:
                    incoming.waiting.cancel()
                self._spawn(self._give_back(incoming))
            case ef.AbortRequest():
                self._spawn(self._abort(incoming))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._children.add(task)
        task.add_done_callback(self._children.discard)
        return task

    async def _send(self, incoming: _Incoming, message: Message) -> None:
        try:
            await incoming.channel.send(message)
        except Exception as error:  # noqa: BLE001 - one migration's answer must not end the others
            if isinstance(error, ChannelClosed):
                _LOG.info("%s: no way back to the source: %s", message.migration_id, error)
            self._apply(incoming, ev.SendFailed(_why(incoming, "answering", error)))

    async def _hold(self, incoming: _Incoming, description: Description) -> None:
        try:
            held = await self._engine.reserve(incoming.machine.migration_id, description)
            event = await self._opened(incoming, held)
        except Exception as error:  # noqa: BLE001 - it ends this migration only; what is held is given back
            event = ev.EngineFailed(_why(incoming, "holding blocks", error))
        self._apply(incoming, event)

    async def _grow(self, incoming: _Incoming, num_tokens: int) -> None:
        try:
            held = await self._engine.grow(incoming.machine.migration_id, num_tokens)
            event = await self._opened(incoming, held)
        except Exception as error:  # noqa: BLE001 - it ends this migration only; what is held is given back
            event = ev.EngineFailed(_why(incoming, "growing", error))
        self._apply(incoming, ev.BlocksGrown(event.reservation) if isinstance(event, ev.BlocksHeld) else event)

    async def _opened(self, incoming: _Incoming, held: Reservation | Refusal) -> DestinationEvent:
        if isinstance(held, Refusal):
            return ev.EngineRefused(held.reason)
        await self._mover.open(incoming.machine.migration_id, held.block_table)
        return ev.BlocksHeld(held, self._mover.endpoints())

    async def _await_ready(self, incoming: _Incoming) -> None:
        try:
            refusal = await self._engine.wait_ready(incoming.machine.migration_id)
        except Exception as error:  # noqa: BLE001 - as good as a refusal: it will not get ready
            refusal = Refusal(_why(incoming, "waiting for readiness", error))
        incoming.waiting = None  # first: the event may give back, which must not cancel this task
        self._apply(incoming, ev.RequestReady() if refusal is None else ev.EngineRefused(refusal.reason))

    async def _commit(self, incoming: _Incoming, state: bytes) -> None:
        try:
            await self._mover.close(incoming.machine.migration_id)
        except Exception as error:  # noqa: BLE001 - the engine was not asked yet, so this is a plain no
            why = _why(incoming, "closing the ticket", error)
            self._apply(incoming, ev.EngineRefused(f"the ticket could not be closed: {why}"))
            return
        # Whatever this raises ends the instance: the request may be ours or not, and nobody could say which.
        refusal = await self._engine.commit(incoming.machine.migration_id, state)
        self._apply(incoming, ev.RequestCommitted() if refusal is None else ev.EngineRefused(refusal.reason))

    async def _give_back(self, incoming: _Incoming) -> None:
        """If the ticket cannot be closed the blocks stay held: a late push must never hit another request's block."""
        event: DestinationEvent
        try:
            await self._mover.close(incoming.machine.migration_id)
            await self._engine.cancel(incoming.machine.migration_id)
            event = ev.BlocksGivenBack()
        except Exception as error:  # noqa: BLE001 - it ends this migration only; its report says FAULT
            event = ev.EngineFailed(_why(incoming, "giving blocks back", error))
        self._apply(incoming, event)

    async def _abort(self, incoming: _Incoming) -> None:
        try:
            await self._engine.abort(incoming.machine.request_id)
        except Exception as error:  # noqa: BLE001 - the request decodes to its end for nobody; the others go on
            _why(incoming, "aborting for its client", error)


def _why(incoming: _Incoming, what: str, error: Exception) -> str:
    """The reason to report; what no port may raise is logged as well."""
    if isinstance(error, EngineFault | CopyFailed | ChannelClosed):
        return str(error)
    _LOG.error("%s: %s raised %r", incoming.machine.migration_id, what, error, exc_info=error)
    return f"{type(error).__name__}: {error}"
