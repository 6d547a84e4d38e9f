"""How do blocks get to a peer? The sending end of one rank: chunk by chunk, paced, over the carrier its URL names."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from migration.errors import CopyFailed, MalformedMessage
from migration.stages import chunks_of
from migration.transports import links
from migration.transports.budget import Budget
from migration.transports.frames import Begin, FrameKind, FrameSocket, Landed
from migration.transports.links import Link, LinkMaker
from migration.transports.memory import MemoryHub
from migration.transports.params import CarrierParams
from migration.transports.pool import Connection, ConnectionPool
from migration.transports.shm import Segment, slots_freed
from migration.transports.store import HostKVStore, KVStore, host_store
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId

_LOG = logging.getLogger(__name__)
_WHY_S = 0.2
"""After a broken send: how long to look for the peer's reason."""
_NO_BUDGET = Budget(None)


@dataclass(slots=True)
class _Push:
    """One push under way."""

    migration_id: MigrationId
    url: str
    block_table: BlockTable
    blocks: BlockRange
    deadline_s: float
    budget: Budget
    index_bytes: int
    is_broken_off: threading.Event = field(default_factory=threading.Event)
    frames: FrameSocket | None = None
    """What it waits on, from before its handshake on."""

    def ids(self, blocks: BlockRange) -> BlockTable:
        return tuple(group[blocks.first : blocks.end] for group in self.block_table)

    def wait_turn(self, blocks: BlockRange) -> None:
        """Wait until the budget allows this chunk. Raises `CopyFailed` when broken off or out of time."""
        now_s = time.monotonic()
        if self.budget.is_bounded:
            turn_s = self.budget.take(len(blocks) * self.index_bytes, now_s)
            wait_s = min(turn_s, self.deadline_s) - now_s
            if wait_s > 0:
                self.is_broken_off.wait(wait_s)
                now_s = time.monotonic()
        if self.is_broken_off.is_set():
            raise CopyFailed("broken off")
        if now_s >= self.deadline_s:
            raise CopyFailed("the deadline passed")


class BlockSender:
    """The sending end of one rank. Thread-safe; a migration has one push at a time."""

    def __init__(
        self,
        store: KVStore,
        token: bytes,
        params: CarrierParams,
        hub: MemoryHub | None = None,
        link_maker: LinkMaker | None = None,
    ) -> None:
        self._store = store
        self._host_store = host_store(store)
        self._token = token
        self._params = params
        self._hub = hub
        self._pool = ConnectionPool(store.layout, token, params, link_maker)
        self._budget = Budget(params.bytes_per_s)
        self._gatherer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-gather")
        self._lock = threading.Lock()
        self._pushes: dict[MigrationId, _Push] = {}

    @property
    def num_idle_connections(self) -> int:
        return self._pool.num_idle

    def push(
        self,
        migration_id: MigrationId,
        url: str,
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        timeout_s: float,
        urgent: bool = False,
    ) -> CopyReceipt:
        """Copy these block indexes of `block_table` (physical ids here) to the peer; return when it has written them.

        `urgent`: ignore the budget `bytes_per_s`. Raises `CopyFailed` (reason) when the peer refused or died, the
        time-out passed, or `break_off` was called; nothing may be assumed landed then.
        """
        if blocks.first < 0 or any(blocks.end > len(group) for group in block_table):
            raise CopyFailed(f"blocks {blocks.first}..{blocks.end} lie outside the source's table")
        if not len(blocks):
            return CopyReceipt(0, 0)
        push = _Push(
            migration_id,
            url,
            block_table,
            blocks,
            time.monotonic() + timeout_s,
            _NO_BUDGET if urgent else self._budget,
            self._store.layout.index_bytes,
        )
        with self._lock:
            if migration_id in self._pushes:
                raise CopyFailed("a push of this migration is under way")
            self._pushes[migration_id] = push
        try:
            if url.startswith("memory://"):
                return self._push_in_memory(push)
            return self._push_by_socket(push)
        except (OSError, MalformedMessage) as error:
            reason = "broken off" if push.is_broken_off.is_set() else f"{url}: {error or type(error).__name__}"
            raise CopyFailed(reason) from error
        except CopyFailed:
            raise
        except Exception as error:  # a store's own error (a gather of torch, say) is a copy that failed
            _LOG.error("%s: a push raised %r", migration_id, error, exc_info=error)
            raise CopyFailed(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                del self._pushes[migration_id]

    def break_off(self, migration_id: MigrationId) -> None:
        """Let a push of this migration that is under way fail now. Unknown ids are ignored."""
        with self._lock:
            push = self._pushes.get(migration_id)
            if push is not None:
                push.is_broken_off.set()
                if push.frames is not None:
                    push.frames.interrupt()

    def close(self) -> None:
        """Break off every push and close every connection."""
        with self._lock:
            migration_ids = list(self._pushes)
        for migration_id in migration_ids:
            self.break_off(migration_id)
        self._pool.close()
        self._gatherer.shutdown()

    def _push_in_memory(self, push: _Push) -> CopyReceipt:
        if self._hub is None:
            raise CopyFailed("this sender knows no memory hub")
        receiver = self._hub.find(push.url)
        if receiver.token != self._token:
            raise CopyFailed("wrong token")
        if receiver.store.layout.group_block_bytes != self._store.layout.group_block_bytes:
            raise CopyFailed("the sender's blocks have another size")
        if receiver.store.layout.page_order != self._store.layout.page_order:
            raise CopyFailed("the sender's pages come in another order")
        num_bytes = 0
        for blocks in chunks_of(push.blocks, self._pool.chunk_blocks()):
            push.wait_turn(blocks)
            data = memoryview(bytearray(len(blocks) * push.index_bytes))
            self._store.gather(push.ids(blocks), data)
            with receiver.tickets.writing(push.migration_id, blocks) as block_ids:
                receiver.store.scatter(block_ids, data)
            num_bytes += len(data)
        return CopyReceipt(len(push.blocks), num_bytes)

    def _push_by_socket(self, push: _Push) -> CopyReceipt:
        watch = partial(self._watch, push)
        connection = self._pool.take(push.url, push.deadline_s, watch)
        try:
            landed = self._push_over(push, connection)
        except (BrokenPipeError, ConnectionResetError):
            # The peer may have ended an idle connection, to make room, just as it was taken: it has served none of
            # this push then.
            if not connection.is_used or connection.frames.has_answer or push.is_broken_off.is_set():
                raise
            landed = self._push_over(push, self._pool.connect(push.url, push.deadline_s, watch))
        return CopyReceipt(landed.num_blocks, landed.num_bytes)

    def _watch(self, push: _Push, frames: FrameSocket | None) -> None:
        """What `break_off` interrupts. Raises `CopyFailed` if it was called already."""
        with self._lock:
            if frames is not None and push.is_broken_off.is_set():
                raise CopyFailed("broken off")
            push.frames = frames

    def _push_over(self, push: _Push, connection: Connection) -> Landed:
        """Over this connection, which is kept or closed then."""
        has_landed = False
        try:
            landed = self._converse(push, connection)
            has_landed = True
        finally:
            self._watch(push, None)
            if has_landed and not push.is_broken_off.is_set():
                self._pool.give(push.url, connection)
            else:
                connection.close()
        return landed

    def _converse(self, push: _Push, connection: Connection) -> Landed:
        frames = connection.frames
        frames.has_answer = False
        frames.set_deadline(push.deadline_s)
        is_socket = connection.segment is None and connection.link is None
        in_place = self._host_store if is_socket and not self._params.checksum else None
        chunk_blocks = self._pool.chunk_blocks(1 if push.budget.is_bounded else self._burst(connection, in_place))
        chunks = chunks_of(push.blocks, chunk_blocks)
        begin = Begin(
            push.migration_id,
            push.blocks.first,
            push.blocks.end,
            chunk_blocks,
            has_checksum=self._params.checksum,
            is_urgent=push.budget is _NO_BUDGET,
        )
        try:
            frames.send(FrameKind.BEGIN, begin)
            if connection.link is not None:
                self._fill_link(push, chunks, connection, connection.link)
            elif connection.segment is not None:
                self._fill_slots(push, chunks, connection, connection.segment)
            elif in_place is not None:
                self._send_in_place(push, chunks, connection, in_place)
            else:
                self._send_chunks(push, chunks, connection)
        except (BrokenPipeError, ConnectionResetError):
            frames.set_deadline(time.monotonic() + _WHY_S)
            frames.expect(FrameKind.LANDED)  # raises the peer's reason if it left one
            raise
        frames.set_deadline(push.deadline_s)
        return frames.receive_control(frames.expect(FrameKind.LANDED), Landed)

    def _burst(self, connection: Connection, in_place: HostKVStore | None) -> int:
        """Chunks that are sent as one where no budget paces them."""
        if connection.link is not None:
            return self._params.link_chunks
        return self._params.burst_chunks if in_place is None else self._params.in_place_chunks

    def _send_in_place(
        self, push: _Push, chunks: Sequence[BlockRange], connection: Connection, store: HostKVStore
    ) -> None:
        """Through the socket, straight from the blocks: the kernel's copy is the only one."""
        for blocks in chunks:
            push.wait_turn(blocks)
            views = store.views(push.ids(blocks))
            if views is None or sum(map(len, views)) != len(blocks) * push.index_bytes:
                raise CopyFailed("the store's views do not fit its layout")
            self._send_chunk(push, connection, blocks, 0, views)

    def _send_chunk(
        self, push: _Push, connection: Connection, blocks: BlockRange, crc32: int, payload: Sequence[memoryview]
    ) -> None:
        frames = connection.frames
        if frames.has_input():  # it can only be a refusal: do not send the rest into the void
            frames.expect(FrameKind.LANDED)
            raise MalformedMessage("the push has landed before it was sent")
        frames.set_deadline(push.deadline_s)
        frames.send_chunk(FrameKind.CHUNK, blocks.first, len(blocks), crc32, payload)

    def _send_chunks(self, push: _Push, chunks: Sequence[BlockRange], connection: Connection) -> None:
        """Through the socket: chunk k + 1 is gathered by another thread while chunk k is sent."""
        data, crc32 = self._gather(push, chunks, connection, 0)
        for chunk_index, blocks in enumerate(chunks):
            push.wait_turn(blocks)
            upcoming: Future[tuple[memoryview, int]] | None = None
            if chunk_index + 1 < len(chunks):
                upcoming = self._gatherer.submit(self._gather, push, chunks, connection, chunk_index + 1)
            self._send_chunk(push, connection, blocks, crc32, (data,))
            if upcoming is not None:
                data, crc32 = upcoming.result()

    def _gather(
        self, push: _Push, chunks: Sequence[BlockRange], connection: Connection, chunk_index: int
    ) -> tuple[memoryview, int]:
        blocks = chunks[chunk_index]
        data = connection.buffer(chunk_index, len(blocks) * push.index_bytes)
        self._store.gather(push.ids(blocks), data)
        return data, zlib.crc32(data) if self._params.checksum else 0

    def _fill_slots(self, push: _Push, chunks: Sequence[BlockRange], connection: Connection, segment: Segment) -> None:
        """Through shared memory: gathered straight into a slot, which the receiver frees when it has scattered it. With
        little in its way, as at the other end."""
        frames, gather, num_slots = connection.frames, self._store.gather, segment.num_slots
        freed = slots_freed(frames, num_slots)
        slots = [segment.slot(i, len(chunks[0]) * push.index_bytes) for i in range(num_slots)]
        ids = [push.ids(blocks) for blocks in chunks]
        for chunk_index, blocks in enumerate(chunks):
            push.wait_turn(blocks)
            frames.set_deadline(push.deadline_s)
            next(freed)
            data = slots[chunk_index % num_slots]
            if len(blocks) < len(chunks[0]):
                data = data[: len(blocks) * push.index_bytes]
            gather(ids[chunk_index], data)
            crc32 = zlib.crc32(data) if self._params.checksum else 0
            frames.announce(FrameKind.SLOT_CHUNK, blocks.first, len(blocks), crc32)

    def _fill_link(self, push: _Push, chunks: Sequence[BlockRange], connection: Connection, link: Link) -> None:
        """From GPU to GPU: chunk k + 1 is packed while chunk k is on the wire. A receiver that refuses one never takes
        it in; its reason comes through the socket, and the link is aborted with the connection."""
        if self._params.checksum:
            raise CopyFailed("nccl carries no checksums")
        frames = connection.frames
        freed = slots_freed(frames, links.NUM_SLOTS)
        for chunk_index, blocks in enumerate(chunks):
            push.wait_turn(blocks)
            frames.set_deadline(push.deadline_s)
            next(freed)
            slot = chunk_index % links.NUM_SLOTS
            link.pack(slot, push.ids(blocks))
            if link.is_direct:
                links.wait_done(link, slot, push.deadline_s)
            frames.announce(FrameKind.LINK_CHUNK, blocks.first, len(blocks))
            link.ship(slot, len(blocks) * push.index_bytes)
