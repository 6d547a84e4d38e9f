"""What does a driver need to run without a real engine? Ports in memory: engines, channels, a mover."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from migration import wire
from migration.driver import IncomingReport, IncomingTable, SourceDriver
from migration.errors import ChannelClosed, CopyFailed, EngineFault
from migration.messages import Message
from migration.params import IncomingParams, MigrationParams, Mode
from migration.types import (
    BlockRange,
    BlockTable,
    CopyReceipt,
    Description,
    Epoch,
    Incarnation,
    InstanceId,
    Migration,
    MigrationId,
    MigrationReport,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

REQUEST = RequestId("r")
BLOCK_SIZE = 4
STEP_S = 0.01
VISIT_S = 0.001
COPY_S_PER_BLOCK = 0.002


@dataclass
class ToySource:
    """Decodes one request, a token a step of virtual time; its KV block i holds the text ``block i of n tokens``."""

    prompt_tokens: int = 40
    max_tokens: int = 10_000
    num_preemptions: int = 0
    is_there: bool = True
    is_stopped: bool = False
    is_released: bool = False
    fails: set[str] = field(default_factory=set)
    visits: list[str] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    """When each output token was decoded."""

    async def _visit(self, name: str) -> None:
        self.visits.append(name)
        await asyncio.sleep(VISIT_S)
        if name in self.fails:
            raise EngineFault(f"{name} failed")

    async def decode(self) -> None:
        while self.is_there:
            await asyncio.sleep(STEP_S)
            if not self.is_stopped and self.is_there:
                self.tokens.append(asyncio.get_running_loop().time())
                self.is_there = len(self.tokens) < self.max_tokens

    @property
    def settled_tokens(self) -> int:
        return self.prompt_tokens + len(self.tokens)

    @property
    def block_table(self) -> BlockTable:
        return (tuple(range(100, 100 + -(-self.settled_tokens // BLOCK_SIZE))),)

    async def describe(self, request_id: RequestId) -> Description | Refusal | None:
        await self._visit("describe")
        if not self.is_there:
            return None
        return Description(request_id, b"payload", self.settled_tokens, "print", BLOCK_SIZE, self.num_preemptions)

    async def progress(self, request_id: RequestId) -> Progress | None:
        await self._visit("progress")
        if not self.is_there:
            return None
        return Progress(self.settled_tokens, self.settled_tokens + 1, self.num_preemptions, self.block_table)

    async def stop(self, request_id: RequestId, *, without_kv: bool) -> StoppedRequest | NotStopped:
        await self._visit("stop")
        if not self.is_there:
            return NotStopped.FINISHED
        self.is_stopped = True
        settled = 0 if without_kv else self.settled_tokens
        table: BlockTable = ((),) if without_kv else self.block_table
        return StoppedRequest(str(settled).encode(), settled, len(self.tokens), self.num_preemptions, table)

    async def resume(self, request_id: RequestId) -> None:
        await self._visit("resume")
        self.is_stopped = False

    async def release(self, request_id: RequestId) -> None:
        await self._visit("release")
        if self.is_stopped:
            self.is_there, self.is_released = False, True


@dataclass
class ToyDestination:
    """Holds blocks out of a small pool and commits."""

    num_free: int = 1_000
    num_cached_tokens: int = 0
    ready_after_s: float = 0.0
    refuses: dict[str, str] = field(default_factory=dict)
    held: dict[MigrationId, int] = field(default_factory=dict)
    committed: dict[RequestId, bytes] = field(default_factory=dict)
    requests: dict[MigrationId, RequestId] = field(default_factory=dict)
    num_commits: int = 0
    commit_gate: asyncio.Event | None = None
    aborted: list[RequestId] = field(default_factory=list)

    def _hold(self, migration_id: MigrationId, num_blocks: int) -> Reservation | Refusal:
        extra = num_blocks - self.held.get(migration_id, 0)
        if extra > self.num_free:
            return Refusal("out of blocks")
        self.num_free -= extra
        self.held[migration_id] = num_blocks
        return Reservation(self.num_cached_tokens, num_blocks, (tuple(range(num_blocks)),))

    async def reserve(self, migration_id: MigrationId, description: Description) -> Reservation | Refusal:
        await asyncio.sleep(VISIT_S)
        if "reserve" in self.refuses:
            return Refusal(self.refuses["reserve"])
        self.requests[migration_id] = description.request_id
        return self._hold(migration_id, -(-description.settled_tokens // BLOCK_SIZE))

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        await asyncio.sleep(VISIT_S)
        return self._hold(migration_id, -(-num_tokens // BLOCK_SIZE))

    async def wait_ready(self, migration_id: MigrationId) -> Refusal | None:
        await asyncio.sleep(self.ready_after_s)
        return Refusal(self.refuses["ready"]) if "ready" in self.refuses else None

    async def commit(self, migration_id: MigrationId, state: bytes) -> Refusal | None:
        await asyncio.sleep(VISIT_S)
        if self.commit_gate is not None:
            await self.commit_gate.wait()
        if "commit" in self.refuses:
            await self.cancel(migration_id)
            return Refusal(self.refuses["commit"])
        self.num_commits += 1
        del self.held[migration_id]
        self.committed[self.requests[migration_id]] = state
        return None

    async def cancel(self, migration_id: MigrationId) -> None:
        await asyncio.sleep(VISIT_S)
        self.num_free += self.held.pop(migration_id, 0)

    async def abort(self, request_id: RequestId) -> None:
        self.committed.pop(request_id, None)
        self.aborted.append(request_id)


@dataclass
class ToyMover:
    """Takes time for each block; lands only while the ticket is open."""

    open_tickets: dict[MigrationId, BlockTable] = field(default_factory=dict)
    pushes: list[tuple[BlockRange, bool]] = field(default_factory=list)
    landed: set[int] = field(default_factory=set)
    fails_at: int | None = None
    """The push of this number (from 0) breaks."""

    def endpoints(self) -> tuple[str, ...]:
        return ("memory://b",)

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        self.open_tickets[migration_id] = block_table

    async def close(self, migration_id: MigrationId) -> None:
        self.open_tickets.pop(migration_id, None)

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        self.pushes.append((blocks, urgent))
        await asyncio.sleep(COPY_S_PER_BLOCK * len(blocks))
        if self.fails_at == len(self.pushes) - 1:
            raise CopyFailed("the cable was cut")
        if migration_id not in self.open_tickets or blocks.end > len(self.open_tickets[migration_id][0]):
            raise CopyFailed("no open ticket")
        assert blocks.end <= len(block_table[0])
        self.landed.update(range(blocks.first, blocks.end))
        return CopyReceipt(len(blocks), 64 * len(blocks))


@dataclass
class ToyChannel:
    """One way; every message crosses the wire format. `rule` says how often one arrives: 0 lost, 2 doubled."""

    receive: Callable[[Message], None]
    rule: Callable[[Message], int] = lambda _: 1
    sent: list[Message] = field(default_factory=list)
    is_closed: bool = False

    async def send(self, message: Message) -> None:
        if self.is_closed:
            raise ChannelClosed("the peer is gone")
        self.sent.append(message)
        data = wire.encode(message)
        for _ in range(self.rule(message)):
            asyncio.get_running_loop().call_later(0.0005, lambda: self.receive(wire.decode(data)))

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.sent]


A = Incarnation(InstanceId("a"), Epoch(1), "tcp://a")
B = Incarnation(InstanceId("b"), Epoch(1), "tcp://b")


class Pair:
    """A source and a destination that can hear each other, in one loop."""

    def __init__(self, params: MigrationParams | None = None, incoming: IncomingParams | None = None) -> None:
        self.params = params or MigrationParams()
        self.source = ToySource()
        self.destination = ToyDestination()
        self.mover = ToyMover()
        self.reports: list[IncomingReport] = []
        self.to_destination = ToyChannel(lambda message: self.table.deliver(message, A))  # type: ignore[arg-type]
        self.to_source = ToyChannel(self._to_source)
        self.drivers: dict[str, SourceDriver] = {}
        self.table = IncomingTable(
            B,
            incoming or IncomingParams(),
            engine=self.destination,
            mover=self.mover,
            open_channel=lambda _: self.to_source,
            on_end=self.reports.append,
        )
        self._background: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Pair:
        self._background = [asyncio.ensure_future(self.table.run()), asyncio.ensure_future(self.source.decode())]
        await asyncio.sleep(0.1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.table.check_integrity()
        await self.table.close()
        await self._background[0]
        self._background[1].cancel()

    def _to_source(self, message: Message) -> None:
        driver = self.drivers.get(message.migration_id)
        if driver is not None:
            driver.deliver(message, B)  # type: ignore[arg-type]
            driver.check_integrity()

    def driver(self, migration_id: str = "m", mode: Mode | None = None, destination: Incarnation = B) -> SourceDriver:
        params = self.params if mode is None else replace(self.params, mode=mode)
        migration = Migration(MigrationId(migration_id), REQUEST, A, destination)
        self.drivers[migration_id] = SourceDriver(
            migration, params, channel=self.to_destination, engine=self.source, mover=self.mover
        )
        return self.drivers[migration_id]

    async def move(self, mode: Mode | None = None) -> MigrationReport:
        return await self.driver(mode=mode).run()

    @property
    def is_clean(self) -> bool:
        """Nothing is reserved, no ticket is open."""
        return not self.destination.held and not self.mover.open_tickets and not self.table.num_incoming
