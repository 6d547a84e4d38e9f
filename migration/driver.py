"""Who runs a migration? The asyncio shells: `SourceDriver` for one that leaves, `IncomingTable` for all that come in.

A shell applies each event to its machine at once and starts every effect as a task of its own group; the answer of the
effect is the next event, whatever the port raised. So a machine is never entered twice, and no error of one migration
leaves its shell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from migration import effects as ef
from migration import events as ev
from migration.alarms import Alarms
from migration.effects import SourceEffect
from migration.errors import ChannelClosed, CopyFailed, EngineFault, RemoteProtocolError
from migration.events import SourceEvent
from migration.incoming import IncomingReport, IncomingTable
from migration.messages import Cancel, Refused, ToSource
from migration.params import MigrationParams
from migration.ports import BlockMover, ControlChannel, SourceEngine
from migration.source import SourceMachine
from migration.table import SourceState
from migration.types import Incarnation, Migration, MigrationReport, NotStopped, Outcome, Refusal

__all__ = ["IncomingReport", "IncomingTable", "SourceDriver"]

_LOG = logging.getLogger(__name__)


class SourceDriver:
    """Runs one migration at its source. `run` once; the other calls are synchronous and come from the same loop."""

    def __init__(
        self,
        migration: Migration,
        params: MigrationParams,
        *,
        channel: ControlChannel,
        engine: SourceEngine,
        mover: BlockMover,
    ) -> None:
        self.migration = migration
        self.num_protocol_errors = 0
        """Messages the peer should not have sent; they were dropped."""
        self.num_strangers = 0
        """Messages of others than the incarnation that was asked; they were dropped."""
        self._params = params
        self._machine = SourceMachine(migration, params)
        self._channel = channel
        self._engine = engine
        self._mover = mover
        self._tasks: asyncio.TaskGroup | None = None
        self._alarms: Alarms | None = None
        self._to_finish: set[asyncio.Task[None]] = set()
        """Sends and the like, which the end does not cut short."""
        self._copying: asyncio.Task[None] | None = None
        self._children: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()
        self._before_start: list[SourceEvent] = []
        self._failure: str | None = None
        """The machine or this shell broke: what is held is put right without them."""

    @property
    def state(self) -> SourceState:
        return self._machine.state

    @property
    def is_client_gone(self) -> bool:
        """The client left. If the outcome is COMMITTED all the same, the agent passes the abort on."""
        return self._machine.is_client_gone

    async def run(self) -> MigrationReport:
        """Until the end, whatever it is: every error is an outcome. Cancelling it puts a stopped request back unless
        `Commit` was sent.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._alarms = Alarms(self._tasks, lambda timer: self._apply(ev.TimerFired(timer)))
                self._apply(ev.Started())
                for event in self._before_start:
                    self._apply(event)
                try:
                    await self._done.wait()
                except asyncio.CancelledError:
                    await self._wind_up()
                    raise
                await self._last_words()
                self._cancel_children()
        finally:
            self._tasks = None
        return self._machine.report() if self._failure is None else await self._report_failure(self._failure)

    def deliver(self, message: ToSource, sender: Incarnation) -> None:
        """A message from an inbox; `sender` is the envelope's. One that is not the destination's, or that the protocol
        does not allow now, is counted, logged and dropped."""
        if self._tasks is None:
            return  # before the start or after the end: a stray repetition
        if not self._may_answer(message, sender):
            self.num_strangers += 1
            kind = type(message).__name__
            _LOG.warning("%s: dropped %s of %s", self.migration.migration_id, kind, sender)
            return
        try:
            self._apply(message)
        except RemoteProtocolError as error:
            self.num_protocol_errors += 1
            _LOG.warning("%s: dropped a message: %s", self.migration.migration_id, error)

    def _may_answer(self, message: ToSource, sender: Incarnation) -> bool:
        """Another epoch of the destination may only decline to reserve: nothing is held or owned then."""
        asked = self.migration.destination
        if sender.instance != asked.instance:
            return False
        return sender.epoch == asked.epoch or (isinstance(message, Refused) and self.state is SourceState.RESERVING)

    def client_aborted(self) -> None:
        """The client left. The agent aborts the request in the engine as well."""
        self._tell(ev.ClientAborted())

    def peer_lost(self) -> None:
        """The destination's epoch has ended: it does not run the request and never will."""
        self._tell(ev.DestinationLost())

    def cancel(self, reason: str) -> None:
        """Give up (a drain was called off, say); has no effect once `Commit` was sent."""
        self._tell(ev.Withdrawn(reason))

    def check_integrity(self) -> None:
        self._machine.check_integrity()

    def _tell(self, event: SourceEvent) -> None:
        if self._machine.state is SourceState.IDLE:
            self._before_start.append(event)
        elif self._tasks is not None:
            self._apply(event)

    def _apply(self, event: SourceEvent) -> None:
        """Raises `RemoteProtocolError` for messages, nothing else."""
        if self._done.is_set():
            return
        try:
            for effect in self._machine.on(event, asyncio.get_running_loop().time()):
                self._start(effect)
        except RemoteProtocolError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug here must not leave a request stopped, or end the agent
            self._fail(error)
        if self._machine.is_done:
            self._done.set()

    def _fail(self, error: Exception) -> None:
        _LOG.error("%s: failed in state %s: %r", self.migration.migration_id, self.state.value, error, exc_info=error)
        if self.state is not SourceState.COMMITTING:  # there only the peer's answer or its end may lead on
            self._failure = f"{type(error).__name__}: {error}"
            self._done.set()

    def _start(self, effect: SourceEffect) -> None:
        assert self._alarms is not None
        match effect:
            case ef.SetTimer(timer, after_s):
                self._alarms.set(timer, after_s)
            case ef.ClearTimer(timer):
                self._alarms.clear(timer)
            case ef.Send():
                self._finish(self._answer(lambda: self._send(effect), ev.SendFailed))
            case ef.CopyBlocks():
                self._copying = self._spawn(self._answer(lambda: self._copy(effect), ev.CopyBroken))
            case ef.ForgetCopy():
                if self._copying is not None:
                    self._copying.cancel()
                self._finish(self._forget())
            case ef.DescribeRequest():
                self._visit(self._describe)
            case ef.ReadProgress():
                self._visit(self._read_progress)
            case ef.StopRequest(without_kv):
                self._visit(lambda: self._stop(without_kv))
            case ef.ResumeRequest():
                self._visit(self._resume)
            case ef.ReleaseRequest():
                self._visit(self._release)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._children.add(task)
        task.add_done_callback(self._children.discard)
        return task

    def _finish(self, work: Coroutine[None, None, None]) -> None:
        task = self._spawn(work)
        self._to_finish.add(task)
        task.add_done_callback(self._to_finish.discard)

    def _visit(self, visit: Callable[[], Coroutine[None, None, SourceEvent]]) -> None:
        self._spawn(self._answer(visit, ev.EngineFailed))

    async def _answer(
        self, work: Callable[[], Coroutine[None, None, SourceEvent | None]], failed: Callable[[str], SourceEvent]
    ) -> None:
        """Apply what came of it; whatever a port raises is a failure of this migration and of nothing else.

        `work` is called in here: a task that is cancelled before its first step leaves no coroutine unawaited.
        """
        try:
            event = await work()
        except (EngineFault, CopyFailed, ChannelClosed) as error:
            event = failed(str(error))
        except Exception as error:  # noqa: BLE001 - a raise would end the group, and the request stay stopped
            _LOG.error("%s: a port raised %r", self.migration.migration_id, error, exc_info=error)
            event = failed(f"{type(error).__name__}: {error}")
        if event is not None:
            self._apply(event)

    async def _forget(self) -> None:
        try:
            await self._mover.close(self.migration.migration_id)
        except Exception as error:  # noqa: BLE001 - nothing depends on it: the destination closes its ticket itself
            _LOG.warning("%s: the copy could not be forgotten: %r", self.migration.migration_id, error)

    async def _send(self, effect: ef.Send) -> None:
        await self._channel.send(effect.message)

    async def _copy(self, effect: ef.CopyBlocks) -> SourceEvent:
        try:
            receipt = await self._mover.push(
                self.migration.migration_id, effect.endpoints, effect.block_table, effect.blocks, urgent=effect.urgent
            )
        finally:
            self._copying = None  # first: the event may end the copy, which must not cancel this task
        return ev.BlocksCopied(receipt)

    async def _describe(self) -> SourceEvent:
        match await self._engine.describe(self.migration.request_id):
            case None:
                return ev.RequestGone()
            case Refusal(reason):
                return ev.RequestUnmovable(reason)
            case description:
                return ev.RequestDescribed(description)

    async def _read_progress(self) -> SourceEvent:
        progress = await self._engine.progress(self.migration.request_id)
        return ev.RequestGone() if progress is None else ev.ProgressRead(progress)

    async def _stop(self, without_kv: bool) -> SourceEvent:
        stopped = await self._engine.stop(self.migration.request_id, without_kv=without_kv)
        return ev.StopDeclined(stopped) if isinstance(stopped, NotStopped) else ev.StopGranted(stopped)

    async def _resume(self) -> SourceEvent:
        await self._engine.resume(self.migration.request_id)
        return ev.RequestResumed()

    async def _release(self) -> SourceEvent:
        await self._engine.release(self.migration.request_id)
        return ev.RequestReleased()

    async def _wind_up(self) -> None:
        """Our task was cancelled: put a stopped request back, say `Cancel` once, and wait no longer for answers."""
        if self._machine.state is SourceState.COMMITTING:
            _LOG.error("%s: cancelled while the owner is unknown; left stopped", self.migration.migration_id)
            self._done.set()  # what still comes is too late: the group takes no task any more
            return
        self._apply(ev.Withdrawn("its driver was cancelled"))
        self._apply(ev.Withdrawn("its driver was cancelled"))
        try:
            async with asyncio.timeout(self._params.shutdown_grace_s):
                await self._done.wait()
        except TimeoutError:
            _LOG.error("%s: still %s after the grace", self.migration.migration_id, self._machine.state.value)
        self._done.set()
        await self._last_words()
        if self._failure is not None:
            await self._report_failure(self._failure)

    async def _report_failure(self, failure: str) -> MigrationReport:
        """Put right what is held without the machine: it broke before `Commit` was sent, or after the outcome."""
        self._cancel_children()
        ending = self._machine.ending
        is_committed = ending is not None and ending.outcome is Outcome.COMMITTED
        outcome = Outcome.COMMITTED if is_committed else Outcome.FAULT
        put_right = self._engine.release if is_committed else self._engine.resume
        try:
            await put_right(self.migration.request_id)
        except Exception as error:  # noqa: BLE001 - nothing is left to try; the report says so
            _LOG.error("%s: putting it right failed: %r", self.migration.migration_id, error, exc_info=error)
            failure = f"{failure}; putting it right failed: {error}"
        await self._forget()
        if not self._machine.is_commit_sent:
            try:
                await self._channel.send(Cancel(migration_id=self.migration.migration_id, outcome=outcome.value))
            except Exception as error:  # noqa: BLE001 - the lease ends by itself
                _LOG.warning("%s: the destination was not told: %r", self.migration.migration_id, error)
        return self._machine.report_as(outcome, failure, asyncio.get_running_loop().time())

    async def _last_words(self) -> None:
        if self._to_finish:
            await asyncio.wait(set(self._to_finish), timeout=self._params.shutdown_grace_s)

    def _cancel_children(self) -> None:
        assert self._alarms is not None
        self._alarms.clear_all()
        for task in tuple(self._children):
            task.cancel()
