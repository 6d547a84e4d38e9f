"""What do the carrier tests share? A sender and a receiver with a store each, and strangers who speak in frames."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from migration.transports import BlockReceiver, BlockSender, CarrierParams, MemoryHub, open_receiver, open_sender
from migration.transports.frames import Begin, FrameKind, FrameSocket, Hello, Landed, Welcome
from migration.transports.shm import OfferedSegment
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId
from tests.support.byte_store import GROUP_BLOCK_BYTES, ByteStore, MappedByteStore
from tests.support.fake_link import FakeGpus, FakeLinkMaker

M = MigrationId("m")
TOKEN = b"secret"
INDEX_BYTES = sum(GROUP_BLOCK_BYTES)
PARAMS = CarrierParams(chunk_bytes=512, num_slots=2, burst_chunks=1, in_place_chunks=1, link_chunks=1)
"""4 block indexes a chunk."""
SOURCE_TABLE: BlockTable = (tuple(range(10, 50)), tuple(range(100, 140)))
TARGET_TABLE: BlockTable = (tuple(range(200, 160, -1)), tuple(range(0, 80, 2)))


@dataclass(frozen=True, slots=True)
class Kind:
    """A carrier, over memory that sockets may or may not read and write themselves."""

    url: str
    is_mapped: bool = False
    is_direct: bool = False


KINDS = {
    "memory": Kind("memory://there"),
    "tcp": Kind("tcp://127.0.0.1"),
    "tcp-in-place": Kind("tcp://127.0.0.1", is_mapped=True),
    "shm": Kind("shm://127.0.0.1"),
    "nccl": Kind("nccl://127.0.0.1"),
    "nccl-one-gpu": Kind("nccl://127.0.0.1", is_direct=True),
}
"""The last two over fake links: GPUs are not needed for anything that is asked of all carriers."""
SOCKET_KINDS = {name: kind for name, kind in KINDS.items() if kind.url.startswith(("tcp", "shm"))}


class Link:
    """A sender and a receiver with a store each."""

    def __init__(self, kind: Kind, params: CarrierParams = PARAMS, sender_token: bytes = TOKEN) -> None:
        self.kind = kind
        make = MappedByteStore if kind.is_mapped else ByteStore
        self.here, self.there = make(1), make(2)
        self.hub, self.gpus = MemoryHub(), FakeGpus()
        self.maker: FakeLinkMaker | None = None
        self.maker_there: FakeLinkMaker | None = None
        if kind.url.startswith("nccl"):
            self.maker = FakeLinkMaker(self.here, self.gpus)
            self.maker_there = FakeLinkMaker(self.there, self.gpus, is_direct=kind.is_direct)
        self.receiver: BlockReceiver = open_receiver(self.there, kind.url, TOKEN, params, self.hub, self.maker_there)
        self.sender: BlockSender = open_sender(self.here, sender_token, params, self.hub, self.maker)

    def push(
        self, first: int = 0, end: int = 40, migration_id: MigrationId = M, timeout_s: float = 20.0, urgent: bool = True
    ) -> CopyReceipt:
        blocks = BlockRange(first, end)
        return self.sender.push(
            migration_id, self.receiver.url, SOURCE_TABLE, blocks, timeout_s=timeout_s, urgent=urgent
        )

    def wait_for_blocks(self, first: int, end: int, timeout_s: float = 20.0) -> None:
        """Until these have arrived; nothing tells when. Raises `TimeoutError`."""
        deadline_s = time.monotonic() + timeout_s
        while self.num_equal(first, end) < end - first:
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"blocks {first}..{end} have not arrived")
            time.sleep(0.001)

    @contextmanager
    def held(self, push: Callable[[], CopyReceipt]) -> Iterator[tuple[Future[CopyReceipt], threading.Event]]:
        """A push that stands in its scatter until the event is set, as it must be before the end."""
        entered, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            assert go_on.wait(20)

        self.there.before_scatter = hold
        with ThreadPoolExecutor(1) as threads:
            pushing = threads.submit(push)
            assert entered.wait(20)
            yield pushing, go_on

    def num_equal(self, first: int = 0, end: int = 40) -> int:
        return sum(
            all(
                self.here.blocks[group][SOURCE_TABLE[group][index]]
                == self.there.blocks[group][TARGET_TABLE[group][index]]
                for group in range(2)
            )
            for index in range(first, end)
        )

    def connect(self) -> socket.socket:
        """A stranger's connection to the receiver."""
        host, port = self.receiver.url.split("://")[1].split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def shake_hands(self, offered: OfferedSegment | None = None) -> FrameSocket:
        """A connection that has been let in, to speak frames by hand; 20 s for all that follows."""
        frames = FrameSocket(self.connect())
        frames.set_deadline(time.monotonic() + 20)
        offer = None if offered is None else offered.offer
        frames.send(FrameKind.HELLO, Hello(TOKEN, GROUP_BLOCK_BYTES, segment=offer))
        assert frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome).has_segment is (offer is not None)
        if offered is not None:
            frames.move_to(offered.accept(20))
        return frames

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


class StrangeReceiver:
    """Listens like a receiver and does with one connection after the other what the test says; each ends then."""

    def __init__(self, *stories: Callable[[FrameSocket], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stories = stories
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def join(self) -> None:
        self._thread.join(20)
        self._listener.close()

    def _serve(self) -> None:
        for story in self._stories:
            sock, _ = self._listener.accept()
            frames = FrameSocket(sock)
            frames.set_deadline(time.monotonic() + 20)
            try:
                story(frames)
            finally:
                frames.close()


def take_push(frames: FrameSocket) -> None:
    """What a receiver without a ticket's table does with a push through the socket."""
    begin = frames.receive_control(frames.expect(FrameKind.BEGIN), Begin)
    num_blocks, num_bytes = begin.end - begin.first, 0
    while num_bytes < num_blocks * INDEX_BYTES:
        chunk = frames.expect(FrameKind.CHUNK)
        frames.receive_into(memoryview(bytearray(chunk.num_bytes)))
        num_bytes += chunk.num_bytes
    frames.send(FrameKind.LANDED, Landed(num_blocks, num_bytes))


def welcome(frames: FrameSocket) -> None:
    frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
    frames.send(FrameKind.WELCOME, Welcome(has_segment=False))


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except ConnectionResetError:
        pass  # it closed with our garbage unread
    return data
