"""Which connection does a push use? One of its own, taken from the few idle ones a sender keeps for each peer."""

from __future__ import annotations

import socket
import threading
import time
from urllib.parse import urlsplit

from migration.errors import CopyFailed
from migration.transports.frames import FrameKind, FrameSocket, Hello, LinkOffered, Welcome
from migration.transports.links import Link, LinkAnswer, LinkMaker, make_in_time
from migration.transports.params import CarrierParams
from migration.transports.shm import OfferedSegment, Segment
from migration.transports.store import KVLayout


class Connection:
    """A connection that has shaken hands, with the memory its chunks are gathered into."""

    def __init__(
        self, frames: FrameSocket, segment: Segment | None, chunk_bytes: int, link: Link | None = None
    ) -> None:
        self.frames = frames
        self.segment = segment
        self.link = link
        self._chunk_bytes = chunk_bytes
        self._buffers: tuple[bytearray, ...] = ()

    def buffer(self, chunk_index: int, num_bytes: int) -> memoryview:
        """One of two buffers in turn: one is filled while the other is sent."""
        if not self._buffers:
            self._buffers = (bytearray(self._chunk_bytes), bytearray(self._chunk_bytes))
        return memoryview(self._buffers[chunk_index % 2])[:num_bytes]

    def close(self) -> None:
        """By the thread that uses it. The link first: when the peer sees the end of the connection, nothing is on its
        way into its slots any more."""
        if self.link is not None:
            self.link.abort()
        self.frames.close()


class ConnectionPool:
    """The sender's connections by peer URL; thread-safe."""

    def __init__(
        self, layout: KVLayout, token: bytes, params: CarrierParams, link_maker: LinkMaker | None = None
    ) -> None:
        self._layout = layout
        self._link_maker = link_maker
        self._token = token
        self._params = params
        self._lock = threading.Lock()
        self._idle: dict[str, list[Connection]] = {}
        self._is_closed = False

    def chunk_blocks(self, num_chunks: int = 1) -> int:
        """Block indexes of so many chunks' bytes: at least one, however large a block is, and no more than a receiver
        takes."""
        num_bytes = min(self._params.chunk_bytes * num_chunks, self._params.max_chunk_bytes)
        return max(1, num_bytes // self._layout.index_bytes)

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
            connection.close()

    def give(self, url: str, connection: Connection) -> None:
        """Keep a connection whose last push landed."""
        with self._lock:
            idle = self._idle.setdefault(url, [])
            if not self._is_closed and len(idle) < self._params.max_idle:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()

    def _connect(self, url: str, deadline_s: float) -> Connection:
        try:
            address = urlsplit(url)
            host, port = address.hostname, address.port
            if address.scheme not in ("tcp", "shm", "nccl") or host is None or port is None:
                raise CopyFailed(f"{url} is no endpoint of a block receiver")
            sock = socket.create_connection((host, port), timeout=self._params.handshake_s)
        except ValueError as error:  # the peer wrote it: a port out of range, a host that cannot be one
            raise CopyFailed(f"{url!r} is no endpoint of a block receiver: {error}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames = FrameSocket(sock)
        try:
            frames.set_deadline(deadline_s)
            if address.scheme == "nccl":
                return self._link(frames, deadline_s)
            return self._shake_hands(frames, with_segment=address.scheme == "shm")
        except BaseException:
            frames.close()
            raise

    def _shake_hands(self, frames: FrameSocket, *, with_segment: bool) -> Connection:
        slot_bytes = self.chunk_blocks(self._params.burst_chunks) * self._layout.index_bytes
        offered = OfferedSegment(self._params.num_slots, slot_bytes) if with_segment else None
        try:
            offer = None if offered is None else offered.offer
            layout = self._layout
            frames.send(FrameKind.HELLO, Hello(self._token, layout.group_block_bytes, layout.page_order, offer))
            welcome = frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome)
            if offered is not None and welcome.has_segment:
                frames.move_to(offered.accept(self._params.handshake_s))
        finally:
            if offered is not None:
                offered.close()
        segment = offered.segment if offered is not None and welcome.has_segment else None
        return Connection(frames, segment, slot_bytes)

    def _link(self, frames: FrameSocket, deadline_s: float) -> Connection:
        """Shake hands, and bring the link to the peer's GPU up while the peer does."""
        if self._link_maker is None:
            raise CopyFailed("no GPU link can be made here")
        slot_bytes = self.chunk_blocks(self._params.link_chunks) * self._layout.index_bytes
        maker, offer = self._link_maker, self._link_maker.offer(slot_bytes)
        offered = LinkOffered(offer.unique_id, offer.gpu, offer.slot_bytes)
        layout = self._layout
        hello = Hello(self._token, layout.group_block_bytes, layout.page_order, link=offered)
        frames.send(FrameKind.HELLO, hello)
        welcome = frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome)
        if welcome.link_handles is None:
            raise CopyFailed("the peer makes no GPU link")
        answer = LinkAnswer(welcome.link_handles)
        limit_s = min(self._params.link_s, deadline_s - time.monotonic())
        link = make_in_time(lambda: maker.connect(offer, answer), limit_s)
        return Connection(frames, None, slot_bytes, link)


def _is_stale(frames: FrameSocket) -> bool:
    """An idle peer has nothing to say: anything readable is its end."""
    try:
        return frames.has_input()
    except OSError:
        return True
