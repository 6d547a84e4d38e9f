"""Who moves the blocks of one rank? Its endpoint: a carrier's two ends over the rank's memory.

Near: the agent lives in the rank's process and calls `RankEndpoint`. Far (several ranks): a `RankServer` in the
rank's process serves the same orders over ZeroMQ on an abstract local address, and the agent holds a `RemoteRank`.
"""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq

from instance.spec import Carrier
from migration.errors import CopyFailed
from migration.transports import CarrierParams, KVStore, open_receiver, open_sender
from migration.transports.opening import nccl_maker
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId

NUM_ORDER_THREADS = 16
"""Orders a rank serves at once; each migration has at most one push and one close under way."""
CPU_BYTES_PER_S = 12.5e6
"""Budget of copies on a machine whose cores also decode: bench/downtime measures what the others feel of it."""
MAX_PUSH_BYTES = 4e9
"""More than a migration puts into one push of one rank, or than all pushes at once that share the budget."""
PUSH_TIMEOUT_S = MAX_PUSH_BYTES / CPU_BYTES_PER_S
"""The last resort against a push that hangs; it never cuts a paced one short. `MigrationParams` has the limits."""
_POLL_MS = 200
_ANSWER_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Carriage:
    """How blocks travel to and from an engine."""

    carrier: Carrier
    host: str
    """The address peers reach us at."""
    token: str = field(repr=False)
    checksum: bool = False
    """Over every chunk that leaves."""
    bytes_per_s: float | None = None
    """`InstanceSpec.copy_bytes_per_s`."""

    def params(self, *, is_cpu: bool) -> CarrierParams:
        budget = self.bytes_per_s
        if budget is None and is_cpu:
            budget = CPU_BYTES_PER_S
        return CarrierParams(bytes_per_s=budget or None, checksum=self.checksum)


class Rank(Protocol):
    """The data plane of one rank; every call may block, and is made from a thread of its own."""

    @property
    def url(self) -> str: ...

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None: ...

    def close(self, migration_id: MigrationId) -> None: ...

    def push(
        self, migration_id: MigrationId, url: str, block_table: BlockTable, blocks: BlockRange, urgent: bool
    ) -> CopyReceipt: ...

    def shut_down(self) -> None: ...


class RankEndpoint:
    """Both ends of the carrier over this process's KV memory."""

    def __init__(self, store: KVStore, carriage: Carriage, params: CarrierParams) -> None:
        """Raises `ValueError` (for nccl with the reason why it cannot be had here), `OSError` (the host cannot be
        bound)."""
        carrier, token = carriage.carrier, carriage.token.encode()
        maker = nccl_maker(store) if carrier is Carrier.NCCL else None
        self._receiver = open_receiver(store, f"{carrier.value}://{carriage.host}", token, params, link_maker=maker)
        self._sender = open_sender(store, token, params, link_maker=maker)

    @property
    def url(self) -> str:
        return self._receiver.url

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        self._receiver.open(migration_id, block_table)

    def close(self, migration_id: MigrationId) -> None:
        self._sender.break_off(migration_id)
        self._receiver.close_ticket(migration_id)

    def push(
        self, migration_id: MigrationId, url: str, block_table: BlockTable, blocks: BlockRange, urgent: bool
    ) -> CopyReceipt:
        return self._sender.push(migration_id, url, block_table, blocks, timeout_s=PUSH_TIMEOUT_S, urgent=urgent)

    def shut_down(self) -> None:
        self._sender.close()
        self._receiver.close()


class _Order(msgspec.Struct, frozen=True, tag=True):
    token: str
    migration_id: str


class _Open(_Order, frozen=True, tag=True):
    block_table: tuple[tuple[int, ...], ...]


class _Close(_Order, frozen=True, tag=True):
    pass


class _Push(_Order, frozen=True, tag=True):
    url: str
    block_table: tuple[tuple[int, ...], ...]
    first: int
    end: int
    urgent: bool


class _Answer(msgspec.Struct, frozen=True):
    failure: str | None = None
    num_blocks: int = 0
    num_bytes: int = 0


class RankServer:
    """Serves the agent's orders in the rank's process; threads, one order each."""

    def __init__(self, endpoint: RankEndpoint, address: str, token: str) -> None:
        self._endpoint = endpoint
        self._token = token
        self._context = zmq.Context()
        self._is_closed = threading.Event()
        front = self._context.socket(zmq.ROUTER)
        front.bind(address)
        back = self._context.socket(zmq.DEALER)
        back.bind("inproc://orders")
        self._threads = [threading.Thread(target=self._relay, args=(front, back), name="kv-orders", daemon=True)]
        self._threads += [
            threading.Thread(target=self._serve, name=f"kv-order-{i}", daemon=True) for i in range(NUM_ORDER_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._is_closed.set()
        for thread in self._threads:
            thread.join()
        self._context.term()

    def _relay(self, front: zmq.Socket[bytes], back: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        poller.register(back, zmq.POLLIN)
        while not self._is_closed.is_set():
            for ready, _ in poller.poll(_POLL_MS):
                (back if ready is front else front).send_multipart(ready.recv_multipart())
        front.close(0)
        back.close(0)

    def _serve(self) -> None:
        socket = self._context.socket(zmq.REP)
        socket.connect("inproc://orders")
        while not self._is_closed.is_set():
            if socket.poll(_POLL_MS):
                socket.send(msgspec.msgpack.encode(self._answer(socket.recv())))
        socket.close(0)

    def _answer(self, frame: bytes) -> _Answer:
        try:
            order = msgspec.msgpack.decode(frame, type=_Open | _Close | _Push)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _Answer(f"no order: {error}")
        if not hmac.compare_digest(order.token.encode(), self._token.encode()):
            return _Answer("wrong token")
        migration_id = MigrationId(order.migration_id)
        try:
            match order:
                case _Open():
                    self._endpoint.open(migration_id, order.block_table)
                case _Close():
                    self._endpoint.close(migration_id)
                case _Push():
                    blocks = BlockRange(order.first, order.end)
                    done = self._endpoint.push(migration_id, order.url, order.block_table, blocks, order.urgent)
                    return _Answer(num_blocks=done.num_blocks, num_bytes=done.num_bytes)
        except Exception as error:  # noqa: BLE001 - it fails one order, and the thread serves the next
            return _Answer(str(error) or type(error).__name__)
        return _Answer()


class RemoteRank:
    """A rank of this engine in another process of this machine. Thread-safe: each call has a socket of its own
    meanwhile."""

    def __init__(self, url: str, address: str, token: str) -> None:
        self._url = url
        self._address = address
        self._token = token
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._idle: list[zmq.Socket[bytes]] = []

    @property
    def url(self) -> str:
        return self._url

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        self._ask(_Open(self._token, migration_id, block_table))

    def close(self, migration_id: MigrationId) -> None:
        self._ask(_Close(self._token, migration_id))

    def push(
        self, migration_id: MigrationId, url: str, block_table: BlockTable, blocks: BlockRange, urgent: bool
    ) -> CopyReceipt:
        answer = self._ask(_Push(self._token, migration_id, url, block_table, blocks.first, blocks.end, urgent))
        return CopyReceipt(answer.num_blocks, answer.num_bytes)

    def shut_down(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close(0)
        self._context.term()

    def _ask(self, order: _Order) -> _Answer:
        """Raises `CopyFailed`: the rank said no, or nothing in time."""
        with self._lock:
            socket = self._idle.pop() if self._idle else None
        if socket is None:
            socket = self._context.socket(zmq.REQ)
            socket.connect(self._address)
        try:
            socket.send(msgspec.msgpack.encode(order))
            if not socket.poll(round((PUSH_TIMEOUT_S + _ANSWER_GRACE_S) * 1e3)):
                raise CopyFailed("the rank does not answer")
            answer = msgspec.msgpack.decode(socket.recv(), type=_Answer)
        except BaseException:
            socket.close(0)
            raise
        with self._lock:
            self._idle.append(socket)
        if answer.failure is not None:
            raise CopyFailed(answer.failure)
        return answer
