"""How do the fleet's processes reach each other? One inbox a process: ZeroMQ PULL; everybody else pushes to it.

A frame: one byte of version, a MAC with the fleet's token (`seal.py`), a stamp (`replay.py`), then msgspec msgpack,
which is not looked at unless the MAC is right and the stamp new. Sending never waits: a peer whose queue is full loses
the message, counted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from instance.errors import MalformedFleetMessage, ReplayedMessage, StrangerMessage
from instance.messages import MAX_MESSAGE_BYTES, FleetMessage
from instance.replay import STAMP_BYTES, ReplayGuard, Session
from instance.seal import MAC_BYTES, Seal

_LOG = logging.getLogger(__name__)

WIRE_VERSION = 3
PEER_QUEUE_MESSAGES = 4096
INBOX_QUEUE_MESSAGES = 65_536
MAX_PEERS = 1024
CLOSE_LINGER_MS = 200

_VERSION_BYTE = bytes((WIRE_VERSION,))
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[FleetMessage] = msgspec.msgpack.Decoder(FleetMessage)


def encode(message: FleetMessage, seal: Seal, address: str, session: Session) -> bytes:
    """A frame for the inbox at `address`, and for no other; `session`: the sender's with that inbox."""
    body = session.stamp() + _ENCODER.encode(message)
    return b"".join((_VERSION_BYTE, seal.mac(address, body), body))


def decode(data: bytes, seal: Seal, address: str, guard: ReplayGuard) -> FleetMessage:
    """`address`, `guard`: of the inbox it came to. Raises StrangerMessage when the MAC is missing or wrong,
    ReplayedMessage for a frame that was taken before, MalformedFleetMessage for anything else but one whole message of
    this version."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedFleetMessage(f"{len(data)} bytes are more than {MAX_MESSAGE_BYTES}")
    if data[:1] != _VERSION_BYTE:
        raise MalformedFleetMessage(f"wire version {data[:1]!r} is not {WIRE_VERSION}")
    frame = memoryview(data)
    mac, body = frame[1 : 1 + MAC_BYTES], frame[1 + MAC_BYTES :]
    if not seal.is_genuine(mac, address, body):
        raise StrangerMessage(f"{len(data)} bytes without this fleet's MAC for this inbox")
    if len(body) < STAMP_BYTES:
        raise MalformedFleetMessage(f"a stamp of {len(body)} bytes")
    if not guard.admit(body[:STAMP_BYTES]):
        raise ReplayedMessage(f"{len(data)} bytes that came before")
    try:
        return _DECODER.decode(body[STAMP_BYTES:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedFleetMessage(str(error)) from error


@dataclass(slots=True)
class MailboxCounts:
    received: int = 0
    malformed: int = 0
    strangers: int = 0
    """Frames whose MAC is missing or wrong. None of them was looked into."""
    replays: int = 0
    """Frames of members that came before. None of them was looked into."""
    sent: int = 0
    dropped: int = 0
    """Not sent: the peer's queue was full, its address is none, or the mailbox is closed."""


@dataclass(frozen=True, slots=True)
class _Peer:
    """The way to one inbox. A new connection is a new session: what the old one still holds overtakes nothing."""

    socket: zmq.Socket[bytes]
    session: Session = field(default_factory=Session)


class Mailbox:
    """The inbox of this process and its way to the inboxes of others. Belongs to one asyncio loop."""

    def __init__(self, token: str, peer_queue_messages: int = PEER_QUEUE_MESSAGES) -> None:
        """`token`: the fleet's shared secret; frames made with another one are dropped. Raises ValueError when it is
        empty."""
        self.counts = MailboxCounts()
        self._seal = Seal(token)
        self._peer_queue_messages = peer_queue_messages
        self._context: zmq.asyncio.Context | None = None
        self._inbox: zmq.asyncio.Socket | None = None
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._guard = ReplayGuard()
        self._address = ""

    @property
    def address(self) -> str:
        """Where others reach this inbox: ``tcp://host:port``."""
        return self._address

    async def open(self, host: str = "127.0.0.1") -> None:
        """Bind to a free port of `host`. Raises zmq.ZMQError when the host is not ours."""
        context = zmq.asyncio.Context(io_threads=1)
        inbox = context.socket(zmq.PULL)
        inbox.setsockopt(zmq.LINGER, 0)
        inbox.setsockopt(zmq.RCVHWM, INBOX_QUEUE_MESSAGES)
        inbox.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            port = inbox.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError:
            inbox.close()
            context.term()
            raise
        self._context, self._inbox = context, inbox
        self._address = f"tcp://{host}:{port}"

    async def receive(self) -> FleetMessage:
        """The next well-formed message of a member; others are counted and passed over."""
        if self._inbox is None:
            raise RuntimeError("the mailbox is not open")
        while True:
            data = await self._inbox.recv()
            try:
                message = decode(data, self._seal, self._address, self._guard)
            except StrangerMessage as error:
                if not self.counts.strangers:
                    _LOG.warning("dropped %s; further ones are only counted", error)
                self.counts.strangers += 1
                continue
            except ReplayedMessage as error:
                if not self.counts.replays:
                    _LOG.warning("dropped %s; further ones are only counted", error)
                self.counts.replays += 1
                continue
            except MalformedFleetMessage:
                self.counts.malformed += 1
                continue
            self.counts.received += 1
            return message

    def send(self, address: str, message: FleetMessage) -> bool:
        """Queue it for that inbox without waiting. False: it was dropped (and counted)."""
        peer = self._peer(address)
        if peer is None:
            self.counts.dropped += 1
            return False
        try:
            peer.socket.send(encode(message, self._seal, address, peer.session), flags=zmq.NOBLOCK)
        except zmq.Again:
            self.counts.dropped += 1
            return False
        self.counts.sent += 1
        return True

    def forget(self, address: str) -> None:
        """Drop what is queued for that inbox and close the connection. Unknown addresses are ignored."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.socket.close(linger=0)

    def close(self) -> None:
        """Close everything; what is queued has CLOSE_LINGER_MS to leave. Closing twice is fine."""
        context, self._context = self._context, None
        inbox, self._inbox = self._inbox, None
        for peer in self._peers.values():
            peer.socket.close(linger=CLOSE_LINGER_MS)
        self._peers.clear()
        if inbox is not None:
            inbox.close(linger=0)
        if context is not None:
            context.term()

    def _peer(self, address: str) -> _Peer | None:
        peer = self._peers.get(address)
        if peer is not None:
            self._peers.move_to_end(address)
            return peer
        if self._context is None or not address.startswith("tcp://"):
            return None
        # A plain socket: its send is tried once and never awaited, so it needs no place in the asyncio loop.
        socket = zmq.Socket(self._context, zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._peer_queue_messages)
        try:
            socket.connect(address)
        except zmq.ZMQError:
            socket.close()
            return None
        peer = self._peers[address] = _Peer(socket)
        while len(self._peers) > MAX_PEERS:
            self.forget(next(iter(self._peers)))
        return peer
