"""Who takes blocks in? The receiving end of one rank: a server thread, a thread a connection, and the tickets."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from migration.errors import CopyFailed, MalformedMessage
from migration.transports import links
from migration.transports.budget import Budget
from migration.transports.frames import (
    Begin,
    Failed,
    Frame,
    FrameKind,
    FrameSocket,
    Hello,
    Landed,
    LinkOffered,
    Welcome,
)
from migration.transports.links import Link, LinkMaker, LinkOffer, make_in_time
from migration.transports.params import CarrierParams
from migration.transports.shm import Segment, map_segment, num_freed
from migration.transports.store import KVStore, host_store
from migration.transports.tickets import TicketTable
from migration.types import BlockRange, BlockTable, MigrationId

_LOG = logging.getLogger(__name__)
_DRAIN_S = 1.0
_BACKLOG = 64


class BlockReceiver:
    """The receiving end of one rank. Thread-safe; `close` ends its threads."""

    def __init__(self, store: KVStore, url: str, token: bytes, params: CarrierParams) -> None:
        self.store = store
        self.url = url
        """Where senders push to."""
        self.token = token
        self.tickets = TicketTable(store.layout, params.max_tickets)

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        """Accept pushes of this migration into these blocks; again when the table has grown.

        Raises `CopyFailed` when too many are open, `ValueError` when the table does not fit the layout.
        """
        self.tickets.open(migration_id, block_table)

    def close_ticket(self, migration_id: MigrationId) -> None:
        """Refuse further chunks of it; return when none is being written. Unknown ids are ignored."""
        self.tickets.close(migration_id)

    def try_close_ticket(self, migration_id: MigrationId) -> bool:
        """As `close_ticket` but never waits: False if a chunk is still being written (further ones are refused)."""
        return self.tickets.try_close(migration_id)

    def close(self) -> None:
        """End every connection and thread. Idempotent."""


class SocketReceiver(BlockReceiver):
    """Serves ``tcp://``, ``shm://`` and, with a `link_maker`, ``nccl://`` senders on one listening socket."""

    def __init__(
        self,
        store: KVStore,
        scheme: str,
        host: str,
        token: bytes,
        params: CarrierParams,
        link_maker: LinkMaker | None = None,
    ) -> None:
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        super().__init__(store, f"{scheme}://{host}:{self._listener.getsockname()[1]}", token, params)
        self.link_maker = link_maker
        self._params = params
        self.budget = Budget(params.bytes_per_s)
        """Shared by all who push."""
        self.is_closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[FrameSocket, threading.Thread] = {}
        self._is_closed = False
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    @property
    def num_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self.is_closing.set()
            connections = dict(self._connections)
        # Wakes the acceptor; platforms that refuse this on a listening socket wake it by the close.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for frames in connections:
            frames.interrupt()
        for thread in (self._acceptor, *connections.values()):
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            frames = FrameSocket(sock)
            with self._lock:
                if self._is_closed or len(self._connections) >= self._params.max_connections:
                    _LOG.warning("refused a block connection: %d are open", len(self._connections))
                    frames.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(frames,), name="kv-receive", daemon=True)
                self._connections[frames] = thread
                thread.start()

    def _serve(self, frames: FrameSocket) -> None:
        connection = _Connection(self, frames, self._params)
        try:
            connection.serve()
        except MalformedMessage as error:
            _LOG.warning("closed a block connection: %s", error)
        except OSError as error:
            _LOG.info("lost a block connection: %s", error)
        finally:
            connection.close()
            with self._lock:
                del self._connections[frames]


class _Connection:
    """One sender's connection: the handshake, then push after push."""

    def __init__(self, receiver: SocketReceiver, frames: FrameSocket, params: CarrierParams) -> None:
        self._receiver = receiver
        self._frames = frames
        self._params = params
        self._index_bytes = receiver.store.layout.index_bytes
        self._host_store = host_store(receiver.store)
        self._segment: Segment | None = None
        self._link: Link | None = None
        self._link_slot_bytes = 0
        self._buffer = bytearray()

    def close(self) -> None:
        self._frames.close()
        if self._link is not None:
            self._link.abort()

    def serve(self) -> None:
        try:
            self._handshake()
            while True:
                self._frames.set_deadline(None)
                frame = self._frames.receive()
                if frame is None:
                    return
                if frame.kind is not FrameKind.BEGIN:
                    raise MalformedMessage(f"expected BEGIN, got {frame.kind.name}")
                self._take_push(self._frames.receive_control(frame, Begin))
        except CopyFailed as refusal:
            self._frames.set_deadline(time.monotonic() + _DRAIN_S)
            self._frames.send(FrameKind.FAILED, Failed(str(refusal)))
            self._frames.drain(_DRAIN_S)

    def _handshake(self) -> None:
        self._frames.set_deadline(time.monotonic() + self._params.handshake_s)
        hello = self._frames.receive_control(self._frames.expect(FrameKind.HELLO), Hello)
        if not hmac.compare_digest(hello.token, self._receiver.token):
            raise CopyFailed("wrong token")
        if hello.group_block_bytes != self._receiver.store.layout.group_block_bytes:
            raise CopyFailed("the sender's blocks have another size")
        if hello.page_order != self._receiver.store.layout.page_order:
            raise CopyFailed("the sender's pages come in another order")
        local: socket.socket | None = None
        if hello.segment is not None:
            mapped = map_segment(hello.segment, self._params.max_segment_bytes)
            self._segment, local = mapped or (None, None)
        if hello.link is not None and self._receiver.link_maker is not None:
            self._make_link(self._receiver.link_maker, hello.link)
        else:
            self._frames.send(FrameKind.WELCOME, Welcome(has_segment=self._segment is not None))
            if local is not None:
                self._frames.move_to(local)

    def _make_link(self, maker: LinkMaker, offered: LinkOffered) -> None:
        """Both ends make theirs at the same time, after the welcome."""
        if not 0 < offered.slot_bytes <= self._params.max_chunk_bytes:
            raise CopyFailed(f"slots of {offered.slot_bytes} bytes are none that this receiver has")
        answer, make = maker.answer(LinkOffer(offered.unique_id, offered.gpu, offered.slot_bytes))
        self._frames.send(FrameKind.WELCOME, Welcome(has_segment=False, link_handles=answer.slot_handles))
        self._link = make_in_time(make, self._params.link_s)
        self._link_slot_bytes = offered.slot_bytes

    def _take_push(self, begin: Begin) -> None:
        if not 0 <= begin.first < begin.end or not begin.chunk_blocks > 0:
            raise MalformedMessage("a push of no blocks")
        if begin.chunk_blocks * self._index_bytes > self._params.max_chunk_bytes:
            raise CopyFailed(f"chunks of {begin.chunk_blocks * self._index_bytes} bytes are too large")
        if self._segment is None:
            self._take_chunks(begin)
        else:
            self._take_slots(begin, self._segment)
        num_blocks = begin.end - begin.first
        self._frames.send(FrameKind.LANDED, Landed(num_blocks, num_blocks * self._index_bytes))

    def _take_chunks(self, begin: Begin) -> None:
        done, chunk_index = begin.first, 0
        while done < begin.end:
            self._frames.set_deadline(time.monotonic() + self._params.stall_s)
            frame = self._frames.receive()
            if frame is None:
                raise ConnectionResetError("the sender closed the connection in the middle of a push")
            count = min(begin.chunk_blocks, begin.end - done)
            if frame.first != done or frame.count != count:
                raise MalformedMessage("a chunk out of order")
            if not begin.is_urgent:
                self._wait_turn(count)
            self._take_chunk(begin, frame, chunk_index)
            done, chunk_index = done + count, chunk_index + 1

    def _take_slots(self, begin: Begin, segment: Segment) -> None:
        """Written out, with little in its way: a copy drives the interpreter out of the processor's cache, and what is
        called for each chunk then costs several times what it costs elsewhere."""
        frames, tickets, scatter = self._frames, self._receiver.tickets, self._receiver.store.scatter
        num_slots, slot_bytes = segment.num_slots, begin.chunk_blocks * self._index_bytes
        if slot_bytes > segment.slot_bytes:
            raise MalformedMessage(f"chunks of {slot_bytes} bytes in slots of {segment.slot_bytes}")
        slots = [segment.slot(i, slot_bytes) for i in range(num_slots)]
        migration_id, num_chunks = MigrationId(begin.migration_id), _num_chunks(begin)
        first, chunk_index = begin.first, 0
        while first < begin.end:
            end = min(first + begin.chunk_blocks, begin.end)
            frames.set_deadline(time.monotonic() + self._params.stall_s)
            frame = frames.receive()
            if frame is None:
                raise ConnectionResetError("the sender closed the connection in the middle of a push")
            kind, num_bytes = frame.kind, frame.num_bytes
            if kind is not FrameKind.SLOT_CHUNK or num_bytes or frame.first != first or frame.count != end - first:
                raise MalformedMessage(f"{kind.name} with {num_bytes} bytes, or out of order, in a push through slots")
            if not begin.is_urgent:
                self._wait_turn(end - first)
            data = slots[chunk_index % num_slots]
            if end - first < begin.chunk_blocks:
                data = data[: (end - first) * self._index_bytes]
            if begin.has_checksum:
                _check_sum(frame, data)
            ticket, block_ids = tickets.begin_write(migration_id, first, end)
            try:
                scatter(block_ids, data)
            finally:
                tickets.end_write(ticket)
            if count := num_freed(num_slots, chunk_index, num_chunks):
                frames.announce(FrameKind.SLOT_FREE, 0, count)
            first, chunk_index = end, chunk_index + 1

    def _wait_turn(self, num_blocks: int) -> None:
        """Until the budget allows the chunk that is announced; meanwhile it waits in the kernel or in its slot, and so
        its sender does. A ticket that is closed meanwhile need not wait for it."""
        now_s = time.monotonic()
        turn_s = self._receiver.budget.take(num_blocks * self._index_bytes, now_s)
        if turn_s > now_s:
            self._receiver.is_closing.wait(turn_s - now_s)

    def _take_chunk(self, begin: Begin, frame: Frame, chunk_index: int) -> None:
        num_bytes = frame.count * self._index_bytes
        if frame.kind is FrameKind.CHUNK and frame.num_bytes == num_bytes:
            if begin.has_checksum or not self._receive_in_place(begin, frame):
                if len(self._buffer) < num_bytes:
                    self._buffer = bytearray(num_bytes)
                data = memoryview(self._buffer)[:num_bytes]
                self._frames.receive_into(data)
                self._write(begin, frame, data)
        elif frame.kind is FrameKind.LINK_CHUNK and self._link is not None and num_bytes <= self._link_slot_bytes:
            self._take_from_link(begin, frame, self._link, chunk_index)
        else:
            raise MalformedMessage(f"{frame.kind.name} with {frame.num_bytes} bytes in a push of chunks")

    def _take_from_link(self, begin: Begin, frame: Frame, link: Link, chunk_index: int) -> None:
        """Into a slot of ours first: what is written into the blocks is wholly here, and its ticket is open."""
        if begin.has_checksum or frame.num_bytes:
            raise MalformedMessage("a chunk from a GPU has neither a checksum nor a payload")
        with self._writing(begin, frame):
            pass  # refused before anything is taken in
        slot = chunk_index % links.NUM_SLOTS
        link.receive(slot, frame.count * self._index_bytes)
        links.wait_done(link, slot, time.monotonic() + self._params.stall_s)
        with self._writing(begin, frame) as block_ids:
            link.unpack(slot, block_ids)
        if count := num_freed(links.NUM_SLOTS, chunk_index, _num_chunks(begin)):
            self._frames.announce(FrameKind.SLOT_FREE, 0, count)

    def _receive_in_place(self, begin: Begin, frame: Frame) -> bool:
        """From the socket straight into the blocks, if the processor can address them. A close of the ticket ends the
        connection, since it must not wait for the sender."""
        if self._host_store is None:
            return False
        with self._writing(begin, frame, self._frames.interrupt) as block_ids:
            views = self._host_store.views(block_ids)
            if views is None or sum(map(len, views)) != frame.num_bytes:
                raise CopyFailed("the store's views do not fit its layout")
            self._frames.receive_pieces(views)
        return True

    def _write(self, begin: Begin, frame: Frame, data: memoryview) -> None:
        """A chunk that is wholly here. With a checksum nothing is written that does not match it."""
        if begin.has_checksum:
            _check_sum(frame, data)
        with self._writing(begin, frame) as block_ids:
            self._receiver.store.scatter(block_ids, data)

    def _writing(
        self, begin: Begin, frame: Frame, interrupt: Callable[[], None] | None = None
    ) -> AbstractContextManager[BlockTable]:
        blocks = BlockRange(frame.first, frame.first + frame.count)
        return self._receiver.tickets.writing(MigrationId(begin.migration_id), blocks, interrupt)


def _num_chunks(begin: Begin) -> int:
    return -(-(begin.end - begin.first) // begin.chunk_blocks)


def _check_sum(frame: Frame, data: memoryview) -> None:
    if zlib.crc32(data) != frame.crc32:
        raise CopyFailed("checksum of a chunk does not match")
