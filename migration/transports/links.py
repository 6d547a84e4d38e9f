"""What does the nccl carrier need of a GPU? A link: two slots at either end, chunks packed, shipped and unpacked.

`nccl.py` has the real one; whatever needs no GPU (who waits for whom, for how long, what is refused) is here and beside
the other carriers. Imports neither msgspec nor torch nor CuPy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from migration.errors import CopyFailed
from migration.types import BlockTable

_LOG = logging.getLogger(__name__)
NUM_SLOTS = 2
"""One is packed while the other is on the wire."""
_POLL_S = 50e-6


@dataclass(frozen=True, slots=True)
class LinkOffer:
    """What a sender says of its GPU; travels over the authenticated connection."""

    unique_id: bytes
    """NCCL's, of the communicator of this pair."""
    gpu: bytes
    """Names the GPU and the running system it is in: equal when both ends share it."""
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class LinkAnswer:
    """What a receiver says: by which way chunks come."""

    slot_handles: tuple[bytes, ...]
    """CUDA IPC handles of the receiver's slots, if both ends share a GPU; else empty, and chunks come through NCCL."""


class Link(Protocol):
    """One pair's way from GPU to GPU, of one direction. Used by one thread at a time, except `abort`."""

    @property
    def is_direct(self) -> bool:
        """The sender packs into the receiver's own slot: nothing is shipped, and the slot is full when packed."""

    def pack(self, slot: int, block_ids: BlockTable) -> None:
        """Sender: start to gather these blocks into the slot."""

    def ship(self, slot: int, num_bytes: int) -> None:
        """Sender: start to send the slot, when it is packed."""

    def receive(self, slot: int, num_bytes: int) -> None:
        """Receiver: start to fill the slot. Does nothing where the sender packs into it."""

    def is_done(self, slot: int) -> bool:
        """Whether what was started with this slot is over. Raises `CopyFailed` when the pair is broken."""

    def unpack(self, slot: int, block_ids: BlockTable) -> None:
        """Receiver: scatter the slot into these blocks; returns when they are written."""

    def abort(self) -> None:
        """End this pair and no other: what was started is given up. Idempotent."""


class LinkMaker(Protocol):
    """One rank's GPU. Raises `CopyFailed` where there is none."""

    def offer(self, slot_bytes: int) -> LinkOffer: ...

    def answer(self, offer: LinkOffer) -> tuple[LinkAnswer, Callable[[], Link]]:
        """Receiver: what to answer, and what makes its end of the link then (it waits for the sender's)."""

    def connect(self, offer: LinkOffer, answer: LinkAnswer) -> Link:
        """Sender: its end of the link, warmed up. Waits for the receiver's."""


def make_in_time(make: Callable[[], Link], limit_s: float) -> Link:
    """Call `make` in a thread of its own, since NCCL may wait for ever for a peer that is gone. Raises `CopyFailed` at
    the limit or when it fails; a link that comes later is aborted."""
    watch = _Watch()
    thread = threading.Thread(target=watch.run, args=(make,), name="kv-link", daemon=True)
    thread.start()
    return watch.result(limit_s)


class _Watch:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._link: Link | None = None
        self._error: Exception | None = None
        self._is_given_up = False

    def run(self, make: Callable[[], Link]) -> None:
        link: Link | None = None
        error: Exception | None = None
        try:
            link = make()
        except Exception as failure:  # noqa: BLE001 - whatever CUDA, NCCL or CuPy raise: it is handed to the waiting one
            error = failure
        with self._changed:
            self._link, self._error = link, error
            self._changed.notify_all()
            is_late = self._is_given_up
        if is_late and link is not None:
            _LOG.warning("a link came up after its limit; aborted")
            abort(link)

    def result(self, limit_s: float) -> Link:
        with self._changed:
            self._changed.wait_for(lambda: self._link is not None or self._error is not None, limit_s)
            if self._link is not None:
                return self._link
            self._is_given_up = True
            if self._error is None:
                raise CopyFailed(f"the link to the peer's GPU was not up after {limit_s} s")
            raise CopyFailed(f"no link to the peer's GPU: {self._error}") from self._error


def abort(link: Link | None) -> None:
    """End the pair, and never raise: the socket beside it must be closed all the same."""
    try:
        if link is not None:
            link.abort()
    except Exception as error:  # noqa: BLE001 - whatever CUDA, NCCL or CuPy raise; the pair is given up in any case
        _LOG.warning("a link could not be aborted: %r", error, exc_info=error)


def wait_done(link: Link, slot: int, deadline_s: float) -> None:
    """Poll until the slot is done. Raises `CopyFailed` at the deadline, or when the pair is broken."""
    while not link.is_done(slot):
        if time.monotonic() >= deadline_s:
            raise CopyFailed("the deadline passed while a chunk was on its way between GPUs")
        time.sleep(_POLL_S)
