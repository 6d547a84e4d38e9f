"""What do a block sender and a block receiver say on a socket? Frames: a fixed header, then a bounded payload.

Sender: Hello, then any number of pushes (Begin, then chunks of block indexes). Receiver: Welcome; for each push
Landed, or Failed with a reason, after which the connection is over. Every frame carries magic and version, so that a
stranger is noticed at its first frame.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from enum import IntEnum
from typing import TypeVar

import msgspec

from migration.errors import CopyFailed, MalformedMessage

MAGIC = b"KVF"
VERSION = 1
MAX_CONTROL_BYTES = 64 << 10
"""Largest payload of any frame but a chunk."""

_HEADER = struct.Struct("!3sBBxxxIIII")
"""magic, version, kind, payload bytes, first block index, number of blocks, crc32 (0: none)."""

HEADER_BYTES = _HEADER.size


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
    """The oldest slot in use may be written again (said only if the push needs it again)."""
    LANDED = 7
    FAILED = 8


class SegmentOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of memory both sides can map, if they are on one host."""

    path: str
    num_slots: int
    slot_bytes: int
    nonce: bytes
    """Also the first bytes of the segment: proves that the receiver has mapped the same memory."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: bytes
    group_block_bytes: tuple[int, ...]
    segment: SegmentOffer | None = None


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    has_segment: bool
    """Whether the offered segment is mapped; if not, chunks come through the socket."""


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A push: these block indexes of this migration are coming, in order, in chunks of at most `chunk_blocks`."""

    migration_id: str
    first: int
    end: int
    chunk_blocks: int
    has_checksum: bool


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


class FrameSocket:
    """One end of a connection: frames in, frames out, every call bounded by the deadline set last."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._header = bytearray(HEADER_BYTES)

    def set_deadline(self, deadline_s: float | None) -> None:
        """`deadline_s`: on the monotonic clock; None: wait for ever (an idle receiver)."""
        self._sock.settimeout(None if deadline_s is None else max(1e-3, deadline_s - time.monotonic()))

    def send(self, kind: FrameKind, control: Control | None = None) -> None:
        payload = b"" if control is None else msgspec.msgpack.encode(control)
        self._sock.sendall(_HEADER.pack(MAGIC, VERSION, kind, len(payload), 0, 0, 0) + payload)

    def send_chunk(self, kind: FrameKind, first: int, count: int, crc32: int, payload: memoryview | None) -> None:
        """`payload` None: it lies in the shared segment."""
        num_bytes = 0 if payload is None else len(payload)
        header = _HEADER.pack(MAGIC, VERSION, kind, num_bytes, first, count, crc32)
        if payload is None:
            self._sock.sendall(header)
            return
        sent = self._sock.sendmsg((header, payload))
        if sent < HEADER_BYTES:
            self._sock.sendall(header[sent:])
            sent = HEADER_BYTES
        if sent < HEADER_BYTES + num_bytes:
            self._sock.sendall(payload[sent - HEADER_BYTES :])

    def receive(self) -> Frame | None:
        """The next header; None when the peer has closed in good order. Raises `MalformedMessage`, `OSError`."""
        if not self.receive_into(memoryview(self._header), may_end=True):
            return None
        magic, version, kind, num_bytes, first, count, crc32 = _HEADER.unpack(self._header)
        if magic != MAGIC or version != VERSION:
            raise MalformedMessage("not a frame of this version")
        try:
            return Frame(FrameKind(kind), num_bytes, first, count, crc32)
        except ValueError as error:
            raise MalformedMessage(f"unknown frame kind {kind}") from error

    def receive_control(self, frame: Frame, expected: type[ControlT]) -> ControlT:
        """The payload of a control frame."""
        if frame.num_bytes > MAX_CONTROL_BYTES:
            raise MalformedMessage(f"control frame of {frame.num_bytes} bytes")
        payload = bytearray(frame.num_bytes)
        self.receive_into(memoryview(payload))
        try:
            return msgspec.msgpack.decode(payload, type=expected)
        except msgspec.DecodeError as error:
            raise MalformedMessage(f"no {expected.__name__}: {error}") from error

    def receive_into(self, out: memoryview, *, may_end: bool = False) -> bool:
        """Fill `out`. False when the peer closed before its first byte and `may_end`; `ConnectionError` when cut
        short.
        """
        num_read = 0
        while num_read < len(out):
            num_new = self._sock.recv_into(out[num_read:], len(out) - num_read, socket.MSG_WAITALL)
            if not num_new:
                if may_end and not num_read:
                    return False
                raise ConnectionResetError("the peer closed the connection in the middle of a frame")
            num_read += num_new
        return True

    def expect(self, kind: FrameKind) -> Frame:
        """The next frame, which must be of this kind. A `Failed` frame raises `CopyFailed` with its reason."""
        frame = self.receive()
        if frame is None:
            raise ConnectionResetError("the peer closed the connection")
        if frame.kind is FrameKind.FAILED:
            raise CopyFailed(self.receive_control(frame, Failed).reason)
        if frame.kind is not kind:
            raise MalformedMessage(f"expected {kind.name}, got {frame.kind.name}")
        return frame

    def has_input(self) -> bool:
        """Whether the peer has said (or closed) something that is not yet read. Never waits."""
        timeout = self._sock.gettimeout()
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self._sock.settimeout(timeout)
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
            if not self._sock.recv_into(waste):
                return

    def close(self) -> None:
        """Safe from another thread: a call that is under way there fails at once."""
        with contextlib.suppress(OSError):  # not connected (any more): nothing to shut down
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
