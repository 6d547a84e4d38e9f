"""What do a block sender and a block receiver say on a socket? Frames: a fixed header, then a bounded payload.

Sender: Hello, then any number of pushes (Begin, then chunks of block indexes). Receiver: Welcome; for each push
Landed, or Failed with a reason, after which the connection is over. Every frame carries magic and version, so that a
stranger is noticed at its first frame.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import islice
from typing import TypeVar

import msgspec

from migration.errors import CopyFailed, MalformedMessage

MAGIC = b"KVF"
VERSION = 2
MAX_CONTROL_BYTES = 64 << 10
"""Largest payload of any frame but a chunk."""

_HEADER = struct.Struct("!3sBBxxxIIII")
"""magic, version, kind, payload bytes, first block index, number of blocks, crc32 (0: none)."""

HEADER_BYTES = _HEADER.size
_TIMEVAL = struct.Struct("@ll")
_MAX_PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one call of the kernel takes."""
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""Seconds of silence, seconds between questions, questions: a host that is gone is noticed after two minutes."""
_CUT_SHORT = "the peer closed the connection in the middle of a frame"


class FrameKind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    BEGIN = 3
    CHUNK = 4
    """Its payload follows on the socket."""
    SLOT_CHUNK = 5
    """Its payload lies in the shared segment, in the slots' order."""
    SLOT_FREE = 6
    """The oldest slots in use, as many as it counts, may be written again (said only if the push needs them again)."""
    LANDED = 7
    FAILED = 8
    LINK_CHUNK = 9
    """Its payload comes from GPU to GPU, in the link's slots' order."""


_KINDS = {int(kind): kind for kind in FrameKind}


class SegmentOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of memory both sides can map, if they are on one host."""

    path: str
    num_slots: int
    slot_bytes: int
    nonce: bytes
    """Also the first bytes of the segment: proves that the receiver has mapped the same memory."""
    local_name: str
    """Abstract local address at which the sender waits for the receiver of this segment."""


class LinkOffered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`links.LinkOffer` on the wire."""

    unique_id: bytes
    gpu: bytes
    slot_bytes: int


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: bytes
    group_block_bytes: tuple[int, ...]
    page_order: str = ""
    segment: SegmentOffer | None = None
    link: LinkOffered | None = None


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    has_segment: bool
    """Whether the offered segment is mapped; if not, chunks come through the socket."""
    link_handles: tuple[bytes, ...] | None = None
    """`links.LinkAnswer` to the offered link, which is being made now; None: there is none."""


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A push: these block indexes of this migration are coming, in order, in chunks of at most `chunk_blocks`."""

    migration_id: str
    first: int
    end: int
    chunk_blocks: int
    has_checksum: bool
    is_urgent: bool = False
    """The receiver's budget does not hold it up."""


class Landed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    num_blocks: int
    num_bytes: int


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str


Control = Hello | Welcome | Begin | Landed | Failed
ControlT = TypeVar("ControlT", Hello, Welcome, Begin, Landed, Failed)


class Frame(msgspec.Struct, frozen=True):
    """A header as it was received; a control payload is read by `receive_control`."""

    kind: FrameKind
    num_bytes: int
    first: int
    count: int
    crc32: int


def tune(sock: socket.socket) -> None:
    """For TCP at both ends: small frames go at once, and an idle peer whose host is gone is noticed. Raises
    `OSError`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class FrameSocket:
    """One end of a connection: frames in, frames out, every call bounded by the deadline set last.

    The socket is a blocking one whose time-outs the kernel keeps: one call then moves a whole chunk, where Python's
    own time-outs would wait and copy in pieces.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(None)
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._deadline_s: float | None = None
        self._is_interrupted = False
        self.has_answer = False
        """Whether `expect` has had a frame, since a caller last set it back."""
        self._armed_s = 0.0
        """The kernel's time-out of each call; 0: none."""

    def set_deadline(self, deadline_s: float | None) -> None:
        """`deadline_s`: on the monotonic clock; None: wait for ever (an idle receiver)."""
        self._deadline_s = deadline_s
        self._arm()

    def send(self, kind: FrameKind, control: Control | None = None) -> None:
        payload = b"" if control is None else msgspec.msgpack.encode(control)
        self._send_all([_HEADER.pack(MAGIC, VERSION, kind, len(payload), 0, 0, 0) + payload])

    def send_chunk(self, kind: FrameKind, first: int, count: int, crc32: int, payload: Sequence[memoryview]) -> None:
        """`payload`: pieces that follow each other, sent where they lie."""
        num_bytes = sum(map(len, payload))
        self._send_all([_HEADER.pack(MAGIC, VERSION, kind, num_bytes, first, count, crc32), *payload])

    def announce(self, kind: FrameKind, first: int, count: int, crc32: int = 0) -> None:
        """A header alone: what it is about lies elsewhere, or is only a count."""
        header = _HEADER.pack(MAGIC, VERSION, kind, 0, first, count, crc32)
        if (num_sent := self._bounded(self._sock.send, header)) < HEADER_BYTES:
            self._send_all([header[num_sent:]])

    def receive(self) -> Frame | None:
        """The next header; None when the peer has closed in good order. Raises `MalformedMessage`, `OSError`."""
        num_read = self._bounded(self._sock.recv_into, self._header, HEADER_BYTES, socket.MSG_WAITALL)
        if not num_read:
            return None
        if num_read < HEADER_BYTES:
            self.receive_into(self._header[num_read:])
        magic, version, number, num_bytes, first, count, crc32 = _HEADER.unpack(self._header)
        if magic != MAGIC or version != VERSION:
            raise MalformedMessage("not a frame of this version")
        kind = _KINDS.get(number)
        if kind is None:
            raise MalformedMessage(f"unknown frame kind {number}")
        return Frame(kind, num_bytes, first, count, crc32)

    def receive_control(self, frame: Frame, expected: type[ControlT]) -> ControlT:
        """The payload of a control frame."""
        if frame.num_bytes > MAX_CONTROL_BYTES:
            raise MalformedMessage(f"control frame of {frame.num_bytes} bytes")
        payload = bytearray(frame.num_bytes)
        self.receive_into(memoryview(payload))
        try:
            return msgspec.msgpack.decode(payload, type=expected)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessage(f"no {expected.__name__}: {error}") from error

    def receive_into(self, out: memoryview) -> None:
        """Fill `out`. `ConnectionError` when cut short, `TimeoutError` at the deadline."""
        self._arm()
        num_bytes = len(out)
        num_read = 0
        while num_read < num_bytes:
            rest = out[num_read:] if num_read else out
            num_new = self._bounded(self._sock.recv_into, rest, num_bytes - num_read, socket.MSG_WAITALL)
            if not num_new:
                raise ConnectionResetError(_CUT_SHORT)
            num_read += num_new
            if num_read < num_bytes:
                self._arm()

    def receive_pieces(self, pieces: Sequence[memoryview]) -> None:
        """Fill the pieces one after the other, where they lie. Raises as `receive_into` does."""
        self._arm()
        left = deque(pieces)
        while left:
            batch = list(islice(left, _MAX_PIECES))
            num_new = self._bounded(self._receive_batch, batch)
            if not num_new:
                raise ConnectionResetError(_CUT_SHORT)
            _drop(left, num_new)
            if left:
                self._arm()

    def expect(self, kind: FrameKind) -> Frame:
        """The next frame, which must be of this kind. A `Failed` frame raises `CopyFailed` with its reason."""
        frame = self.receive()
        if frame is None:
            raise ConnectionResetError("the peer closed the connection")
        self.has_answer = True
        if frame.kind is FrameKind.FAILED:
            raise CopyFailed(self.receive_control(frame, Failed).reason)
        if frame.kind is not kind:
            raise MalformedMessage(f"expected {kind.name}, got {frame.kind.name}")
        return frame

    def has_input(self) -> bool:
        """Whether the peer has said (or closed) something that is not yet read. Never waits."""
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def drain(self, for_s: float) -> None:
        """Say that nothing more comes, and read on until the peer has heard it: else its end resets and loses our
        words.
        """
        deadline_s = time.monotonic() + for_s
        self._sock.shutdown(socket.SHUT_WR)
        waste = bytearray(1 << 16)
        while time.monotonic() < deadline_s:
            self.set_deadline(deadline_s)
            if not self._bounded(self._sock.recv_into, waste):
                return

    def move_to(self, sock: socket.socket) -> None:
        """Go on over another socket; the present one is closed. Both ends do so after the same frame."""
        old, self._sock = self._sock, sock
        old.close()
        sock.settimeout(None)
        self._armed_s = 0.0
        self._arm()
        if self._is_interrupted:  # it may have hit the old one
            self.interrupt()

    def interrupt(self) -> None:
        """From another thread: a call that is under way here, and every later one, fails at once. Only the thread that
        uses the connection closes it; the number of a closed one could already be someone else's."""
        self._is_interrupted = True
        with contextlib.suppress(OSError):  # not connected (any more): nothing to shut down
            self._sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """For `select`."""
        return self._sock.fileno()

    def close(self) -> None:
        self.interrupt()
        self._sock.close()

    def _arm(self) -> None:
        """Let the kernel's time-outs end at the deadline, or a tenth of the time later: that spares two calls."""
        left_s = 0.0 if self._deadline_s is None else max(1e-3, self._deadline_s - time.monotonic())
        if 0.9 * self._armed_s <= left_s <= self._armed_s:
            return
        timeout = _TIMEVAL.pack(int(left_s), int(left_s % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._armed_s = left_s

    def _bounded(self, call: Callable[..., int], *args: object) -> int:
        """One call of the kernel, which may do less than it was asked to. Raises `TimeoutError` at the deadline."""
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise TimeoutError("the deadline passed")
        try:
            return call(*args)
        except BlockingIOError as error:
            raise TimeoutError("the deadline passed") from error

    def _receive_batch(self, batch: list[memoryview]) -> int:
        return self._sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]

    def _send_all(self, pieces: Sequence[bytes | memoryview]) -> None:
        num_sent = self._bounded(self._sock.sendmsg, pieces[:_MAX_PIECES])
        if len(pieces) == 1 and num_sent == len(pieces[0]):
            return
        left: deque[memoryview] = deque(memoryview(piece) for piece in pieces)
        _drop(left, num_sent)
        while left:
            self._arm()
            _drop(left, self._bounded(self._sock.sendmsg, list(islice(left, _MAX_PIECES))))


def _drop(left: deque[memoryview], num_bytes: int) -> None:
    """Take what has gone off the front."""
    while left and num_bytes >= len(left[0]):
        num_bytes -= len(left.popleft())
    if num_bytes:
        left[0] = left[0][num_bytes:]
