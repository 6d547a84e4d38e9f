"""How do migrations run inside an agent? migration's ports over engine thread and mailbox; those going out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from instance.messages import Abort, MigrationEnvelope, OwnerChanged
from instance.ports import EngineHost, Inbox
from instance.spec import MigrationSummary
from instance.stream import StreamTable, Tombstones
from instance.types import CommittedRequest, Wishes
from migration import wire
from migration.driver import SourceDriver
from migration.errors import ChannelClosed, EngineFault
from migration.messages import Message, ToSource
from migration.params import MigrationParams, Mode
from migration.types import (
    Description,
    Incarnation,
    Migration,
    MigrationId,
    MigrationReport,
    NotStopped,
    Outcome,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

T = TypeVar("T")

READY_POLL_S = 0.002
RESERVE_SLACK_BLOCKS = 2
"""Room for what the source decodes while the stages are copied, asked for at once to save a round of `Grow`."""


class MovedPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an agent sends as a description's payload: the engine's own, and where the tokens go. What is not there is
    not written, so that those who do not know of it can take in what has none."""

    gateway_address: str
    engine_payload: bytes
    wishes: Wishes | None = None
    """Of its speed; `waited_s` to the moment of the description."""


@dataclass(frozen=True, slots=True)
class _Coming:
    """What an agent must know of a request on its way here, beside what its engine knows."""

    gateway: str
    wishes: Wishes | None
    described_s: float
    """When its description came, by the clock here: its copy takes a while."""


class InboxChannel:
    """`ControlChannel` to one incarnation of a peer, over the mailbox."""

    def __init__(self, mailbox: Inbox, own: Incarnation, peer: Incarnation) -> None:
        self._mailbox = mailbox
        self._own = own
        self._peer = peer

    async def send(self, message: Message) -> None:
        envelope = MigrationEnvelope(
            from_instance=self._own.instance,
            from_epoch=self._own.epoch,
            from_address=self._own.address,
            to_epoch=self._peer.epoch,
            body=wire.encode(message),
        )
        if not self._mailbox.send(self._peer.address, envelope):
            raise ChannelClosed(f"{self._peer.instance} takes no message at {self._peer.address}")


async def _visit(future: asyncio.Future[T]) -> T:
    """The result of an engine call. Raises EngineFault for whatever the engine raised, or when it has ended."""
    try:
        await asyncio.wait((future,))
    except asyncio.CancelledError:
        future.cancel()
        raise
    error = future.exception()
    if error is not None:
        raise EngineFault(f"{type(error).__name__}: {error}") from error
    return future.result()


class SourceAdapter:
    """`SourceEngine` for one migration."""

    def __init__(self, loop: EngineHost, streams: StreamTable) -> None:
        self._loop = loop
        self._streams = streams
        self._described_at_step: int | None = None
        self.steps_during_copy = 0

    async def describe(self, request_id: RequestId) -> Description | Refusal | None:
        described = await _visit(self._loop.call(lambda engine: engine.describe(request_id)))
        self._described_at_step = self._loop.num_steps
        if not isinstance(described, Description):
            return described
        gateway = self._streams.gateway(request_id)
        if gateway is None:
            return None  # It ended on the way here.
        wishes = self._streams.wishes(request_id)
        if wishes is not None:
            wishes = wishes.after(self._streams.age_s(request_id, self._loop.now_s()))
        payload = msgspec.msgpack.encode(MovedPayload(gateway, described.payload, wishes))
        return dataclasses.replace(described, payload=payload)

    async def progress(self, request_id: RequestId) -> Progress | None:
        return await _visit(self._loop.call(lambda engine: engine.progress(request_id)))

    async def stop(self, request_id: RequestId, *, without_kv: bool) -> StoppedRequest | NotStopped:
        if self._described_at_step is not None:
            self.steps_during_copy = self._loop.num_steps - self._described_at_step
        return await _visit(self._loop.call_until(lambda engine: engine.try_stop(request_id, without_kv)))

    async def resume(self, request_id: RequestId) -> None:
        await _visit(self._loop.call(lambda engine: engine.resume(request_id)))

    async def release(self, request_id: RequestId) -> None:
        # Nothing of it can be in flight: it was stopped, and every output from before the stop has been delivered.
        self._streams.close(request_id)
        await _visit(self._loop.call(lambda engine: engine.release(request_id)))


class DestinationAdapter:
    """`DestinationEngine` of an instance: the engine, and the stream that goes on here."""

    def __init__(
        self,
        own: Incarnation,
        loop: EngineHost,
        streams: StreamTable,
        tombstones: Tombstones,
        mailbox: Inbox,
        why_closed: Callable[[], str | None],
    ) -> None:
        """`why_closed` says why nothing may come in now (draining), or None."""
        self._own = own
        self._loop = loop
        self._streams = streams
        self._tombstones = tombstones
        self._mailbox = mailbox
        self._why_closed = why_closed
        self._coming: dict[MigrationId, _Coming] = {}

    async def reserve(self, migration_id: MigrationId, description: Description) -> Reservation | Refusal:
        if reason := self._why_closed():
            return Refusal(reason)
        if description.request_id in self._tombstones:
            return Refusal("its client has left")
        described_s = self._loop.now_s()
        try:
            moved = msgspec.msgpack.decode(description.payload, type=MovedPayload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Refusal("the description cannot be read")
        inner = dataclasses.replace(description, payload=moved.engine_payload)
        reserved = await _visit(
            self._loop.call(lambda engine: engine.reserve(migration_id, inner, RESERVE_SLACK_BLOCKS))
        )
        if isinstance(reserved, Reservation):
            self._coming[migration_id] = _Coming(moved.gateway_address, moved.wishes, described_s)
        return reserved

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        return await _visit(self._loop.call(lambda engine: engine.grow(migration_id, num_tokens)))

    async def wait_ready(self, migration_id: MigrationId) -> Refusal | None:
        while True:
            ready = await _visit(self._loop.call(lambda engine: engine.is_ready(migration_id)))
            if isinstance(ready, Refusal):
                return ready
            if ready:
                return None
            await asyncio.sleep(READY_POLL_S)

    async def commit(self, migration_id: MigrationId, state: bytes) -> Refusal | None:
        coming = self._coming.pop(migration_id, None)
        if coming is None:
            return Refusal("no such reservation")

        def go_on(committed: CommittedRequest | Refusal) -> None:
            if isinstance(committed, CommittedRequest):
                self._take_over(committed, coming)

        committed = await _visit(self._loop.call(lambda engine: engine.commit(migration_id, state), then=go_on))
        return committed if isinstance(committed, Refusal) else None

    async def cancel(self, migration_id: MigrationId) -> None:
        self._coming.pop(migration_id, None)
        await _visit(self._loop.call(lambda engine: engine.cancel(migration_id)))

    async def abort(self, request_id: RequestId) -> None:
        self._streams.close(request_id)
        await _visit(self._loop.call(lambda engine: engine.abort((request_id,))))

    def check_integrity(self) -> None:
        """At rest no reservation is remembered."""
        assert not self._coming, f"requests of ended migrations: {self._coming}"

    def _take_over(self, committed: CommittedRequest, coming: _Coming) -> None:
        if committed.request_id in self._tombstones:
            # The abort came while the commit was under way, so the engine's abort stands right behind it in the queue.
            return
        now_s, offset = self._loop.now_s(), committed.num_output_tokens
        wishes = None if coming.wishes is None else coming.wishes.after(now_s - coming.described_s)
        self._streams.open(committed.request_id, coming.gateway, offset, now_s, wishes)
        changed = OwnerChanged(committed.request_id, self._own.instance, self._own.epoch, offset)
        self._mailbox.send(coming.gateway, changed)


@dataclass(frozen=True, slots=True)
class _Leaving:
    migration: Migration
    driver: SourceDriver
    running: asyncio.Task[MigrationReport]


class Outgoing:
    """The migrations that leave this instance: at most `max_out` at a time, one a request."""

    def __init__(
        self,
        own: Incarnation,
        loop: EngineHost,
        streams: StreamTable,
        mailbox: Inbox,
        max_out: int,
        is_fenced: Callable[[Incarnation], bool],
    ) -> None:
        self._own = own
        self._is_fenced = is_fenced
        self._loop = loop
        self._streams = streams
        self._mailbox = mailbox
        self._max_out = max_out
        self._drivers: dict[MigrationId, _Leaving] = {}
        self._num_started = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __len__(self) -> int:
        return len(self._drivers)

    async def migrate(
        self, request_id: RequestId, destination: Incarnation, params: MigrationParams
    ) -> MigrationSummary:
        """Move it; returns when that is over, one way or the other."""
        self._num_started += 1
        migration_id = MigrationId(f"{self._own.instance}-{self._own.epoch}-{self._num_started}")
        migration = Migration(migration_id, request_id, self._own, destination)
        if reason := self._why_not(migration):
            return never_finished(migration, Outcome.REFUSED, reason)
        adapter = SourceAdapter(self._loop, self._streams)
        driver = SourceDriver(
            migration,
            params,
            channel=InboxChannel(self._mailbox, self._own, destination),
            engine=adapter,
            mover=self._loop.engine.mover,
        )
        running = asyncio.create_task(driver.run(), name=f"migration-{migration_id}")
        self._drivers[migration_id] = _Leaving(migration, driver, running)
        self._none_left.clear()
        running.add_done_callback(lambda _: self._ended(migration_id))
        # A caller that is cancelled takes nothing back: the migration goes on to its end without it.
        await asyncio.wait((running,))
        if running.cancelled():
            return never_finished(migration, Outcome.FAULT, "the instance stopped first")
        return summary(running.result(), adapter.steps_during_copy)

    def deliver(self, message: ToSource, sender: Incarnation) -> None:
        """Answers of migrations that are over are dropped, and those of others than the destination (by the driver)."""
        leaving = self._drivers.get(MigrationId(message.migration_id))
        if leaving is not None:
            leaving.driver.deliver(message, sender)

    def client_aborted(self, request_id: RequestId) -> None:
        for leaving in tuple(self._drivers.values()):
            if leaving.migration.request_id == request_id:
                leaving.driver.client_aborted()

    def peer_lost(self, lost: Incarnation) -> None:
        for leaving in tuple(self._drivers.values()):
            peer = leaving.migration.destination
            if peer.instance == lost.instance and peer.epoch <= lost.epoch:
                leaving.driver.peer_lost()

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """Give up the migration of this request; False when none is under way. Its `migrate` call returns what came of
        it: a migration whose `Commit` was sent goes on."""
        leaving = [leaving for leaving in self._drivers.values() if leaving.migration.request_id == request_id]
        for one in leaving:
            one.driver.cancel(reason)
        return bool(leaving)

    def cancel_all(self, reason: str) -> None:
        """Give up those whose `Commit` has not been sent."""
        for leaving in tuple(self._drivers.values()):
            leaving.driver.cancel(reason)

    async def wait_none_left(self) -> None:
        await self._none_left.wait()

    async def break_off(self) -> None:
        """End what is still under way: it waits for the answer to a commit, which nobody will hear."""
        running = [leaving.running for leaving in self._drivers.values()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _ended(self, migration_id: MigrationId) -> None:
        leaving = self._drivers.pop(migration_id)
        if not self._drivers:
            self._none_left.set()
        if leaving.driver.is_client_gone:
            # The destination may own it by now and may have missed the broadcast; there it is an unknown id otherwise.
            self._mailbox.send(leaving.migration.destination.address, Abort((leaving.migration.request_id,)))

    def _why_not(self, migration: Migration) -> str | None:
        if migration.destination.instance == self._own.instance:
            return "it is here already"
        if self._is_fenced(migration.destination):
            return f"{migration.destination.instance} (epoch {migration.destination.epoch}) is known to be dead"
        if any(leaving.migration.request_id == migration.request_id for leaving in self._drivers.values()):
            return "it is being moved already"
        if len(self._drivers) >= self._max_out:
            return f"{self._max_out} migrations leave this instance already"
        return None


def summary(report: MigrationReport, steps_during_copy: int) -> MigrationSummary:
    return MigrationSummary(
        migration_id=report.migration_id,
        request_id=report.request_id,
        source=report.source,
        destination=report.destination,
        outcome=report.outcome.value,
        reason=report.reason,
        cached_tokens=report.cached_tokens,
        moved_tokens=report.moved_tokens,
        num_stages=len(report.stages),
        copied_blocks=sum(stage.num_blocks for stage in report.stages),
        tail_blocks=0 if report.tail is None else report.tail.num_blocks,
        num_bytes=report.num_bytes,
        duration_s=report.duration_s,
        stopped_s=report.stopped_s,
        steps_during_copy=steps_during_copy,
    )


def never_finished(migration: Migration, outcome: Outcome, reason: str) -> MigrationSummary:
    """A migration that never began, or whose end is not known here."""
    report = MigrationReport(
        migration_id=migration.migration_id,
        request_id=migration.request_id,
        source=migration.source.instance,
        destination=migration.destination.instance,
        outcome=outcome,
        reason=reason,
        cached_tokens=0,
        moved_tokens=0,
        stages=(),
        tail=None,
        duration_s=0.0,
        stopped_s=0.0,
    )
    return summary(report, steps_during_copy=0)


def params_for(mode: str) -> MigrationParams:
    """Raises ValueError for a mode that does not exist."""
    return MigrationParams(mode=Mode(mode))
