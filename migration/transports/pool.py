"""Which connection does a push use? One of its own, taken from the few idle ones a sender keeps for each peer."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from migration.errors import CopyFailed
from migration.transports import links
from migration.transports.frames import FrameKind, FrameSocket, Hello, LinkOffered, Welcome, tune
from migration.transports.links import Link, LinkAnswer, LinkMaker, make_in_time
from migration.transports.params import CarrierParams
from migration.transports.shm import OfferedSegment, Segment
from migration.transports.store import KVLayout

Watch = Callable[[FrameSocket | None], None]
"""Told of a socket before anything is said on it, so that it can be interrupted, and of None before it is closed. May
raise `CopyFailed`."""


class Connection:
    """A connection that has shaken hands, with the memory its chunks are gathered into."""

    def __init__(
        self, frames: FrameSocket, segment: Segment | None, chunk_bytes: int, link: Link | None = None
    ) -> None:
        self.frames = frames
        self.segment = segment
        self.link = link
        self.is_used = False
        """Whether a push has landed through it: its peer may have ended it since."""
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
        links.abort(self.link)
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

    def take(self, url: str, deadline_s: float, watch: Watch) -> Connection:
        """An idle connection to this peer, or a new one. Raises `CopyFailed`, `OSError`, `MalformedMessage`."""
        self._drop_stale()
        with self._lock:
            idle = self._idle.get(url)
            connection = idle.pop() if idle else None
        if connection is None:
            return self.connect(url, deadline_s, watch)
        try:
            watch(connection.frames)
        except CopyFailed:
            connection.close()
            raise
        return connection

    def give(self, url: str, connection: Connection) -> None:
        """Keep a connection whose last push landed."""
        connection.is_used = True
        self._drop_stale()
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

    def _drop_stale(self) -> None:
        """Close the idle connections that their peers have ended, those to peers that are never pushed to again among
        them: each holds a descriptor, and perhaps a segment or slots on a GPU."""
        with self._lock:
            stale = _ended(connection for idle in self._idle.values() for connection in idle)
            for url in list(self._idle) if stale else ():
                self._idle[url] = [connection for connection in self._idle[url] if connection not in stale]
                if not self._idle[url]:
                    del self._idle[url]
        for connection in stale:
            connection.close()

    def connect(self, url: str, deadline_s: float, watch: Watch) -> Connection:
        """A new one, that has shaken hands within `handshake_s`. Raises as `take` does."""
        shaken_s = min(deadline_s, time.monotonic() + self._params.handshake_s)
        try:
            address = urlsplit(url)
            host, port = address.hostname, address.port
            if address.scheme not in ("tcp", "shm", "nccl") or host is None or port is None:
                raise CopyFailed(f"{url} is no endpoint of a block receiver")
            limit_s = max(1e-3, shaken_s - time.monotonic())
            sock = socket.create_connection((host, port), timeout=limit_s)
        except ValueError as error:  # the peer wrote it: a port out of range, a host that cannot be one
            raise CopyFailed(f"{url!r} is no endpoint of a block receiver: {error}") from error
        frames = FrameSocket(sock)
        try:
            tune(sock)
            watch(frames)
            frames.set_deadline(shaken_s)
            if address.scheme == "nccl":
                return self._link(frames, deadline_s)
            return self._shake_hands(frames, shaken_s, with_segment=address.scheme == "shm")
        except BaseException:
            watch(None)
            frames.close()
            raise

    def _shake_hands(self, frames: FrameSocket, shaken_s: float, *, with_segment: bool) -> Connection:
        slot_bytes = self.chunk_blocks(self._params.burst_chunks) * self._layout.index_bytes
        offered = OfferedSegment(self._params.num_slots, slot_bytes) if with_segment else None
        try:
            offer = None if offered is None else offered.offer
            layout = self._layout
            frames.send(FrameKind.HELLO, Hello(self._token, layout.group_block_bytes, layout.page_order, offer))
            welcome = frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome)
            if offered is not None and welcome.has_segment:
                frames.move_to(offered.accept(max(1e-3, shaken_s - time.monotonic())))
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


def _ended(connections: Iterable[Connection]) -> list[Connection]:
    """Those of these idle ones whose peer has ended them: an idle peer has nothing to say, so anything readable is its
    end. One call of the kernel for all, since it gives up the interpreter's lock."""
    poll = select.poll()
    by_fileno = {connection.frames.fileno(): connection for connection in connections}
    for fileno in by_fileno:
        poll.register(fileno, select.POLLIN)
    return [by_fileno[fileno] for fileno, _ in poll.poll(0)]
