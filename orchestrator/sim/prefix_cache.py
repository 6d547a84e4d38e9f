"""Which blocks of a simulated engine can be found again, and which are given away first? vLLM's prefix cache; pure.

The rules are those of `instance/fake_blocks.py`. A block has no number here: one that can be found is a hash, and all
others are alike. Of the free ones these others are given away first, then those that can be found, in the order in
which they were freed: so only they need an order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from instance.cached import CacheNotes
from instance.messages import HASH_BYTES
from instance.types import CachedChanges

_MASK = (1 << 8 * HASH_BYTES) - 1
_STRIDE = 0x9E37_79B9_7F4A_7C15
"""Between the hashes of blocks with one base: odd, so that no two of them are the same."""


def prefix_hashes(ids: Sequence[int], id_tokens: int, num_tokens: int, block_size: int) -> tuple[int, ...]:
    """Of a prompt's first full blocks, as far as its ids say what is in them: `id_tokens` tokens each (`Arrival`). As
    vLLM's, each stands for the whole prompt up to its end."""
    bases, digest = list[int](), b""
    for one in ids:
        digest = blake2b(b"%b %d" % (digest, one), digest_size=HASH_BYTES).digest()
        bases.append(int.from_bytes(digest, "big"))
    num_blocks = min(num_tokens, len(ids) * id_tokens) // block_size
    return tuple(
        (bases[((index + 1) * block_size - 1) // id_tokens] + index * _STRIDE) & _MASK for index in range(num_blocks)
    )


@dataclass(slots=True)
class Chain:
    """One request's blocks, as the cache knows them."""

    ids: tuple[int, ...]
    known: tuple[int, ...]
    """Hashes of its first blocks, which others may have, too. What is beyond them is its own."""
    base: int
    """Of the hashes of its own."""
    held: list[int] = field(default_factory=list)
    """Of its blocks those that can be found, in the order of the table."""

    def own(self, index: int) -> int:
        """The hash of one beyond those that are known."""
        return (self.base + index * _STRIDE) & _MASK

    def hashes(self, first: int, end: int) -> tuple[int, ...]:
        return self.known[first:end] + tuple(map(self.own, range(max(first, len(self.known)), end)))


@dataclass(frozen=True, slots=True)
class Found:
    """The first blocks of a request, as they are in the cache."""

    blocks: tuple[int, ...] = ()
    num_free: int = 0
    """Of them nobody holds so many: whoever takes them takes free blocks."""

    @property
    def num_held(self) -> int:
        return len(self.blocks) - self.num_free


NOTHING = Found()


class PrefixCache:
    """Of one engine. Whoever takes free blocks calls `trim`, before any of the other methods is called again."""

    def __init__(self, block_size: int, id_tokens: int) -> None:
        self._block_size = block_size
        self._id_tokens = id_tokens
        self._holders: dict[int, int] = {}
        """How many hold each block that can be found."""
        self._free: OrderedDict[int, None] = OrderedDict()
        """Those that nobody holds, in the order in which they are given away."""
        self._notes = CacheNotes()

    def chain(self, request_id: str, ids: tuple[int, ...], num_prompt: int) -> Chain:
        """The same on every engine of this block size."""
        base = blake2b(request_id.encode(), digest_size=HASH_BYTES).digest()
        known = prefix_hashes(ids, self._id_tokens, num_prompt, self._block_size) if ids else ()
        return Chain(ids, known, int.from_bytes(base, "big"))

    def find(self, chain: Chain, num_tokens: int) -> Found:
        """The longest unbroken run of full blocks of these first tokens."""
        holders, num_blocks = self._holders, num_tokens // self._block_size
        blocks, num_free = list[int](), 0
        for block in chain.known[:num_blocks]:
            count = holders.get(block)
            if count is None:
                return Found(tuple(blocks), num_free)
            blocks.append(block)
            num_free += not count
        while len(blocks) < num_blocks:
            block = chain.own(len(blocks))
            count = holders.get(block)
            if count is None:
                break
            blocks.append(block)
            num_free += not count
        return Found(tuple(blocks), num_free)

    def hold(self, chain: Chain, found: Found) -> None:
        """`chain`, which holds nothing, holds these, too."""
        for block in found.blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1
        chain.held = list(found.blocks)

    def add(self, chain: Chain, before: int, computed: int) -> None:
        """Of a request so many tokens were computed, and are now: its blocks that are full by that can be found, unless
        there is another one with the same in it."""
        full = chain.hashes(before // self._block_size, computed // self._block_size)
        new = [block for block in full if block not in self._holders]
        self._holders.update(dict.fromkeys(new, 1))
        chain.held += new
        self._note(new, is_cached=True)

    def release(self, chain: Chain) -> int:
        """It holds nothing any more; its last blocks will be given away before its first. Returns how many of its
        blocks are not free now: others hold them, too."""
        num_kept = 0
        for block in reversed(chain.held):
            self._holders[block] = left = self._holders[block] - 1
            if left:
                num_kept += 1
            else:
                self._free[block] = None
        chain.held = []
        return num_kept

    def trim(self, num_free: int) -> None:
        """So many free blocks are left: what has been given away can no longer be found."""
        gone = [self._free.popitem(last=False)[0] for _ in range(len(self._free) - num_free)]
        for block in gone:
            del self._holders[block]
        self._note(gone, is_cached=False)

    def reset(self) -> bool:
        """Nothing can be found. False: somebody holds something (vLLM does not do it then, either)."""
        if len(self._free) < len(self._holders):
            return False
        self._free.clear()
        self._holders.clear()
        self._notes.void()
        return True

    def take_changes(self) -> CachedChanges | None:
        """See `Engine.take_cached_changes`."""
        return self._notes.take(lambda: map(_bytes_of, self._holders))

    def _note(self, blocks: Sequence[int], is_cached: bool) -> None:
        if not self._notes.is_void:
            for block in blocks:
                self._notes.note(_bytes_of(block), is_cached)

    def num_shared(self) -> int:
        """Holders beyond the first of each block."""
        return sum(count - 1 for count in self._holders.values() if count)

    def check_integrity(self, chains: Sequence[Chain], num_free: int) -> None:
        """`chains`: all that hold something. Raises AssertionError unless they explain every count."""
        counts = dict.fromkeys(self._holders, 0)
        for chain in chains:
            for block in chain.held:
                counts[block] += 1
        assert counts == self._holders, "the holders of blocks are counted wrong"
        assert {block for block, count in counts.items() if not count} == self._free.keys(), "free blocks that are held"
        assert len(self._free) <= num_free, "more free blocks can be found than are free"


def _bytes_of(block: int) -> bytes:
    return block.to_bytes(HASH_BYTES, "big")
