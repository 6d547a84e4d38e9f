"""Which connection does a push use? One of its own, taken from the few idle ones a sender keeps for each peer."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit

from migration.errors import CopyFailed
from migration.transports.frames import FrameKind, FrameSocket, Hello, Welcome
from migration.transports.params import CarrierParams
from migration.transports.shm import OfferedSegment, Segment
from migration.transports.store import KVLayout


class Connection:
    """A connection that has shaken hands, with the memory its chunks are gathered into."""

    def __init__(self, frames: FrameSocket, segment: Segment | None, chunk_bytes: int) -> None:
        self.frames = frames
        self.segment = segment
        self._chunk_bytes = chunk_bytes
        self._buffers: tuple[bytearray, ...] = ()

    def buffer(self, chunk_index: int, num_bytes: int) -> memoryview:
        """One of two buffers in turn: one is filled while the other is sent."""
        if not self._buffers:
            self._buffers = (bytearray(self._chunk_bytes), bytearray(self._chunk_bytes))
        return memoryview(self._buffers[chunk_index % 2])[:num_bytes]


class ConnectionPool:
    """The sender's connections by peer URL; thread-safe."""

    def __init__(self, layout: KVLayout, token: bytes, params: CarrierParams) -> None:
        self._layout = layout
        self._token = token
        self._params = params
        self._lock = threading.Lock()
        self._idle: dict[str, list[Connection]] = {}
        self._is_closed = False

    @property
    def chunk_blocks(self) -> int:
        """Block indexes of a chunk: at least one, however large a block is."""
        return max(1, self._params.chunk_bytes // self._layout.index_bytes)

    @property
    def num_idle(self) -> int:
        with self._lock:
            return sum(len(idle) for idle in self._idle.values())

    def take(self, url: str, deadline_s: float) -> Connection:
        """An idle connection to this peer, or a new one. Raises `CopyFailed`, `OSError`, `MalformedMessage`."""
        while True:
            with self._lock:
                idle = self._idle.get(url)
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connect(url, deadline_s)
            if not _is_stale(connection.frames):
                return connection
            connection.frames.close()

    def give(self, url: str, connection: Connection) -> None:
        """Keep a connection whose last push landed."""
        with self._lock:
            idle = self._idle.setdefault(url, [])
            if not self._is_closed and len(idle) < self._params.max_idle:
                idle.append(connection)
                return
        connection.frames.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.frames.close()

    def _connect(self, url: str, deadline_s: float) -> Connection:
        try:
            address = urlsplit(url)
            host, port = address.hostname, address.port
            if address.scheme not in ("tcp", "shm") or host is None or port is None:
                raise CopyFailed(f"{url} is no endpoint of a block receiver")
            sock = socket.create_connection((host, port), timeout=self._params.handshake_s)
        except ValueError as error:  # the peer wrote it: a port out of range, a host that cannot be one
            raise CopyFailed(f"{url!r} is no endpoint of a block receiver: {error}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames = FrameSocket(sock)
        try:
            frames.set_deadline(deadline_s)
            return self._shake_hands(frames, with_segment=address.scheme == "shm")
        except BaseException:
            frames.close()
            raise

    def _shake_hands(self, frames: FrameSocket, *, with_segment: bool) -> Connection:
        slot_bytes = self.chunk_blocks * self._layout.index_bytes
        offered = OfferedSegment(self._params.num_slots, slot_bytes) if with_segment else None
        try:
            offer = None if offered is None else offered.offer
            frames.send(FrameKind.HELLO, Hello(self._token, self._layout.group_block_bytes, offer))
            welcome = frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome)
        finally:
            if offered is not None:
                offered.close()
        segment = offered.segment if offered is not None and welcome.has_segment else None
        return Connection(frames, segment, slot_bytes)


def _is_stale(frames: FrameSocket) -> bool:
    """An idle peer has nothing to say: anything readable is its end."""
    try:
        return frames.has_input()
    except OSError:
        return True
