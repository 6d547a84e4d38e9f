"""What does a receiver do with one sender's connection? The handshake, then push after push."""

from __future__ import annotations

import hmac
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

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
from migration.transports.store import HostKVStore, KVStore
from migration.transports.tickets import TicketTable
from migration.types import BlockRange, BlockTable, MigrationId

_LOG = logging.getLogger(__name__)
_DRAIN_S = 1.0
_MAX_REASON = 1000
"""Characters of a refusal: a store's own error may be long, a control frame may not."""


class IdleConnections:
    """Which connections wait for a push? Thread-safe, the longest idle first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[FrameSocket, None] = {}

    @property
    def num_idle(self) -> int:
        with self._lock:
            return len(self._idle)

    def add(self, frames: FrameSocket) -> None:
        with self._lock:
            self._idle[frames] = None

    def remove(self, frames: FrameSocket) -> bool:
        """By its own thread. False: it was ended meanwhile, and nothing that it has read may be served."""
        with self._lock:
            if frames not in self._idle:
                return False
            del self._idle[frames]
            return True

    def end_longest(self) -> FrameSocket | None:
        """Make room: its thread notices at once. None: all are busy."""
        with self._lock:
            frames = next(iter(self._idle), None)
            if frames is not None:
                del self._idle[frames]
                frames.interrupt()  # with the lock: its thread closes it only after `remove`
            return frames


@dataclass(frozen=True, slots=True)
class Reception:
    """What all connections of a receiver share."""

    store: KVStore
    host_store: HostKVStore | None
    token: bytes
    params: CarrierParams
    tickets: TicketTable
    link_maker: LinkMaker | None
    budget: Budget
    """Shared by all who push."""
    idle: IdleConnections = field(default_factory=IdleConnections)
    is_closing: threading.Event = field(default_factory=threading.Event)


class ServedConnection:
    """One sender's connection, of one thread."""

    def __init__(self, reception: Reception, frames: FrameSocket) -> None:
        self._reception = reception
        self._frames = frames
        self._params = reception.params
        self._index_bytes = reception.store.layout.index_bytes
        self._host_store = reception.host_store
        self._segment: Segment | None = None
        self._link: Link | None = None
        self._link_slot_bytes = 0
        self._buffer = bytearray()

    def close(self) -> None:
        self._frames.close()
        links.abort(self._link)

    def serve(self) -> None:
        """Until either end has had enough. Raises `MalformedMessage`, `OSError`."""
        try:
            self._handshake()
            while (begin := self._next_begin()) is not None:
                self._take_push(begin)
        except CopyFailed as refusal:
            self._refuse(str(refusal))
        except (MalformedMessage, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - a store's own (a scatter of torch, say): its sender is told why
            _LOG.error("a push from a peer raised %r", error, exc_info=error)
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, reason: str) -> None:
        self._frames.set_deadline(time.monotonic() + _DRAIN_S)
        self._frames.send(FrameKind.FAILED, Failed(reason[:_MAX_REASON]))
        self._frames.drain(_DRAIN_S)

    def _next_begin(self) -> Begin | None:
        """Idle until a push comes. None: the connection is over."""
        self._frames.set_deadline(None)
        self._reception.idle.add(self._frames)
        try:
            frame = self._frames.receive()
        finally:
            is_over = not self._reception.idle.remove(self._frames)
        if frame is None or is_over:
            return None
        if frame.kind is not FrameKind.BEGIN:
            raise MalformedMessage(f"expected BEGIN, got {frame.kind.name}")
        self._set_stall_deadline()
        return self._frames.receive_control(frame, Begin)

    def _set_stall_deadline(self) -> None:
        self._frames.set_deadline(time.monotonic() + self._params.stall_s)

    def _handshake(self) -> None:
        deadline_s = time.monotonic() + self._params.handshake_s
        self._frames.set_deadline(deadline_s)
        hello = self._frames.receive_control(self._frames.expect(FrameKind.HELLO), Hello)
        if not hmac.compare_digest(hello.token, self._reception.token):
            raise CopyFailed("wrong token")
        if hello.group_block_bytes != self._reception.store.layout.group_block_bytes:
            raise CopyFailed("the sender's blocks have another size")
        if hello.page_order != self._reception.store.layout.page_order:
            raise CopyFailed("the sender's pages come in another order")
        local: socket.socket | None = None
        if hello.segment is not None:
            mapped = map_segment(hello.segment, self._params.max_segment_bytes, deadline_s - time.monotonic())
            self._segment, local = mapped or (None, None)
        if hello.link is not None and self._reception.link_maker is not None:
            self._make_link(self._reception.link_maker, hello.link)
        else:
            self._frames.send(FrameKind.WELCOME, Welcome(has_segment=self._segment is not None))
            if local is not None:
                self._frames.move_to(local)

    def _make_link(self, maker: LinkMaker, offered: LinkOffered) -> None:
        """Both ends make theirs at the same time, after the welcome."""
        if not 0 < offered.slot_bytes <= self._params.max_chunk_bytes:
            raise CopyFailed(f"slots of {offered.slot_bytes} bytes are none that this receiver has")
        answer, make = maker.answer(LinkOffer(offered.unique_id, offered.gpu, offered.slot_bytes))
        try:
            self._frames.send(FrameKind.WELCOME, Welcome(has_segment=False, link_handles=answer.slot_handles))
        except OSError:
            if answer.slot_handles:  # these slots are made already; over NCCL none are, and making waits for the peer
                links.abort(make_in_time(make, self._params.link_s))
            raise
        self._link = make_in_time(make, self._params.link_s)
        self._link_slot_bytes = offered.slot_bytes

    def _take_push(self, begin: Begin) -> None:
        if not 0 <= begin.first < begin.end or not begin.chunk_blocks > 0:
            raise MalformedMessage("a push of no blocks")
        if begin.chunk_blocks * self._index_bytes > self._params.max_chunk_bytes:
            raise CopyFailed(f"chunks of {begin.chunk_blocks * self._index_bytes} bytes are too large")
        if not begin.is_urgent:
            with self._writing(begin, begin.first, begin.end):
                pass  # refused before any of the shared budget is booked
        if self._segment is None:
            self._take_chunks(begin)
        else:
            self._take_slots(begin, self._segment)
        num_blocks = begin.end - begin.first
        self._frames.send(FrameKind.LANDED, Landed(num_blocks, num_blocks * self._index_bytes))

    def _take_chunks(self, begin: Begin) -> None:
        done, chunk_index = begin.first, 0
        while done < begin.end:
            self._set_stall_deadline()
            frame = self._frames.receive()
            if frame is None:
                raise ConnectionResetError("the sender closed the connection in the middle of a push")
            count = min(begin.chunk_blocks, begin.end - done)
            if frame.first != done or frame.count != count:
                raise MalformedMessage("a chunk out of order")
            self._check_kind(begin, frame)
            if not begin.is_urgent:
                self._wait_turn(count)
            self._take_chunk(begin, frame, chunk_index)
            done, chunk_index = done + count, chunk_index + 1

    def _take_slots(self, begin: Begin, segment: Segment) -> None:
        """Written out, with little in its way: a copy drives the interpreter out of the processor's cache, and what is
        called for each chunk then costs several times what it costs elsewhere."""
        frames, tickets, scatter = self._frames, self._reception.tickets, self._reception.store.scatter
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
        turn_s = self._reception.budget.take(num_blocks * self._index_bytes, now_s)
        if turn_s > now_s:
            self._reception.is_closing.wait(turn_s - now_s)
            self._set_stall_deadline()  # it was not the sender who took so long

    def _check_kind(self, begin: Begin, frame: Frame) -> None:
        """Whether this is a chunk that can come this way. Raises `MalformedMessage`."""
        num_bytes = frame.count * self._index_bytes
        if frame.kind is FrameKind.CHUNK and frame.num_bytes == num_bytes:
            return
        if frame.kind is not FrameKind.LINK_CHUNK or self._link is None or num_bytes > self._link_slot_bytes:
            raise MalformedMessage(f"{frame.kind.name} with {frame.num_bytes} bytes in a push of chunks")
        if begin.has_checksum or frame.num_bytes:
            raise MalformedMessage("a chunk from a GPU has neither a checksum nor a payload")

    def _take_chunk(self, begin: Begin, frame: Frame, chunk_index: int) -> None:
        if frame.kind is FrameKind.LINK_CHUNK:
            assert self._link is not None  # its kind was checked
            self._take_from_link(begin, frame, self._link, chunk_index)
        elif begin.has_checksum or not self._receive_in_place(begin, frame):
            if len(self._buffer) < frame.num_bytes:
                self._buffer = bytearray(frame.num_bytes)
            data = memoryview(self._buffer)[: frame.num_bytes]
            self._frames.receive_into(data)
            self._write(begin, frame, data)

    def _take_from_link(self, begin: Begin, frame: Frame, link: Link, chunk_index: int) -> None:
        """Into a slot of ours first: what is written into the blocks is wholly here, and its ticket is open."""
        with self._writing(begin, frame.first, frame.first + frame.count):
            pass  # refused before anything is taken in
        slot = chunk_index % links.NUM_SLOTS
        link.receive(slot, frame.count * self._index_bytes)
        links.wait_done(link, slot, time.monotonic() + self._params.stall_s)
        with self._writing(begin, frame.first, frame.first + frame.count) as block_ids:
            link.unpack(slot, block_ids)
        if count := num_freed(links.NUM_SLOTS, chunk_index, _num_chunks(begin)):
            self._frames.announce(FrameKind.SLOT_FREE, 0, count)

    def _receive_in_place(self, begin: Begin, frame: Frame) -> bool:
        """From the socket straight into the blocks, if the processor can address them. A close of the ticket ends the
        connection, since it must not wait for the sender."""
        if self._host_store is None:
            return False
        with self._writing(begin, frame.first, frame.first + frame.count, self._frames.interrupt) as block_ids:
            views = self._host_store.views(block_ids)
            if views is None or sum(map(len, views)) != frame.num_bytes:
                raise CopyFailed("the store's views do not fit its layout")
            self._frames.receive_pieces(views)
        return True

    def _write(self, begin: Begin, frame: Frame, data: memoryview) -> None:
        """A chunk that is wholly here. With a checksum nothing is written that does not match it."""
        if begin.has_checksum:
            _check_sum(frame, data)
        with self._writing(begin, frame.first, frame.first + frame.count) as block_ids:
            self._reception.store.scatter(block_ids, data)

    def _writing(
        self, begin: Begin, first: int, end: int, interrupt: Callable[[], None] | None = None
    ) -> AbstractContextManager[BlockTable]:
        return self._reception.tickets.writing(MigrationId(begin.migration_id), BlockRange(first, end), interrupt)


def _num_chunks(begin: Begin) -> int:
    return -(-(begin.end - begin.first) // begin.chunk_blocks)


def _check_sum(frame: Frame, data: memoryview) -> None:
    if zlib.crc32(data) != frame.crc32:
        raise CopyFailed("checksum of a chunk does not match")
