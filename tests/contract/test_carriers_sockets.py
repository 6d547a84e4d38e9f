"""What can only sockets suffer? Strangers, garbage, death at any point, slowness, connections and shared segments."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams, KVLayout, open_receiver, open_sender
from migration.transports.frames import (
    _HEADER,
    MAGIC,
    VERSION,
    Begin,
    FrameKind,
    FrameSocket,
    Hello,
    Landed,
    Welcome,
)
from migration.transports.receiver import SocketReceiver
from migration.types import BlockRange
from tests.support.byte_store import GROUP_BLOCK_BYTES, NUM_BLOCKS, ByteStore, MappedByteStore
from tests.support.carrier_link import (
    INDEX_BYTES,
    KINDS,
    PARAMS,
    SOCKET_KINDS,
    SOURCE_TABLE,
    TARGET_TABLE,
    TOKEN,
    Link,
    M,
    StrangeReceiver,
    read_to_end,
)


@pytest.fixture(params=list(SOCKET_KINDS.values()), ids=list(SOCKET_KINDS))
def socket_link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


def test_a_deadline_ends_a_push_whose_receiver_hangs(socket_link: Link) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    go_on = threading.Event()
    link.there.before_scatter = lambda: go_on.wait(20)
    with pytest.raises(CopyFailed):
        link.push(timeout_s=0.1)
    go_on.set()


def test_a_receiver_that_dies_in_the_middle_fails_the_push(socket_link: Link) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    assert isinstance(link.receiver, SocketReceiver)
    receiver = link.receiver

    def die() -> None:
        with receiver._lock:
            for frames in receiver._connections:
                frames.interrupt()

    link.there.before_scatter = die
    with pytest.raises(CopyFailed):
        link.push()
    link.there.before_scatter = lambda: None
    link.push()
    assert link.num_equal() == 40


SENDER_DEATHS = (
    "before its hello",
    "after its hello",
    "after begin",
    "in a header",
    "in a chunk",
    "between chunks",
    "at the end",
)


@pytest.mark.parametrize("point", SENDER_DEATHS)
def test_a_sender_may_die_at_any_point_and_its_ticket_can_be_closed(socket_link: Link, point: str) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    assert isinstance(link.receiver, SocketReceiver)
    if point == "before its hello":
        link.connect().close()
    else:
        _die(link.shake_hands(), point)
    while link.receiver.num_connections:  # the receiver notices by itself
        threading.Event().wait(0.001)
    link.receiver.tickets.check_integrity()
    link.receiver.close_ticket(M)
    assert len(link.there.scattered) <= {"at the end": 2, "in a chunk": 1, "between chunks": 1}.get(point, 0)
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40


def _die(frames: FrameSocket, point: str) -> None:
    """Get so far in a push of two chunks of 4, and no further."""
    chunk = (memoryview(bytes(4 * INDEX_BYTES)),)
    if point != "after its hello":
        frames.send(FrameKind.BEGIN, Begin("m", 0, 8, 4, False))
    match point:
        case "in a header":
            frames._sock.sendall(b"KVF\x01\x04\x00")
        case "in a chunk":
            frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.CHUNK, 4 * INDEX_BYTES, 0, 4, 0) + bytes(100))
        case "between chunks":
            frames.send_chunk(FrameKind.CHUNK, 0, 4, 0, chunk)
        case "at the end":
            frames.send_chunk(FrameKind.CHUNK, 0, 4, 0, chunk)
            frames.send_chunk(FrameKind.CHUNK, 4, 4, 0, chunk)
    frames.close()


RECEIVER_DEATHS = (
    "at the hello",
    "after its welcome",
    "after begin",
    "in a chunk",
    "after the last chunk",
    "in landed",
)


@pytest.mark.parametrize("point", RECEIVER_DEATHS)
@pytest.mark.parametrize("store", [ByteStore, MappedByteStore], ids=["with a buffer", "in place"])
def test_a_receiver_may_die_at_any_point_and_the_push_fails(store: type[ByteStore], point: str) -> None:
    def story(frames: FrameSocket) -> None:
        steps = RECEIVER_DEATHS.index(point)
        frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
        if steps >= 1:
            frames.send(FrameKind.WELCOME, Welcome(has_segment=False))
        if steps >= 2:
            frames.receive_control(frames.expect(FrameKind.BEGIN), Begin)
        if steps >= 3:
            frames.expect(FrameKind.CHUNK)
            frames.receive_into(memoryview(bytearray(100 if steps == 3 else 4 * INDEX_BYTES)))
        if steps >= 4:
            frames.expect(FrameKind.CHUNK)
            frames.receive_into(memoryview(bytearray(4 * INDEX_BYTES)))
        if steps >= 5:
            frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.LANDED, 100, 0, 0, 0) + b"\x82")

    receiver, sender = StrangeReceiver(story), open_sender(store(1), TOKEN, PARAMS)
    with pytest.raises(CopyFailed, match=r"clos|reset|Broken"):
        sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20)
    assert sender.num_idle_connections == 0
    receiver.join()
    sender.close()


def test_a_receiver_that_lives_through_the_same_story_lets_the_push_land() -> None:
    def story(frames: FrameSocket) -> None:
        frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
        frames.send(FrameKind.WELCOME, Welcome(has_segment=False))
        frames.receive_control(frames.expect(FrameKind.BEGIN), Begin)
        for _ in range(2):
            frames.expect(FrameKind.CHUNK)
            frames.receive_into(memoryview(bytearray(4 * INDEX_BYTES)))
        frames.send(FrameKind.LANDED, Landed(8, 8 * INDEX_BYTES))

    receiver, sender = StrangeReceiver(story), open_sender(ByteStore(1), TOKEN, PARAMS)
    assert sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20).num_blocks == 8
    receiver.join()
    sender.close()


def test_closing_a_ticket_does_not_wait_for_a_sender_that_stalls_in_a_chunk(socket_link: Link) -> None:
    """1. A sender sends half a chunk, then nothing. 2. Where blocks are written in place, that write is under way.
    3. The ticket is closed: the connection ends, and the close does not last as long as the sender might."""
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    frames = link.shake_hands()
    frames.send(FrameKind.BEGIN, Begin("m", 0, 8, 4, False))
    frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.CHUNK, 4 * INDEX_BYTES, 0, 4, 0) + bytes(100))
    while link.kind.is_mapped and not link.there.scattered:
        threading.Event().wait(0.001)
    begun_s = time.monotonic()
    link.receiver.close_ticket(M)
    assert time.monotonic() - begun_s < PARAMS.stall_s / 2
    frames.close()


def test_a_sender_that_says_nothing_more_is_given_up() -> None:
    for kind in SOCKET_KINDS.values():
        link = Link(kind, CarrierParams(chunk_bytes=512, stall_s=0.05))
        link.receiver.open(M, TARGET_TABLE)
        frames = link.shake_hands()
        frames.send(FrameKind.BEGIN, Begin("m", 0, 8, 4, False))
        frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.CHUNK, 4 * INDEX_BYTES, 0, 4, 0) + bytes(100))
        assert read_to_end(frames._sock) == b""  # it hangs up; without a bound this would last until the test's limit
        frames.close()
        link.close()


def test_a_trickle_does_not_move_the_deadline() -> None:
    """A receiver that says a byte now and then makes progress for ever, but not for longer than the push may last."""
    is_over = threading.Event()

    def story(frames: FrameSocket) -> None:
        frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
        frames.send(FrameKind.WELCOME, Welcome(has_segment=False))
        frames.receive_control(frames.expect(FrameKind.BEGIN), Begin)
        frames.receive_into(memoryview(bytearray(frames.expect(FrameKind.CHUNK).num_bytes)))
        frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.LANDED, 60_000, 0, 0, 0))
        with contextlib.suppress(OSError):  # the sender hangs up
            while not is_over.wait(0.01):
                frames._sock.sendall(b"x")

    receiver, sender = StrangeReceiver(story), open_sender(ByteStore(1), TOKEN, PARAMS)
    begun_s = time.monotonic()
    with pytest.raises(CopyFailed, match="deadline"):
        sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=0.5)
    assert time.monotonic() - begun_s < 5
    is_over.set()
    receiver.join()
    sender.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        os.urandom(4096),
        b"KVF\x02" + bytes(40),
        b"KVF\x01\x63" + bytes(40),
        b"KVF\x01\x01" + b"\xff" * 40,
    ],
    ids=["http", "random", "other-version", "unknown-kind", "huge-hello"],
)
def test_garbage_closes_its_own_connection_only(socket_link: Link, garbage: bytes) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    with link.connect() as stranger:
        stranger.settimeout(20)
        stranger.sendall(garbage)
        assert read_to_end(stranger) == b""
    link.push()
    assert link.num_equal() == 40


@pytest.mark.parametrize(
    ("first", "count", "num_blocks"), [(4, 4, 4), (0, 40, 40), (0, 4, 3)], ids=["not-next", "too-many", "too-short"]
)
def test_a_chunk_that_is_not_the_expected_one_is_not_written(
    socket_link: Link, first: int, count: int, num_blocks: int
) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    frames = link.shake_hands()
    frames.send(FrameKind.BEGIN, Begin("m", 0, 40, 4, False))
    frames.send_chunk(FrameKind.CHUNK, first, count, 0, (memoryview(bytes(num_blocks * INDEX_BYTES)),))
    frames.set_deadline(time.monotonic() + 20)
    with pytest.raises((OSError, CopyFailed)):
        frames.expect(FrameKind.LANDED)
    assert not link.there.scattered
    frames.close()


def test_a_peer_whose_pages_come_in_another_order_is_refused(socket_link: Link) -> None:
    store = ByteStore(1)
    store.layout = KVLayout(GROUP_BLOCK_BYTES, NUM_BLOCKS, page_order="BL")
    other = open_sender(store, TOKEN, PARAMS)
    with pytest.raises(CopyFailed, match="another order"):
        other.push(M, socket_link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    other.close()


def test_a_peer_with_other_blocks_is_refused(socket_link: Link) -> None:
    other = open_sender(ByteStore(1, (64, 64)), TOKEN, PARAMS)
    with pytest.raises(CopyFailed, match="another size"):
        other.push(M, socket_link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    other.close()


def test_a_connection_is_used_again_and_renewed_when_the_peer_has_closed_it(socket_link: Link) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    link.push()
    assert link.sender.num_idle_connections == 1
    assert isinstance(link.receiver, SocketReceiver) and link.receiver.num_connections == 1
    for frames in list(link.receiver._connections):
        frames.interrupt()
    while link.receiver.num_connections:
        threading.Event().wait(0.001)
    link.push()
    assert link.num_equal() == 40


def test_a_receiver_serves_no_more_connections_than_its_bound() -> None:
    link = Link(KINDS["tcp"], CarrierParams(chunk_bytes=512, max_connections=1))
    link.receiver.open(M, TARGET_TABLE)
    second = open_sender(link.here, TOKEN, PARAMS)
    with link.held(link.push) as (pushing, go_on):
        with pytest.raises(CopyFailed, match="takes no more connections"):
            second.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
        go_on.set()
        pushing.result(20)
    assert link.num_equal() == 40
    second.close()
    link.close()


@pytest.mark.parametrize(
    "url",
    [
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:port",
        "tcp://[::1",
        f"tcp://{'a' * 70}.b:1",
        "tcp://a\x00b:1",
        "shm://127.0.0.1",
        "nccl://127.0.0.1:1",
        "",
    ],
)
def test_a_url_that_is_none_fails_the_push_and_nothing_else(socket_link: Link, url: str) -> None:
    link = socket_link
    with pytest.raises(CopyFailed):
        link.sender.push(M, url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40


def test_a_segment_that_cannot_be_shared_falls_back_to_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migration.transports.serving.map_segment", lambda *_: None)  # as from another host
    link = Link(KINDS["shm"])
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40
    link.close()


def test_a_segment_leaves_nothing_in_the_file_system() -> None:
    before = set(os.listdir("/dev/shm"))
    link = Link(KINDS["shm"])
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "kvferry" in name}
    link.close()


def test_an_unknown_scheme_has_no_carrier() -> None:
    with pytest.raises(ValueError, match="no carrier"):
        open_receiver(ByteStore(1), "nccl://0", TOKEN, PARAMS)
