"""Does a rank's server answer every order in time, whatever else it is told, and do both ends come to an end?"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from migration.errors import CopyFailed
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId

pytest.importorskip("vllm", reason="instance.vllm needs vLLM")

from instance.vllm.rank import MAX_ORDER_BYTES, NUM_ORDER_THREADS, RankServer, RemoteRank
from instance.vllm.worker import FerryWorkerExtension

ADDRESS = f"ipc://@kvferry-test-rank-orders-{uuid.uuid4().hex}"
"""Of this process: others may run the same tests."""
WAIT_S = 10.0
"""Far more than any of this takes; only a defect uses it up."""
M = MigrationId("m")


class HeldEndpoint:
    """Its pushes stand until they are let go, or broken off by a shut-down during the push. `open` fails as torch does
    when its memory is gone."""

    def __init__(self) -> None:
        self.pushing = threading.Event()
        self.let_go = threading.Event()
        self.tables: list[BlockTable] = []
        self.num_closed = 0

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        if not block_table:
            raise RuntimeError("no memory \udcff")
        self.tables.append(block_table)

    def close(self, migration_id: MigrationId) -> None:
        self.num_closed += 1

    def push(
        self, migration_id: MigrationId, url: str, block_table: BlockTable, blocks: BlockRange, urgent: bool
    ) -> CopyReceipt:
        self.pushing.set()
        assert self.let_go.wait(3 * WAIT_S)
        return CopyReceipt(len(blocks), 0)

    def shut_down(self) -> None:
        if self.pushing.is_set():
            self.let_go.set()


@pytest.fixture
def endpoint() -> HeldEndpoint:
    return HeldEndpoint()


@pytest.fixture
def server(endpoint: HeldEndpoint) -> Iterator[RankServer]:
    held: Any = endpoint
    served = RankServer(held, ADDRESS, "token")
    yield served
    endpoint.let_go.set()
    served.close()


@pytest.fixture
def rank(server: RankServer) -> Iterator[RemoteRank]:
    remote = RemoteRank("tcp://127.0.0.1:1", ADDRESS, "token")
    yield remote
    remote.shut_down()


@pytest.fixture
def pool(endpoint: HeldEndpoint) -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(4)
    yield threads
    endpoint.let_go.set()
    threads.shutdown(wait=False)  # an order that is never answered ends with its rank's shut-down


@pytest.fixture
def stranger(server: RankServer) -> Iterator[zmq.Socket[bytes]]:
    """A process that may send any frames, but does not know the token."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, round(WAIT_S * 1e3))
        dealer.connect(ADDRESS)
        yield dealer


def push(rank: RemoteRank) -> CopyReceipt:
    return rank.push(M, "tcp://peer", ((1,),), BlockRange(0, 1), urgent=True)


def close_often(rank: RemoteRank) -> None:
    for _ in range(3 * NUM_ORDER_THREADS):
        rank.close(M)


def test_an_order_that_raises_anything_is_answered_and_the_next_one_served(
    rank: RemoteRank, endpoint: HeldEndpoint
) -> None:
    for _ in range(NUM_ORDER_THREADS + 1):
        with pytest.raises(CopyFailed, match="no memory"):
            rank.open(M, ())
    rank.close(M)
    assert endpoint.num_closed == 1


def test_orders_do_not_wait_behind_a_push_that_stands(
    rank: RemoteRank, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    pushed = pool.submit(push, rank)
    assert endpoint.pushing.wait(WAIT_S)
    pool.submit(close_often, rank).result(WAIT_S)
    assert endpoint.num_closed == 3 * NUM_ORDER_THREADS
    assert not pushed.done()
    endpoint.let_go.set()
    assert pushed.result(WAIT_S) == CopyReceipt(1, 0)


@pytest.mark.parametrize(
    "frames",
    [
        [b"", b"one", b"two"],  # as of a REQ socket that sends two parts
        [b"", *[b"part"] * 1000],
        [b"no envelope"],
        [b""],
        [b"", b""],
        [b"", b"\xff" * 100],
        [b"", b"\x81\xa1?" + b"\x91" * 100_000],  # nested so deep that no parser follows
        [b"", b"\x82\xa4type\xa6_Close\xa5token\xa2\xff\xff"],  # a token that is no UTF-8
        [b"", msgspec.msgpack.encode({"type": "_Close", "token": "wrong", "migration_id": "m"})],
    ],
)
def test_no_stranger_can_end_the_threads(
    frames: list[bytes],
    stranger: zmq.Socket[bytes],
    rank: RemoteRank,
    endpoint: HeldEndpoint,
    pool: ThreadPoolExecutor,
) -> None:
    for _ in range(2 * NUM_ORDER_THREADS):
        stranger.send_multipart(frames)
        assert stranger.poll(round(WAIT_S * 1e3)), "no answer"
        answer = msgspec.msgpack.decode(stranger.recv_multipart()[1])
        assert answer["failure"].startswith(("no order", "wrong token"))
    pool.submit(close_often, rank).result(WAIT_S)
    assert endpoint.num_closed == 3 * NUM_ORDER_THREADS


def test_a_frame_beyond_the_bound_costs_its_sender_the_connection(
    stranger: zmq.Socket[bytes], rank: RemoteRank, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    with stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        stranger.send_multipart([b"", bytes(MAX_ORDER_BYTES + 1)])
        assert monitor.poll(round(WAIT_S * 1e3)), "the frame was taken"
    stranger.disable_monitor()
    pool.submit(close_often, rank).result(WAIT_S)
    assert endpoint.num_closed == 3 * NUM_ORDER_THREADS


def test_bytes_of_another_protocol_are_no_matter(
    rank: RemoteRank, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    for _ in range(NUM_ORDER_THREADS):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect("\0" + ADDRESS.partition("@")[2])
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    pool.submit(close_often, rank).result(WAIT_S)
    assert endpoint.num_closed == 3 * NUM_ORDER_THREADS


def test_a_long_requests_table_fits_and_one_beyond_the_bound_is_refused_at_once(
    rank: RemoteRank, endpoint: HeldEndpoint
) -> None:
    table = (tuple(range(2**20, 2**20 + 500_000)),) * 4
    rank.open(M, table)
    assert endpoint.tables == [table]
    with pytest.raises(CopyFailed, match="too large"):
        rank.open(M, table * 2)


def test_a_rank_that_closes_breaks_off_its_pushes_first(
    rank: RemoteRank, server: RankServer, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    worker = SimpleNamespace(ferry_server=server, ferry_endpoint=endpoint)
    pushed = pool.submit(push, rank)
    assert endpoint.pushing.wait(WAIT_S)
    pool.submit(FerryWorkerExtension.ferry_close, worker).result(WAIT_S)
    assert pushed.result(WAIT_S) == CopyReceipt(1, 0), "its answer was lost"


def test_a_push_that_comes_in_while_a_rank_closes_is_broken_off_too(
    rank: RemoteRank, server: RankServer, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    """1. The endpoint is shut down. 2. A push comes in. 3. The server is closed."""
    endpoint.shut_down()
    pushed = pool.submit(push, rank)
    assert endpoint.pushing.wait(WAIT_S)
    pool.submit(server.close).result(WAIT_S)
    assert pushed.result(WAIT_S) == CopyReceipt(1, 0)


class ShutDownFirst:
    """A lock that a thread called "ask" gets only after another one has had it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.has_come = threading.Event()
        self.was_had = threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread().name == "ask":
            self.has_come.set()
            assert self.was_had.wait(WAIT_S)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.was_had.set()


def test_a_shut_down_does_not_wait_for_a_socket_that_is_put_back_behind_it(
    server: RankServer, endpoint: HeldEndpoint
) -> None:
    """1. A push has its answer. 2. The shut-down closes the idle sockets. 3. The push puts its socket back."""
    rank = RemoteRank("tcp://127.0.0.1:1", ADDRESS, "token")
    ask = threading.Thread(target=push, args=(rank,), name="ask", daemon=True)
    ask.start()
    assert endpoint.pushing.wait(WAIT_S)
    private: Any = rank
    private._lock = lock = ShutDownFirst()
    endpoint.let_go.set()
    assert lock.has_come.wait(WAIT_S)
    shut_down = threading.Thread(target=rank.shut_down, daemon=True)
    shut_down.start()
    shut_down.join(WAIT_S)
    assert not shut_down.is_alive(), "the context waits for a socket that nobody closes"
    ask.join(WAIT_S)
    assert not ask.is_alive()


def test_a_shut_down_ends_the_orders_under_way_and_refuses_later_ones(
    server: RankServer, endpoint: HeldEndpoint, pool: ThreadPoolExecutor
) -> None:
    rank = RemoteRank("tcp://127.0.0.1:1", ADDRESS, "token")
    pushed = pool.submit(push, rank)
    assert endpoint.pushing.wait(WAIT_S)
    pool.submit(rank.shut_down).result(WAIT_S)
    with pytest.raises(CopyFailed, match="shut down"):
        pushed.result(WAIT_S)
    with pytest.raises(CopyFailed, match="shut down"):
        rank.close(M)
    rank.shut_down()
