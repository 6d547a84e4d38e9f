"""How does a connection begin and end? Its own limits, a peer that is not there, room for others, errors of a store."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from migration.errors import CopyFailed
from migration.transports import BlockSender, CarrierParams, open_receiver, open_sender
from migration.transports.frames import _HEADER, MAGIC, VERSION, FrameKind, FrameSocket, Hello
from migration.transports.receiver import SocketReceiver
from migration.transports.shm import OfferedSegment, map_segment
from migration.types import BlockRange, MigrationId
from tests.support.byte_store import ByteStore
from tests.support.carrier_link import (
    KINDS,
    PARAMS,
    SOCKET_KINDS,
    SOURCE_TABLE,
    TARGET_TABLE,
    TOKEN,
    Kind,
    Link,
    M,
    StrangeReceiver,
    read_to_end,
    take_push,
    welcome,
)

LONG_S = 60.0
"""Far longer than any of these tests may take."""


def wait_until_idle(receiver: SocketReceiver, num_idle: int) -> None:
    while receiver.num_idle_connections != num_idle:
        threading.Event().wait(0.001)


def served(link: Link) -> SocketReceiver:
    assert isinstance(link.receiver, SocketReceiver)
    return link.receiver


def test_a_handshake_that_nobody_answers_ends_after_its_own_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = open_sender(ByteStore(1), TOKEN, CarrierParams(handshake_s=0.1))
        url = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        begun_s = time.monotonic()
        with pytest.raises(CopyFailed, match="deadline"):
            sender.push(M, url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=LONG_S / 4)
        assert time.monotonic() - begun_s < LONG_S / 8
        sender.close()


def test_connecting_ends_at_the_deadline_of_the_push() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as others:
        for _ in range(4):  # the kernel answers no more of them
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        sender = open_sender(ByteStore(1), TOKEN, CarrierParams(handshake_s=LONG_S))
        begun_s = time.monotonic()
        with pytest.raises(CopyFailed, match="timed out"):
            sender.push(M, f"tcp://127.0.0.1:{full.getsockname()[1]}", SOURCE_TABLE, BlockRange(0, 4), timeout_s=0.1)
        assert time.monotonic() - begun_s < LONG_S / 2
        sender.close()


@pytest.mark.parametrize("is_closed", [False, True], ids=["broken-off", "sender-closed"])
def test_a_push_ends_at_once_though_its_peer_does_not_answer_the_hello(is_closed: bool) -> None:
    has_hello = threading.Event()

    def story(frames: FrameSocket) -> None:
        frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
        has_hello.set()
        assert frames.receive() is None  # until the sender ends it

    receiver = StrangeReceiver(story)
    sender: BlockSender = open_sender(ByteStore(1), TOKEN, CarrierParams(handshake_s=LONG_S))
    with ThreadPoolExecutor(1) as threads:
        pushing = threads.submit(
            sender.push, M, receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=LONG_S, urgent=True
        )
        assert has_hello.wait(20)
        sender.close() if is_closed else sender.break_off(M)
        with pytest.raises(CopyFailed, match="broken off"):
            pushing.result(10)
    receiver.join()
    sender.close()


def test_an_accept_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. The receiver waits in an accept. 2. The next one finds no descriptor. 3. The one after it serves again."""
    link = Link(KINDS["tcp"], CarrierParams(handshake_s=2.0))
    link.receiver.open(M, TARGET_TABLE)
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def fail_once(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail_once)
    first = link.shake_hands()
    link.push()
    assert link.num_equal() == 40 and not failures
    first.close()
    link.close()


def test_a_thread_that_cannot_be_started_refuses_its_own_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(KINDS["tcp"])
    link.receiver.open(M, TARGET_TABLE)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CopyFailed, match="takes no more connections"):
            link.push()
        assert served(link).num_connections == 0
    link.push()
    assert link.num_equal() == 40
    link.close()


def test_the_connection_that_is_idle_longest_makes_room_for_a_new_one() -> None:
    link = Link(KINDS["tcp"], CarrierParams(chunk_bytes=512, max_connections=2))
    first = link.shake_hands()
    wait_until_idle(served(link), 1)
    second = link.shake_hands()
    wait_until_idle(served(link), 2)
    third = link.shake_hands()
    assert first.receive() is None
    assert not second.has_input()
    wait_until_idle(served(link), 2)
    for frames in (first, second, third):
        frames.close()
    link.close()


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_more_peers_than_connections_push_in_turn(kind: Kind) -> None:
    link = Link(kind, CarrierParams(chunk_bytes=512, max_connections=1))
    link.receiver.open(M, TARGET_TABLE)
    senders = [open_sender(link.here, TOKEN, PARAMS) for _ in range(3)]
    for number in range(9):
        wait_until_idle(served(link), min(number, 1))
        part = BlockRange(number * 4, number * 4 + 4)
        senders[number % 3].push(M, link.receiver.url, SOURCE_TABLE, part, timeout_s=20, urgent=True)
    assert link.num_equal(0, 36) == 36
    for sender in senders:
        sender.close()
    link.close()


def test_a_connection_that_ends_as_it_is_used_again_is_renewed_once() -> None:
    """1. A push lands. 2. The peer ends the idle connection, and the next push is on its way. 3. It lands over a new
    connection. 4. That one is ended so too, and its successor: the push fails."""

    def until_used_again(frames: FrameSocket) -> None:
        welcome(frames)
        take_push(frames)
        frames.expect(FrameKind.BEGIN)

    def never_used(frames: FrameSocket) -> None:
        welcome(frames)
        frames.expect(FrameKind.BEGIN)

    receiver = StrangeReceiver(until_used_again, until_used_again, never_used)
    sender = open_sender(ByteStore(1), TOKEN, PARAMS)
    for _ in range(2):
        sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20, urgent=True)
    with pytest.raises(CopyFailed, match=r"clos|reset|Broken"):
        sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20, urgent=True)
    receiver.join()
    sender.close()


def test_a_begin_that_is_announced_and_not_sent_is_given_up() -> None:
    link = Link(KINDS["tcp"], CarrierParams(stall_s=0.05))
    frames = link.shake_hands()
    frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.BEGIN, 100, 0, 0, 0))
    assert read_to_end(frames._sock) == b""
    frames.close()
    link.close()


def test_both_ends_of_an_idle_connection_notice_a_host_that_is_gone() -> None:
    link = Link(KINDS["tcp"])
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    (near,) = link.sender._pool._idle[link.receiver.url]
    (far,) = served(link)._connections
    for frames in (near.frames, far):
        assert frames._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    link.close()


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_connections_to_a_peer_that_is_gone_are_dropped_though_nothing_is_pushed_to_it_any_more(kind: Kind) -> None:
    link = Link(kind)
    for receiver in (open_receiver(ByteStore(3), kind.url, TOKEN, PARAMS), link.receiver):
        receiver.open(M, TARGET_TABLE)
        link.sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20, urgent=True)
        if receiver is not link.receiver:
            assert link.sender.num_idle_connections == 1
            receiver.close()
    assert link.sender.num_idle_connections == 1
    assert list(link.sender._pool._idle) == [link.receiver.url]
    link.close()


def test_a_segment_whose_local_socket_nobody_accepts_is_not_waited_for() -> None:
    offered = OfferedSegment(2, 512)
    with contextlib.ExitStack() as others, ThreadPoolExecutor(1) as threads:
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect("\0" + offered.offer.local_name)
        mapping = threads.submit(map_segment, offered.offer, PARAMS.max_segment_bytes, 0.1)
        try:
            assert mapping.result(10) is None
        finally:
            offered.close()  # also ends a connect that waits


def test_what_is_read_after_a_header_has_the_rest_of_its_deadline_only() -> None:
    for is_scattered in (False, True):
        near, far = socket.socketpair()
        frames = FrameSocket(near)
        frames.set_deadline(time.monotonic() + LONG_S)
        frames._deadline_s = time.monotonic() + 0.05  # as after waiting so long for the header
        out = memoryview(bytearray(8))
        with pytest.raises(TimeoutError):
            frames.receive_pieces([out]) if is_scattered else frames.receive_into(out)
        frames.close()
        far.close()


@pytest.mark.parametrize("kind", [*SOCKET_KINDS.values(), KINDS["nccl"]], ids=[*SOCKET_KINDS, "nccl"])
def test_an_error_of_the_receiving_store_is_the_reason_of_the_failed_push(kind: Kind) -> None:
    link = Link(kind)
    link.receiver.open(M, TARGET_TABLE)

    def fail() -> None:
        raise RuntimeError("out of memory " + "x" * 100_000)

    link.there.before_scatter = fail
    with pytest.raises(CopyFailed, match="RuntimeError: out of memory"):
        link.push()
    while served(link).num_connections:
        threading.Event().wait(0.001)
    link.there.before_scatter = lambda: None
    link.push()
    assert link.num_equal() == 40
    link.close()


@pytest.mark.parametrize("name", ["nccl", "nccl-one-gpu"])
def test_a_link_whose_abort_fails_keeps_no_connection_open(name: str) -> None:
    link = Link(KINDS[name])
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 4)
    for end in link.gpus.links:
        end.is_stuck = True
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push(migration_id=MigrationId("unknown"))
    while served(link).num_connections:
        threading.Event().wait(0.001)
    link.push()
    assert link.num_equal() == 40
    link.close()


def test_slots_that_were_made_for_a_sender_that_is_gone_are_given_back() -> None:
    link = Link(KINDS["nccl-one-gpu"])
    receiver = served(link)
    assert link.maker_there is not None

    def lose_the_sender() -> None:
        for frames in list(receiver._connections):
            frames.interrupt()

    link.maker_there.after_answer = lose_the_sender
    with pytest.raises(CopyFailed):
        link.push()
    while receiver.num_connections:
        threading.Event().wait(0.001)
    assert [end.is_aborted for end in link.gpus.links] == [True]
    link.close()
