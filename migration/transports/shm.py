"""How do bytes cross between two processes of one host without a socket copy? A sealed memory segment with slots.

The segment is an anonymous memory file of the sender (nothing in a file system, so a kill leaves nothing behind),
which the receiver maps through ``/proc/<pid>/fd/<n>``: same user and process namespace, or it cannot and the socket is
used instead. What the two say goes on over a local socket then: on a busy machine, to be woken through TCP costs more
than a chunk.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import re
import secrets
import socket
from collections.abc import Iterator

from migration.errors import CopyFailed, MalformedMessage
from migration.transports.frames import FrameKind, FrameSocket, SegmentOffer

_HEADER_BYTES = mmap.PAGESIZE
_NONCE_BYTES = 32
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PATH = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")
_LOCAL_NAME = re.compile(r"kvferry-[0-9a-f]{32}")


class Segment:
    """A mapped segment, at either end: a header page with the nonce, then slots of equal size."""

    def __init__(self, memory: mmap.mmap, num_slots: int, slot_bytes: int) -> None:
        self._view = memoryview(memory)
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes

    def slot(self, index: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` of the slot that the chunk of this index (0, 1, ... in a push) uses."""
        start = _HEADER_BYTES + (index % self.num_slots) * self.slot_bytes
        return self._view[start : start + num_bytes]


class OfferedSegment:
    """The sender's side until the receiver has answered: the memory file is open only meanwhile."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        size = _HEADER_BYTES + num_slots * slot_bytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._fd = os.memfd_create("kvferry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(self._fd, size)
        except OSError:
            self.close()
            raise
        nonce = secrets.token_bytes(_NONCE_BYTES)
        memory[:_NONCE_BYTES] = nonce
        name = f"kvferry-{secrets.token_hex(16)}"
        self._listener.bind("\0" + name)  # abstract: nothing in a file system either
        self._listener.listen(1)
        self._nonce = nonce
        self.segment = Segment(memory, num_slots, slot_bytes)
        self.offer = SegmentOffer(f"/proc/{os.getpid()}/fd/{self._fd}", num_slots, slot_bytes, nonce, name)

    def accept(self, timeout_s: float) -> socket.socket:
        """The local connection of the receiver that has mapped the segment. Raises `CopyFailed`, `OSError`."""
        self._listener.settimeout(timeout_s)
        sock, _ = self._listener.accept()
        sock.settimeout(timeout_s)
        if not hmac.compare_digest(sock.recv(_NONCE_BYTES, socket.MSG_WAITALL), self._nonce):
            sock.close()
            raise CopyFailed("a stranger at the local socket of a shared segment")
        return sock

    def close(self) -> None:
        os.close(self._fd)
        self._listener.close()


def map_segment(offer: SegmentOffer, max_bytes: int, timeout_s: float) -> tuple[Segment, socket.socket] | None:
    """The receiver's side: the segment, and the local connection to its sender. None: not on this host (or not
    allowed), too large, not the memory that was offered, or nobody takes the connection."""
    size = _HEADER_BYTES + offer.num_slots * offer.slot_bytes
    if not _PATH.fullmatch(offer.path) or not 0 < offer.num_slots * offer.slot_bytes <= max_bytes:
        return None
    if len(offer.nonce) != _NONCE_BYTES or not _LOCAL_NAME.fullmatch(offer.local_name):
        return None
    try:
        fd = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        # Sealed against shrinking, or the peer could make our reads fault.
        if os.fstat(fd).st_size != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            return None
        memory = mmap.mmap(fd, size)
    except OSError:
        return None  # no memory file: another host's path that happens to exist here
    finally:
        os.close(fd)
    if not hmac.compare_digest(memory[:_NONCE_BYTES], offer.nonce):
        return None
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(max(1e-3, timeout_s))  # else a connect waits for ever where the offerer never accepts
    try:
        sock.connect("\0" + offer.local_name)
        sock.sendall(offer.nonce)
    except OSError:
        sock.close()
        return None  # another network namespace
    return Segment(memory, offer.num_slots, offer.slot_bytes), sock


def slots_freed(frames: FrameSocket, num_slots: int) -> Iterator[None]:
    """Yields once for each chunk, in order, when its slot may be written: at once at first, then after `SLOT_FREE`."""
    num_free = num_slots
    while True:
        if not num_free:
            num_free = frames.expect(FrameKind.SLOT_FREE).count
            if not 0 < num_free <= num_slots:
                raise MalformedMessage(f"{num_free} slots freed of {num_slots}")
        num_free -= 1
        yield


def num_freed(num_slots: int, chunk_index: int, num_chunks: int) -> int:
    """How many slots a receiver says are free after this chunk of a push: half of them at a time, since to say it costs
    as much as a tenth of a chunk, and none that the push does not need again."""
    batch, num_needed = (num_slots + 1) // 2, num_chunks - num_slots
    number = chunk_index + 1
    if number > num_needed:
        return 0
    if number == num_needed:
        return number % batch or batch
    return 0 if number % batch else batch
