"""Who moves the blocks of one rank? Its endpoint: a carrier's two ends over the rank's memory.

Near: the agent lives in the rank's process and calls `RankEndpoint`. Far (several ranks): a `RankServer` in the
rank's process serves the same orders over ZeroMQ on an abstract local address, and the agent holds a `RemoteRank`.
"""

from __future__ import annotations

import hmac
import logging
import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from traceback import format_exception
from typing import Protocol

import msgspec
import zmq

from instance.spec import Carrier
from migration.errors import CopyFailed
from migration.transports import CarrierParams, KVStore, open_receiver, open_sender
from migration.transports.opening import nccl_maker
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId

_LOG = logging.getLogger(__name__)

NUM_ORDER_THREADS = 48
"""Orders a rank serves at once: 16 migrations out and 16 in, each with one under way, and room for closes, which end
pushes and must not wait for them."""
MAX_ORDER_BYTES = 16 << 20
"""Block tables make it: three million ids, as of 50 million tokens; also what a stranger can make a rank read."""
CPU_BYTES_PER_S = 12.5e6
"""Budget of copies on a machine whose cores also decode: bench/downtime measures what the others feel of it."""
MAX_PUSH_BYTES = 4e9
"""More than a migration puts into one push of one rank, or than all pushes at once that share the budget."""
PUSH_TIMEOUT_S = MAX_PUSH_BYTES / CPU_BYTES_PER_S
"""The last resort against a push that hangs; it never cuts a paced one short. `MigrationParams` has the limits."""
_POLL_S = 0.2
_ANSWER_GRACE_S = 5.0
_ANSWER_LINGER_MS = 1000
"""For the last answers of a rank that closes: to send them, should a peer read slowly."""
_MAX_WAITING_ORDERS = 1
"""Of one peer, read ahead: ours has one at a time."""


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
    """Serves the agent's orders in the rank's process; threads, one order each.

    Any process of this machine can connect and send what it likes; without the token it gets no more than a refusal.
    """

    def __init__(self, endpoint: RankEndpoint, address: str, token: str) -> None:
        self._endpoint = endpoint
        self._token = token
        self._context = zmq.Context()
        self._is_closing = threading.Event()
        # Whoever is free takes the next. Dealt out by ZeroMQ, a close could lie behind the push that it breaks off.
        self._orders: SimpleQueue[list[bytes] | None] = SimpleQueue()
        front = self._context.socket(zmq.ROUTER)
        front.setsockopt(zmq.MAXMSGSIZE, MAX_ORDER_BYTES)
        front.setsockopt(zmq.RCVHWM, _MAX_WAITING_ORDERS)
        front.bind(address)
        answers = self._context.socket(zmq.PULL)
        answers.bind("inproc://answers")
        self._workers = [
            threading.Thread(target=self._work, name=f"kv-order-{i}", daemon=True) for i in range(NUM_ORDER_THREADS)
        ]
        self._relayer = threading.Thread(target=self._relay, args=(front, answers), name="kv-orders", daemon=True)
        for thread in (*self._workers, self._relayer):
            thread.start()

    def close(self) -> None:
        """Take no more orders, shut the endpoint down and end the threads; those under way are answered."""
        self._is_closing.set()
        for _ in self._workers:
            self._orders.put(None)
        for worker in self._workers:
            while worker.is_alive():
                self._endpoint.shut_down()  # each time: a push may have begun since the last one
                worker.join(_POLL_S)
        self._relayer.join()
        self._context.term()

    def _relay(self, front: zmq.Socket[bytes], answers: zmq.Socket[bytes]) -> None:
        num_free = NUM_ORDER_THREADS
        while not self._is_closing.is_set() or any(worker.is_alive() for worker in self._workers) or answers.poll(0):
            # What no thread is free for stays with ZeroMQ, which stops reading from those who send too much.
            takes_orders = num_free > 0 and not self._is_closing.is_set()
            try:
                ready, _, _ = zmq.select([answers, front] if takes_orders else [answers], [], [], _POLL_S)
                if answers in ready:
                    num_free += 1
                    front.send_multipart(answers.recv_multipart())
                if front in ready:
                    self._orders.put(front.recv_multipart())
                    num_free -= 1
            except (zmq.ZMQError, MemoryError):
                _LOG.exception("an order or an answer is lost")
        front.close(_ANSWER_LINGER_MS)
        answers.close(0)

    def _work(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.connect("inproc://answers")
        while (frames := self._orders.get()) is not None:
            peer, *envelope = frames
            socket.send_multipart([peer, b"", msgspec.msgpack.encode(self._answer(envelope))])
        socket.close()

    def _answer(self, envelope: list[bytes]) -> _Answer:
        """`envelope`: what the peer sent; of a REQ socket with one part it is an empty frame and that part."""
        try:
            match envelope:
                case [b"", frame]:
                    return self._obey(frame)
                case _:
                    return _Answer(f"no order: {len(envelope)} frames")
        except CopyFailed as error:
            return _Answer(_text(error))
        except Exception as error:  # noqa: BLE001 - it fails one order, and the thread serves the next
            _LOG.error("an order raised %s", _encodable("".join(format_exception(error))))
            return _Answer(_text(error))

    def _obey(self, frame: bytes) -> _Answer:
        try:
            order = msgspec.msgpack.decode(frame, type=_Open | _Close | _Push)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _Answer(f"no order: {error}")
        if not hmac.compare_digest(order.token.encode(), self._token.encode()):
            return _Answer("wrong token")
        migration_id = MigrationId(order.migration_id)
        match order:
            case _Open():
                self._endpoint.open(migration_id, order.block_table)
            case _Close():
                self._endpoint.close(migration_id)
            case _Push():
                blocks = BlockRange(order.first, order.end)
                done = self._endpoint.push(migration_id, order.url, order.block_table, blocks, order.urgent)
                return _Answer(num_blocks=done.num_blocks, num_bytes=done.num_bytes)
        return _Answer()


def _text(error: Exception) -> str:
    """Of at least one character."""
    return _encodable(str(error)) or type(error).__name__


def _encodable(text: str) -> str:
    """As can be sent and logged: a file's name in it may be no UTF-8."""
    return text.encode(errors="replace").decode()


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
        self._is_closed = False

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
        """Orders under way fail. Idempotent."""
        with self._lock:
            self._is_closed = True
            while self._idle:
                self._idle.pop().close(0)
        self._context.term()

    def _ask(self, order: _Order) -> _Answer:
        """Raises `CopyFailed`: the rank said no, or nothing in time, or we are shut down."""
        frame = msgspec.msgpack.encode(order)
        if len(frame) > MAX_ORDER_BYTES:  # the rank would hang up and never answer
            raise CopyFailed(f"an order of {len(frame)} bytes is too large")
        socket = self._take_socket()
        try:
            socket.send(frame)
            if not socket.poll(round((PUSH_TIMEOUT_S + _ANSWER_GRACE_S) * 1e3)):
                raise CopyFailed("the rank does not answer")
            answer = msgspec.msgpack.decode(socket.recv(), type=_Answer)
        except zmq.ContextTerminated as error:
            socket.close(0)
            raise CopyFailed("the rank is shut down") from error
        except BaseException:
            socket.close(0)
            raise
        self._put_back(socket)
        if answer.failure is not None:
            raise CopyFailed(answer.failure)
        return answer

    def _take_socket(self) -> zmq.Socket[bytes]:
        with self._lock:
            if self._is_closed:
                raise CopyFailed("the rank is shut down")
            if self._idle:
                return self._idle.pop()
            socket = self._context.socket(zmq.REQ)
            socket.connect(self._address)
            return socket

    def _put_back(self, socket: zmq.Socket[bytes]) -> None:
        with self._lock:
            if self._is_closed:
                socket.close(0)  # else the context would wait for it for ever
            else:
                self._idle.append(socket)
