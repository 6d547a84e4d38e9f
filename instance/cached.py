"""Which blocks are in the prefix cache, what has changed since when, and who was told how much of it?

`CacheNotes` is an engine's half: what it has not told yet. `CachedBook` is the agent's: all that is cached, a bounded
log of the changes, and for each subscriber how far it was told. A block is its hash of HASH_BYTES to both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import islice

from instance.messages import ALL_CACHED, CachedBlocks
from instance.report import MAX_SUBSCRIBERS
from instance.types import CachedChanges

CACHED_INTERVAL_S = 0.25
"""A subscriber hears of changes this often at most."""
MAX_CACHED_HASHES = 65_536
"""Changes that are remembered, and hashes in one message: 512 KiB."""
MAX_UNTOLD_CHANGES = 65_536
"""Changes that an engine keeps for who asks; with more it tells everything anew."""


class CacheNotes:
    """What an engine's prefix cache has gained and lost since somebody last asked. Until then, and beyond
    `max_changes`, it is void: nothing is kept, and the next answer is all that is cached."""

    def __init__(self, max_changes: int = MAX_UNTOLD_CHANGES) -> None:
        self._changes: list[tuple[bytes, bool]] = []
        self._max_changes = max_changes
        self.is_void = True

    def note(self, block_hash: bytes, is_cached: bool) -> None:
        """It can be found by this hash from now, or no longer. Only changes, in the order in which they happen."""
        if self.is_void:
            return
        if len(self._changes) < self._max_changes:
            self._changes.append((block_hash, is_cached))
        else:
            self.void()

    def void(self) -> None:
        """What was noted no longer says what is cached."""
        self._changes, self.is_void = [], True

    def take(self, all_cached: Callable[[], Iterable[bytes]]) -> CachedChanges | None:
        """The changes since the last call; None: none. `all_cached` is asked only when the notes are void."""
        if self.is_void:
            self.is_void = False
            return CachedChanges(tuple((block_hash, True) for block_hash in all_cached()), is_anew=True)
        if not self._changes:
            return None
        changes, self._changes = self._changes, []
        return CachedChanges(tuple(changes))


class CachedBook:
    """What one instance has cached, and who was told of it. Says nothing before its engine has said something.

    A log of `max_hashes` changes: who was told less gets all that is cached (the `max_hashes` that appeared last).
    """

    def __init__(self, instance: str, epoch: int, block_size: int, max_hashes: int = MAX_CACHED_HASHES) -> None:
        self._instance = instance
        self._epoch = epoch
        self._block_size = block_size
        self._max_hashes = max_hashes
        self._cached: dict[bytes, None] = {}
        """In order of appearance."""
        self._log: deque[bytes] = deque(maxlen=max_hashes)
        """Hashes touched by the last changes before `_count`."""
        self._count = 0
        self._has_heard = False
        self._told: dict[str, int] = {}
        """By address: the first change it does not know; ALL_CACHED: it knows nothing."""

    @property
    def is_wanted(self) -> bool:
        return bool(self._told)

    def subscribe(self, address: str, cached_from: int | None) -> None:
        """See `Subscribe.cached_from`. A number that is not one of ours is of another incarnation: it knows nothing."""
        self._told.pop(address, None)
        if cached_from is None:
            return
        self._told[address] = cached_from if 0 <= cached_from <= self._count else ALL_CACHED
        while len(self._told) > MAX_SUBSCRIBERS:
            del self._told[next(iter(self._told))]

    def keep(self, addresses: Collection[str]) -> None:
        """Forget all others: their leases have ended."""
        for address in self._told.keys() - set(addresses):
            del self._told[address]

    def note(self, changes: CachedChanges | None) -> None:
        """What the engine said; None: nothing has changed, or it never says."""
        if changes is None:
            return
        self._has_heard = True
        if changes.is_anew:
            # Counts as one change, which the log does not hold: everybody hears everything.
            self._cached = dict.fromkeys(block_hash for block_hash, _ in changes.changes)
            self._log.clear()
            self._count += 1
            return
        for block_hash, is_cached in changes.changes:
            if is_cached == (block_hash in self._cached):
                continue
            if is_cached:
                self._cached[block_hash] = None
            else:
                del self._cached[block_hash]
            self._log.append(block_hash)
            self._count += 1

    def take_due(self) -> tuple[tuple[str, CachedBlocks], ...]:
        """(address, message) for every subscriber that does not know all; each counts as told now."""
        if not self._has_heard:
            return ()
        messages: dict[int, CachedBlocks] = {}
        due = []
        for address, told in self._told.items():
            if told == self._count:
                continue
            begin = told if told >= self._count - len(self._log) else ALL_CACHED
            if begin not in messages:
                messages[begin] = self._everything() if begin == ALL_CACHED else self._since(begin)
            due.append((address, messages[begin]))
            self._told[address] = self._count
        return tuple(due)

    def _everything(self) -> CachedBlocks:
        latest = list(islice(reversed(self._cached), self._max_hashes))
        return self._message(ALL_CACHED, reversed(latest), ())

    def _since(self, begin: int) -> CachedBlocks:
        touched = dict.fromkeys(islice(reversed(self._log), self._count - begin))
        added = [block_hash for block_hash in reversed(touched) if block_hash in self._cached]
        return self._message(begin, added, (block_hash for block_hash in touched if block_hash not in self._cached))

    def _message(self, begin: int, added: Iterable[bytes], removed: Iterable[bytes]) -> CachedBlocks:
        return CachedBlocks(
            instance=self._instance,
            epoch=self._epoch,
            block_size=self._block_size,
            begin=begin,
            end=self._count,
            added=b"".join(added),
            removed=b"".join(removed),
        )

    def check_integrity(self) -> None:
        assert len(self._log) <= self._max_hashes and len(self._log) <= self._count
        assert len(self._told) <= MAX_SUBSCRIBERS
        assert all(told == ALL_CACHED or 0 <= told <= self._count for told in self._told.values())
