"""What do hostile bytes do to a block carrier? They end their own connection; no block outside the ticket changes.

The bytes are a real push, recorded between a real sender and a real receiver, then damaged, cut, lied about, shuffled.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from migration.errors import CopyFailed, MalformedMessage
from migration.transports import BlockReceiver, CarrierParams, open_receiver, open_sender
from migration.transports.frames import (
    HEADER_BYTES,
    Begin,
    Failed,
    FrameKind,
    FrameSocket,
    Hello,
    Landed,
    Welcome,
)
from migration.transports.receiver import SocketReceiver
from migration.types import BlockRange, BlockTable, MigrationId
from tests.support.byte_store import GROUP_BLOCK_BYTES, ByteStore
from tests.support.mutate import Mutator

M = MigrationId("m")
TOKEN = b"secret"
PARAMS = CarrierParams(chunk_bytes=512, num_slots=2, stall_s=5.0, handshake_s=5.0)
SOURCE: BlockTable = (tuple(range(10, 22)), tuple(range(100, 112)))
TARGET: BlockTable = (tuple(range(200, 188, -1)), tuple(range(0, 24, 2)))
LIES = (0, 1, 3, 4, 5, 11, 12, 13, 255, 65_536, 65_537, 2**31 - 1, 2**31, 2**32 - 1)
CONTROL: dict[FrameKind, Any] = {FrameKind.HELLO: Hello, FrameKind.WELCOME: Welcome, FrameKind.BEGIN: Begin}
CONTROL |= {FrameKind.LANDED: Landed, FrameKind.FAILED: Failed}


def push(store: ByteStore, url: str, first: int = 0, end: int = 12) -> None:
    sender = open_sender(store, TOKEN, PARAMS)
    try:
        sender.push(M, url, SOURCE, BlockRange(first, end), timeout_s=10, urgent=True)
    finally:
        sender.close()


@contextlib.contextmanager
def server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listening socket, one connection at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed: the end
                while True:
                    connection = listener.accept()[0]
                    with connection, contextlib.suppress(OSError):
                        handle(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@contextlib.contextmanager
def receiver_of(store: ByteStore, scheme: str = "tcp") -> Iterator[BlockReceiver]:
    receiver = open_receiver(store, f"{scheme}://127.0.0.1", TOKEN, PARAMS)
    try:
        receiver.open(M, TARGET)
        yield receiver
    finally:
        receiver.close()


def connect(url: str) -> socket.socket:
    host, port = url.split("://")[1].split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def recorded() -> tuple[list[bytes], list[bytes]]:
    """The frames of one whole push: what the sender says, what the receiver says."""
    said: tuple[bytearray, bytearray] = (bytearray(), bytearray())

    def relay(here: socket.socket, there: socket.socket, heard: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(1 << 16):
                heard.extend(data)
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)

    with receiver_of(ByteStore(2)) as receiver:

        def handle(near: socket.socket) -> None:
            with connect(receiver.url) as far:
                back = threading.Thread(target=relay, args=(far, near, said[1]))
                back.start()
                relay(near, far, said[0])
                back.join(10)

        with server(handle) as url:
            push(ByteStore(1), url)
    return frames_in(bytes(said[0])), frames_in(bytes(said[1]))


def frames_in(data: bytes) -> list[bytes]:
    frames = []
    while data:
        end = HEADER_BYTES + struct.unpack_from("!I", data, 8)[0]
        frames.append(data[:end])
        data = data[end:]
    return frames


def lied(mutator: Mutator, frame: bytes) -> bytes:
    """A header that says something else of its payload, or a payload with one other value and a true header."""
    kind = frame[4]
    if kind in CONTROL and len(frame) > HEADER_BYTES and mutator.rng.random() < 0.6:
        payload = msgspec.msgpack.encode(mutator.another(msgspec.msgpack.decode(frame[HEADER_BYTES:])))
        return frame[:8] + struct.pack("!I", len(payload)) + frame[12:HEADER_BYTES] + payload
    data = bytearray(frame)
    if mutator.rng.random() < 0.2:
        data[4] = mutator.rng.randrange(12)
    else:
        struct.pack_into("!I", data, mutator.rng.choice((8, 12, 16, 20)), mutator.rng.choice(LIES))
    return bytes(data)


def session(mutator: Mutator, frames: list[bytes]) -> bytes:
    """A push with something wrong."""
    rng, sound, frames = mutator.rng, frames, list(frames)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(frames))
        match rng.randrange(6):
            case 0:
                del frames[at]
            case 1:
                frames.insert(at, rng.choice(frames))
            case 2:
                frames[at] = mutator.damaged(frames[at])
            case 3:
                frames[at:] = [frames[at][: rng.randrange(len(frames[at]))]]
            case _ if frames[at] in sound:
                frames[at] = lied(mutator, frames[at])
            case _:
                frames[at] = mutator.damaged(frames[at])
        if not frames:
            break
    return b"".join(frames)


def all_said(url: str, data: bytes) -> bytes:
    """Say it, say no more, and hear the other side out."""
    heard = b""
    with connect(url) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                heard += part
        except TimeoutError:
            raise
        except OSError:
            pass  # it has closed with our words unread
    return heard


def outside(store: ByteStore) -> list[bytes]:
    """Every block no ticket names."""
    return [
        bytes(block)
        for group, blocks in enumerate(store.blocks)
        for number, block in enumerate(blocks)
        if number not in TARGET[group]
    ]


def is_landed(here: ByteStore, there: ByteStore) -> bool:
    return all(
        here.blocks[group][SOURCE[group][index]] == there.blocks[group][TARGET[group][index]]
        for group in range(len(GROUP_BLOCK_BYTES))
        for index in range(12)
    )


@pytest.fixture(scope="module")
def tape() -> tuple[list[bytes], list[bytes]]:
    return recorded()


Tape = tuple[list[bytes], list[bytes]]


def test_the_recorded_push_is_a_whole_one(tape: Tape) -> None:
    """The control: said again as it was, it lands."""
    here, there = ByteStore(1), ByteStore(2)
    before = outside(there)
    with receiver_of(there) as receiver:
        assert not is_landed(here, there)
        heard = all_said(receiver.url, b"".join(tape[0]))
    assert is_landed(here, there) and outside(there) == before
    assert [frame[4] for frame in frames_in(heard)] == [frame[4] for frame in tape[1]]
    assert len(tape[0]) >= 4, "hello, begin, chunks"


@pytest.mark.parametrize(("scheme", "num_sessions"), [("tcp", 1_200), ("shm", 200)])
def test_fourteen_hundred_hostile_pushes_write_nothing_outside_the_ticket(
    tape: Tape, scheme: str, num_sessions: int
) -> None:
    mutator = Mutator(3, tape[0])
    here, there = ByteStore(1), ByteStore(2)
    before, heard = outside(there), Counter[str]()
    with receiver_of(there, scheme) as receiver:
        assert isinstance(receiver, SocketReceiver)
        for _ in range(num_sessions):
            answer = frames_in(all_said(receiver.url, session(mutator, tape[0])))
            heard["/".join(FrameKind(frame[4]).name for frame in answer)] += 1
        assert outside(there) == before
        for group in range(len(GROUP_BLOCK_BYTES)):
            for number in TARGET[group]:
                there.blocks[group][number][:] = bytes(GROUP_BLOCK_BYTES[group])
        assert not is_landed(here, there)
        push(here, receiver.url)
        assert is_landed(here, there) and outside(there) == before
        receiver.tickets.check_integrity()
        receiver.close_ticket(M)  # nothing is being written for ever
    # The control: the receiver refused, closed, and also took what was still a push.
    assert heard[""] and heard["WELCOME"] and heard["WELCOME/FAILED"] and heard["WELCOME/LANDED"], heard


def test_five_hundred_hostile_answers_fail_the_push_at_worst(tape: Tape) -> None:
    mutator, here = Mutator(4, tape[1]), ByteStore(1)
    ends: Counter[str] = Counter()
    answers = [session(mutator, tape[1]) for _ in range(500)]
    left = iter(answers)

    def handle(connection: socket.socket) -> None:
        connection.settimeout(10)
        connection.sendall(next(left))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass

    with server(handle) as url:
        for _ in answers:
            try:
                push(here, url)
                ends["taken"] += 1
            except CopyFailed:
                ends["failed"] += 1
    assert ends["failed"] > 200 and ends.total() == 500, ends


def test_six_thousand_hostile_frames_are_read_or_refused(tape: Tape) -> None:
    frames = [*tape[0], *tape[1]]
    mutator, read = Mutator(5, frames), Counter[str]()
    for _ in range(6_000):
        frame = mutator.rng.choice(frames)
        frame = lied(mutator, frame) if mutator.rng.random() < 0.5 else mutator.damaged(frame)
        here, there = socket.socketpair()
        with here, there:
            here.sendall(frame)
            here.shutdown(socket.SHUT_WR)
            read[one_read(FrameSocket(there))] += 1
    assert min(read[how] for how in ("nothing", "control", "chunk", "refused", "cut")) > 0, read


def one_read(frames: FrameSocket) -> str:
    """Whatever else these raise is a failure."""
    try:
        frame = frames.receive()
        if frame is None:
            return "nothing"
        if frame.kind in CONTROL:
            frames.receive_control(frame, CONTROL[frame.kind])
            return "control"
        frames.receive_into(memoryview(bytearray(min(frame.num_bytes, 4096))))
        return "chunk"
    except MalformedMessage:
        return "refused"
    except ConnectionResetError:
        return "cut"
