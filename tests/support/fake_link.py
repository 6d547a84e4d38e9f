"""What stands in for GPUs and NCCL? Links within this process: `LinkMaker` and `Link` over host memory and queues."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable

from migration.errors import CopyFailed
from migration.transports.links import NUM_SLOTS, Link, LinkAnswer, LinkOffer
from migration.transports.store import KVStore
from migration.types import BlockTable


class FakePair:
    """What lies between the two ends of one link."""

    def __init__(self, slot_bytes: int) -> None:
        self.wire: queue.Queue[bytes] = queue.Queue()
        self.shared = [bytearray(slot_bytes) for _ in range(NUM_SLOTS)]


class FakeGpus:
    """Both makers of a test know the pairs by their id, as NCCL does."""

    def __init__(self) -> None:
        self.pairs: dict[bytes, FakePair] = {}
        self.links: list[FakeLink] = []


class FakeLink:
    """As NCCL: a send ends when it is taken, a peer that is gone is not noticed, `abort` ends this end only."""

    def __init__(self, store: KVStore, pair: FakePair, slot_bytes: int, *, is_direct: bool) -> None:
        self.is_direct = is_direct
        self.is_aborted = False
        self.num_packed = 0
        self.is_deaf = False
        """Nothing that is sent arrives any more."""
        self.is_stuck = False
        """Its abort fails, as CUDA does once a kernel has faulted."""
        self._store, self._pair = store, pair
        self._slots = pair.shared if is_direct else [bytearray(slot_bytes) for _ in range(NUM_SLOTS)]
        self._awaited: dict[int, int] = {}

    def pack(self, slot: int, block_ids: BlockTable) -> None:
        self._fail_if_aborted()
        self._store.gather(block_ids, self._part(slot, block_ids))
        self.num_packed += 1

    def ship(self, slot: int, num_bytes: int) -> None:
        self._fail_if_aborted()
        if not self.is_direct:
            self._pair.wire.put(bytes(self._slots[slot][:num_bytes]))

    def receive(self, slot: int, num_bytes: int) -> None:
        self._fail_if_aborted()
        if not self.is_direct:
            self._awaited[slot] = num_bytes

    def is_done(self, slot: int) -> bool:
        self._fail_if_aborted()
        if slot not in self._awaited:
            return True
        if self.is_deaf or self._pair.wire.empty():
            return False
        data = self._pair.wire.get()
        assert len(data) == self._awaited.pop(slot)
        self._slots[slot][: len(data)] = data
        return True

    def unpack(self, slot: int, block_ids: BlockTable) -> None:
        self._fail_if_aborted()
        self._store.scatter(block_ids, self._part(slot, block_ids))

    def abort(self) -> None:
        self.is_aborted = True
        if self.is_stuck:
            raise RuntimeError("an illegal memory access was encountered")

    def _part(self, slot: int, block_ids: BlockTable) -> memoryview:
        return memoryview(self._slots[slot])[: len(block_ids[0]) * self._store.layout.index_bytes]

    def _fail_if_aborted(self) -> None:
        if self.is_aborted:
            raise CopyFailed("the link to the peer's GPU was aborted")


class FakeLinkMaker:
    """One rank's GPU. `before_link` lets a test hold the making of a link, `after_answer` what follows an answer."""

    def __init__(self, store: KVStore, gpus: FakeGpus, *, is_direct: bool = False) -> None:
        self._store, self._gpus, self._is_direct = store, gpus, is_direct
        self._lock = threading.Lock()
        self.before_link: Callable[[], object] = lambda: None
        self.after_answer: Callable[[], object] = lambda: None

    def offer(self, slot_bytes: int) -> LinkOffer:
        offer = LinkOffer(secrets.token_bytes(128), b"gpu", slot_bytes)
        self._gpus.pairs[offer.unique_id] = FakePair(slot_bytes)
        return offer

    def answer(self, offer: LinkOffer) -> tuple[LinkAnswer, Callable[[], Link]]:
        self.after_answer()
        return LinkAnswer((b"0", b"1") if self._is_direct else ()), lambda: self._make(offer, self._is_direct)

    def connect(self, offer: LinkOffer, answer: LinkAnswer) -> Link:
        return self._make(offer, bool(answer.slot_handles))

    def _make(self, offer: LinkOffer, is_direct: bool) -> Link:
        self.before_link()
        link = FakeLink(self._store, self._gpus.pairs[offer.unique_id], offer.slot_bytes, is_direct=is_direct)
        with self._lock:
            self._gpus.links.append(link)
        return link
