"""Do all carriers keep the same promises? One suite over memory, tcp and shm, and what only sockets can suffer."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from migration.errors import CopyFailed
from migration.transports import (
    BlockReceiver,
    BlockSender,
    CarrierParams,
    MemoryHub,
    RankMover,
    open_receiver,
    open_sender,
)
from migration.transports.frames import Begin, FrameKind, FrameSocket, Hello, Welcome
from migration.transports.receiver import SocketReceiver
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId
from tests.support.byte_store import GROUP_BLOCK_BYTES, ByteStore

M = MigrationId("m")
TOKEN = b"secret"
PARAMS = CarrierParams(chunk_bytes=512, num_slots=2)  # 4 block indexes a chunk
SOURCE_TABLE: BlockTable = (tuple(range(10, 50)), tuple(range(100, 140)))
TARGET_TABLE: BlockTable = (tuple(range(200, 160, -1)), tuple(range(0, 80, 2)))


class Link:
    """A sender and a receiver with a store each."""

    def __init__(self, url: str, params: CarrierParams = PARAMS, sender_token: bytes = TOKEN) -> None:
        self.here, self.there = ByteStore(1), ByteStore(2)
        self.hub = MemoryHub()
        self.receiver: BlockReceiver = open_receiver(self.there, url, TOKEN, params, self.hub)
        self.sender: BlockSender = open_sender(self.here, sender_token, params, self.hub)

    def push(
        self, first: int = 0, end: int = 40, migration_id: MigrationId = M, timeout_s: float = 20.0, urgent: bool = True
    ) -> CopyReceipt:
        blocks = BlockRange(first, end)
        return self.sender.push(
            migration_id, self.receiver.url, SOURCE_TABLE, blocks, timeout_s=timeout_s, urgent=urgent
        )

    def num_equal(self, first: int = 0, end: int = 40) -> int:
        return sum(
            all(
                self.here.blocks[group][SOURCE_TABLE[group][index]]
                == self.there.blocks[group][TARGET_TABLE[group][index]]
                for group in range(2)
            )
            for index in range(first, end)
        )

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


URLS = {"memory": "memory://there", "tcp": "tcp://127.0.0.1", "shm": "shm://127.0.0.1"}
SOCKET_URLS = {name: url for name, url in URLS.items() if name != "memory"}


@pytest.fixture(params=list(URLS.values()), ids=list(URLS))
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


@pytest.fixture(params=list(SOCKET_URLS.values()), ids=list(SOCKET_URLS))
def socket_link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


def test_blocks_land_at_the_receivers_own_ids_in_every_group(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    assert link.num_equal() == 0  # the control: before the push nothing is equal
    receipt = link.push()
    assert receipt == CopyReceipt(40, 40 * sum(GROUP_BLOCK_BYTES))
    assert link.num_equal() == 40


def test_a_part_of_the_range_lands_and_nothing_else_is_written(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    untouched = ByteStore(2)
    link.push(7, 18)
    assert link.num_equal(7, 18) == 11
    written = {block for ids in link.there.scattered for block in ids[0]}
    assert written == set(TARGET_TABLE[0][7:18])
    for block in set(range(256)) - written:
        assert link.there.blocks[0][block] == untouched.blocks[0][block]


def test_chunks_are_written_in_order(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(3, 40)
    assert [block for ids in link.there.scattered for block in ids[0]] == list(TARGET_TABLE[0][3:40])


def test_pushes_follow_each_other_and_the_last_one_wins(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 20)
    link.push(20, 39)
    link.here.blocks[0][SOURCE_TABLE[0][38]][:] = b"\xff" * GROUP_BLOCK_BYTES[0]
    link.push(38, 40)
    assert link.num_equal() == 40


def test_an_empty_range_moves_nothing(link: Link) -> None:
    assert link.push(5, 5) == CopyReceipt(0, 0)


def test_without_a_ticket_nothing_is_written(link: Link) -> None:
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push()
    assert not link.there.scattered


def test_a_closed_ticket_is_closed(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 4)
    link.receiver.close_ticket(M)
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push(4, 8)
    assert link.num_equal(4, 8) == 0
    link.receiver.close_ticket(M)  # again: nothing to do


def test_blocks_outside_the_ticket_are_refused_until_it_has_grown(link: Link) -> None:
    link.receiver.open(M, tuple(group[:20] for group in TARGET_TABLE))
    with pytest.raises(CopyFailed, match="outside the ticket"):
        link.push(16, 21)
    link.receiver.open(M, TARGET_TABLE)
    link.push(16, 21)
    assert link.num_equal(16, 21) == 5


def test_a_ticket_cannot_name_blocks_that_do_not_exist(link: Link) -> None:
    with pytest.raises(ValueError, match="block ids"):
        link.receiver.open(M, ((0, 256), (0, 1)))
    with pytest.raises(ValueError, match="groups"):
        link.receiver.open(M, ((0, 1),))


def test_closing_waits_for_the_scatter_that_is_under_way(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(20)

    link.there.before_scatter = hold
    with ThreadPoolExecutor(2) as threads:
        pushing = threads.submit(link.push)
        assert entered.wait(20)
        assert link.receiver.try_close_ticket(M) is False
        closing = threads.submit(link.receiver.close_ticket, M)
        assert not closing.done()
        go_on.set()
        closing.result(20)
        num_scattered = len(link.there.scattered)
        with pytest.raises(CopyFailed):
            pushing.result(20)
    assert len(link.there.scattered) == num_scattered == 1  # nothing more after the close


def test_concurrent_migrations_do_not_mix(link: Link) -> None:
    ids = [MigrationId(f"m{number}") for number in range(4)]
    for number, migration_id in enumerate(ids):
        part = slice(number * 10, number * 10 + 10)
        link.receiver.open(migration_id, tuple(group[part] for group in TARGET_TABLE))

    def push(number: int) -> None:
        part = tuple(group[number * 10 : number * 10 + 10] for group in SOURCE_TABLE)
        for _ in range(5):
            link.sender.push(ids[number], link.receiver.url, part, BlockRange(0, 10), timeout_s=20, urgent=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(push, range(4)))
    assert link.num_equal() == 40
    link.receiver.tickets.check_integrity()


@pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())
def test_a_wrong_token_is_refused(url: str) -> None:
    link = Link(url, sender_token=b"guess")
    link.receiver.open(M, TARGET_TABLE)
    with pytest.raises(CopyFailed, match="token"):
        link.push()
    assert not link.there.scattered
    link.close()


@pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())
def test_the_budget_paces_a_push_but_not_an_urgent_one(url: str) -> None:
    params = CarrierParams(chunk_bytes=512, num_slots=2, bytes_per_s=20_000)
    link = Link(url, params)
    link.receiver.open(M, TARGET_TABLE)
    started = time.monotonic()
    link.push(0, 12, urgent=False)  # three chunks: the third may start after 1,024 / 20,000 s
    assert time.monotonic() - started >= 0.05
    with pytest.raises(CopyFailed, match="deadline"):
        link.push(0, 40, urgent=False, timeout_s=0.1)
    link.push(0, 40, urgent=True)
    assert link.num_equal() == 40
    link.close()


def test_breaking_off_ends_a_push_at_once(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(20)

    link.there.before_scatter = hold
    with ThreadPoolExecutor(1) as threads:
        pushing = threads.submit(link.push)
        assert entered.wait(20)
        link.sender.break_off(M)
        go_on.set()
        with pytest.raises(CopyFailed, match="broken off"):
            pushing.result(20)
    link.there.before_scatter = lambda: None
    link.push()  # the next one is not harmed
    assert link.num_equal() == 40


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
                frames.close()

    link.there.before_scatter = die
    with pytest.raises(CopyFailed):
        link.push()
    link.there.before_scatter = lambda: None
    link.push()
    assert link.num_equal() == 40


def test_a_sender_that_dies_in_the_middle_leaves_a_closable_ticket(socket_link: Link) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    frames = _shake_hands(link)
    frames.send(FrameKind.BEGIN, Begin("m", 0, 40, 4, False))
    payload = memoryview(bytes(4 * sum(GROUP_BLOCK_BYTES)))
    frames.send_chunk(FrameKind.CHUNK, 0, 4, 0, payload)
    frames._sock.sendall(b"KVF\x01\x04\x00")  # half a header, then gone
    frames.close()
    link.receiver.close_ticket(M)
    assert len(link.there.scattered) <= 1


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
    with _connect(link) as stranger:
        stranger.settimeout(20)
        stranger.sendall(garbage)
        assert _read_to_end(stranger) == b""
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
    frames = _shake_hands(link)
    frames.send(FrameKind.BEGIN, Begin("m", 0, 40, 4, False))
    frames.send_chunk(FrameKind.CHUNK, first, count, 0, memoryview(bytes(num_blocks * sum(GROUP_BLOCK_BYTES))))
    frames.set_deadline(time.monotonic() + 20)
    with pytest.raises((OSError, CopyFailed)):
        frames.expect(FrameKind.LANDED)
    assert not link.there.scattered
    frames.close()


def test_a_damaged_chunk_is_noticed_when_chunks_are_summed(socket_link: Link) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    frames = _shake_hands(link)
    frames.send(FrameKind.BEGIN, Begin("m", 0, 4, 4, True))
    frames.send_chunk(FrameKind.CHUNK, 0, 4, 12345, memoryview(bytes(4 * sum(GROUP_BLOCK_BYTES))))
    frames.set_deadline(time.monotonic() + 20)
    with pytest.raises(CopyFailed, match="checksum"):
        frames.expect(FrameKind.LANDED)
    assert not link.there.scattered
    frames.close()


@pytest.mark.parametrize("url", SOCKET_URLS.values(), ids=SOCKET_URLS.keys())
def test_sums_do_not_disturb_a_sound_push(url: str) -> None:
    link = Link(url, CarrierParams(chunk_bytes=512, num_slots=2, checksum=True))
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40
    link.close()


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
        frames.close()
    while link.receiver.num_connections:
        threading.Event().wait(0.001)
    link.push()
    assert link.num_equal() == 40


def test_a_receiver_serves_no_more_connections_than_its_bound() -> None:
    link = Link("tcp://127.0.0.1", CarrierParams(chunk_bytes=512, max_connections=1))
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    second = open_sender(link.here, TOKEN, PARAMS)
    with pytest.raises(CopyFailed):
        second.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    link.push()
    second.close()
    link.close()


def test_nobody_at_the_url_fails(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.receiver.close()
    with pytest.raises(CopyFailed):
        link.push()


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


def test_a_store_that_raises_anything_fails_the_push_and_nothing_else(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    link.receiver.open(M, TARGET_TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(link.here, "gather", gather)
        with pytest.raises(CopyFailed, match="illegal memory access"):
            link.push()
    assert not link.there.scattered
    link.push()
    assert link.num_equal() == 40


def test_a_segment_that_cannot_be_shared_falls_back_to_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migration.transports.receiver.map_segment", lambda *_: None)  # as from another host
    link = Link("shm://127.0.0.1")
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40
    link.close()


def test_a_segment_leaves_nothing_in_the_file_system() -> None:
    before = set(os.listdir("/dev/shm"))
    link = Link("shm://127.0.0.1")
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "kvferry" in name}
    link.close()


def test_the_mover_pushes_and_closes_from_asyncio(link: Link) -> None:
    mover = RankMover(link.sender, link.receiver, push_timeout_s=20.0, num_threads=2)

    async def story() -> None:
        await mover.open(M, TARGET_TABLE)
        receipt = await mover.push(M, mover.endpoints(), SOURCE_TABLE, BlockRange(0, 40), urgent=True)
        assert receipt.num_blocks == 40
        await mover.close(M)
        with pytest.raises(CopyFailed):
            await mover.push(M, mover.endpoints(), SOURCE_TABLE, BlockRange(0, 4), urgent=True)

    asyncio.run(story())
    assert link.num_equal() == 40
    mover.shut_down()


def test_an_unknown_scheme_has_no_carrier() -> None:
    with pytest.raises(ValueError, match="no carrier"):
        open_receiver(ByteStore(1), "nccl://0", TOKEN, PARAMS)


def _connect(link: Link) -> socket.socket:
    host, port = link.receiver.url.split("://")[1].split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _shake_hands(link: Link) -> FrameSocket:
    frames = FrameSocket(_connect(link))
    frames.set_deadline(time.monotonic() + 20)
    frames.send(FrameKind.HELLO, Hello(TOKEN, GROUP_BLOCK_BYTES))
    frames.receive_control(frames.expect(FrameKind.WELCOME), Welcome)
    return frames


def _read_to_end(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except ConnectionResetError:
        pass  # it closed with our garbage unread
    return data
