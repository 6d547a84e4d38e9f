"""Who takes blocks in? The receiving end of one rank: a server thread, a thread a connection, and the tickets."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
import time
import zlib

from migration.errors import CopyFailed, MalformedMessage
from migration.transports.frames import Begin, Failed, Frame, FrameKind, FrameSocket, Hello, Landed, Welcome
from migration.transports.params import CarrierParams
from migration.transports.shm import Segment, map_segment
from migration.transports.store import KVStore
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
    """Serves ``tcp://`` and ``shm://`` senders on one listening socket."""

    def __init__(self, store: KVStore, scheme: str, host: str, token: bytes, params: CarrierParams) -> None:
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        super().__init__(store, f"{scheme}://{host}:{self._listener.getsockname()[1]}", token, params)
        self._params = params
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
            connections = dict(self._connections)
        # Wakes the acceptor; platforms that refuse this on a listening socket wake it by the close.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for frames in connections:
            frames.close()
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
        try:
            connection = _Connection(self, frames, self._params)
            connection.serve()
        except MalformedMessage as error:
            _LOG.warning("closed a block connection: %s", error)
        except OSError as error:
            _LOG.info("lost a block connection: %s", error)
        finally:
            frames.close()
            with self._lock:
                del self._connections[frames]


class _Connection:
    """One sender's connection: the handshake, then push after push."""

    def __init__(self, receiver: BlockReceiver, frames: FrameSocket, params: CarrierParams) -> None:
        self._receiver = receiver
        self._frames = frames
        self._params = params
        self._index_bytes = receiver.store.layout.index_bytes
        self._segment: Segment | None = None
        self._buffer = bytearray()

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
        if hello.segment is not None:
            self._segment = map_segment(hello.segment, self._params.max_segment_bytes)
        self._frames.send(FrameKind.WELCOME, Welcome(has_segment=self._segment is not None))

    def _take_push(self, begin: Begin) -> None:
        if not 0 <= begin.first < begin.end or not begin.chunk_blocks > 0:
            raise MalformedMessage("a push of no blocks")
        if begin.chunk_blocks * self._index_bytes > self._params.max_chunk_bytes:
            raise CopyFailed(f"chunks of {begin.chunk_blocks * self._index_bytes} bytes are too large")
        done, chunk_index = begin.first, 0
        while done < begin.end:
            self._frames.set_deadline(time.monotonic() + self._params.stall_s)
            frame = self._frames.receive()
            if frame is None:
                raise ConnectionResetError("the sender closed the connection in the middle of a push")
            count = min(begin.chunk_blocks, begin.end - done)
            if frame.first != done or frame.count != count:
                raise MalformedMessage("a chunk out of order")
            self._take_chunk(begin, frame, chunk_index)
            done, chunk_index = done + count, chunk_index + 1
        num_blocks = begin.end - begin.first
        self._frames.send(FrameKind.LANDED, Landed(num_blocks, num_blocks * self._index_bytes))

    def _take_chunk(self, begin: Begin, frame: Frame, chunk_index: int) -> None:
        num_bytes = frame.count * self._index_bytes
        if frame.kind is FrameKind.CHUNK and frame.num_bytes == num_bytes:
            if len(self._buffer) < num_bytes:
                self._buffer = bytearray(num_bytes)
            data = memoryview(self._buffer)[:num_bytes]
            self._frames.receive_into(data)
        elif frame.kind is FrameKind.SLOT_CHUNK and self._segment is not None and num_bytes <= self._segment.slot_bytes:
            data = self._segment.slot(chunk_index, num_bytes)
        else:
            raise MalformedMessage(f"{frame.kind.name} with {frame.num_bytes} bytes in a push of chunks")
        if begin.has_checksum and zlib.crc32(data) != frame.crc32:
            raise CopyFailed("checksum of a chunk does not match")
        blocks = BlockRange(frame.first, frame.first + frame.count)
        with self._receiver.tickets.writing(MigrationId(begin.migration_id), blocks) as block_ids:
            self._receiver.store.scatter(block_ids, data)
        if self._segment is not None and frame.kind is FrameKind.SLOT_CHUNK:
            reused_at = blocks.first + self._segment.num_slots * begin.chunk_blocks
            if reused_at < begin.end:
                self._frames.send(FrameKind.SLOT_FREE)
