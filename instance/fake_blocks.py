"""Where does the fake engine keep its KV? Paged blocks, reference counts, a prefix cache, the carriers' view."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from instance.cached import CacheNotes
from instance.fake_model import WORD_BYTES, Words, mix
from instance.messages import HASH_BYTES
from instance.types import CachedChanges
from migration.transports.store import KVLayout
from migration.types import BlockTable

POISON = 0xDEAD_BEEF_DEAD_BEEF
"""What a freshly allocated block holds: a word that was never written is noticed."""


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def block_hashes(tokens: Sequence[int], block_size: int, known: Sequence[int] = ()) -> list[int]:
    """Chained digest of every full block; `known` are those of its first blocks."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        value = hashes[-1] if hashes else 1
        for token in tokens[start : start + block_size]:
            value = mix(value ^ token)
        hashes.append(value)
    return hashes


class BlockPool:
    """All blocks of one engine; free ones in the order in which they will be given away."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.words: Words = np.full((num_blocks, block_size), POISON, dtype=np.uint64)
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._hash_of: dict[int, int] = {}
        self._by_hash: dict[int, int] = {}
        self._notes = CacheNotes()

    @property
    def num_blocks(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """So many blocks, poisoned; None, and nothing changed, when there are too few."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._by_hash[digest]
                self._notes.note(_short(digest), False)
        self.words[blocks] = POISON
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference back; the last blocks of a request are given away before its first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was freed twice"
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def share_prefix(self, hashes: Sequence[int]) -> list[int]:
        """The longest cached run of these blocks, each with one more reference."""
        found: list[int] = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._references[block] += 1
            self._free.pop(block, None)
        return found

    def num_cached_free(self, hashes: Sequence[int]) -> int:
        """How many of the longest cached run are free now: sharing them takes them from the free blocks."""
        count = 0
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            count += self._references[block] == 0
        return count

    def num_cached(self, hashes: Sequence[int]) -> int:
        """Length of the longest cached run."""
        count = 0
        while count < len(hashes) and hashes[count] in self._by_hash:
            count += 1
        return count

    def cache(self, block: int, digest: int) -> None:
        """This full block can be found by its digest from now, unless another one can."""
        if digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest] = block
            self._hash_of[block] = digest
            self._notes.note(_short(digest), True)

    def reset_cache(self) -> None:
        self._by_hash.clear()
        self._hash_of.clear()
        self._notes.void()

    def take_cached_changes(self) -> CachedChanges | None:
        """See `Engine.take_cached_changes`."""
        return self._notes.take(lambda: map(_short, self._by_hash))

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """`held`: every table that holds references. Raises AssertionError unless they explain every count."""
        counts = [0] * self.num_blocks
        for table in held:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "the reference counts are not those of the tables"
        assert all((count == 0) == (block in self._free) for block, count in enumerate(counts)), "free list"
        assert len(self._free) + sum(count > 0 for count in counts) == self.num_blocks
        assert all(self._hash_of[block] == digest for digest, block in self._by_hash.items())


def _short(digest: int) -> bytes:
    return digest.to_bytes(HASH_BYTES, "big")


class FakeStore:
    """The blocks as a carrier sees them: one KV-cache group, `block_size` words a block."""

    def __init__(self, words: Words) -> None:
        self._words = words
        num_blocks, block_size = words.shape
        self._layout = KVLayout(group_block_bytes=(block_size * WORD_BYTES,), num_blocks=num_blocks)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def gather(self, block_ids: BlockTable, out: memoryview) -> None:
        np.frombuffer(out, dtype=np.uint64)[:] = self._words[list(block_ids[0])].reshape(-1)

    def scatter(self, block_ids: BlockTable, data: memoryview) -> None:
        self._words[list(block_ids[0])] = np.frombuffer(data, dtype=np.uint64).reshape(len(block_ids[0]), -1)
