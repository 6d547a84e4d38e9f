"""Which instances hold the beginning of a prompt in their prefix caches? An index of what they say, bounded. Pure.

Each KV block has a hash over the whole prompt up to its end (vLLM's, shortened to HASH_BYTES). For each hash the index
keeps who has it as the bits of one integer, so that a look-up for a thousand instances is one `&` a block; it ends
where nobody has the next one. Instances tell what has changed (`CachedBlocks`); what was lost is asked for again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from instance.messages import ALL_CACHED, HASH_BYTES, CachedBlocks
from migration.types import Epoch, InstanceId

MAX_HASHES = 500_000
"""Of all members together; a hash that two have counts twice. 200 to 300 bytes each."""

MAX_MESSAGE_HASHES = 131_072
"""Of one message; an instance says half as many at most. More would hold the gateway's loop up."""

MAX_HASHED_BLOCKS = 1024
"""Of a prompt; what it shares with others beyond them does not count. The gateway's loop hashes: 3 ms for so many
of 16 tokens, 10 ms of 128."""

Blocks = npt.NDArray[np.float64]
"""A number of blocks of each row."""


@dataclass(slots=True)
class _Held:
    """What a member has."""

    epoch: Epoch
    slot: int
    """Its bit."""
    known_to: int = ALL_CACHED
    """All its changes before this one are known; ALL_CACHED: none is."""
    hashes: dict[int, None] = field(default_factory=dict)
    """In order of appearance, but for those that were spared once."""


class PrefixIndex:
    """Of one gateway. Members come and go by `set_members`."""

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        self._max_hashes = max_hashes
        self._held: dict[InstanceId, _Held] = {}
        """In order of rows."""
        self._holders: dict[int, int] = {}
        """Hash -> the bits of those that have it; never 0."""
        self._used: set[int] = set()
        """Hashes that a prompt began with since they were last spared."""
        self._row_of_slot: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self.num_held: Blocks = np.zeros(0)
        """Hashes of each member, by row."""
        self.num_hashes = 0
        self.block_size = 0
        """Tokens of a block that is hashed, as an instance said last."""

    # ---- members and what they say
    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Keep only these, with rows in the order given; a new epoch starts with nothing."""
        epochs = dict(members)
        for name, held in list(self._held.items()):
            if epochs.get(name) != held.epoch:
                self._forget(held)
                del self._held[name]
        taken = {held.slot for held in self._held.values()}
        free = iter(slot for slot in range(len(epochs)) if slot not in taken)
        before, self._held = self._held, {}
        for name, epoch in epochs.items():
            self._held[name] = before.get(name) or _Held(epoch, next(free))
        self._row_of_slot = np.zeros(1 + max((held.slot for held in self._held.values()), default=-1), dtype=np.intp)
        for row, held in enumerate(self._held.values()):
            self._row_of_slot[held.slot] = row
        self.num_held = np.array([len(held.hashes) for held in self._held.values()], dtype=np.float64)

    def clear(self) -> None:
        """Nothing is known of any member."""
        for held in self._held.values():
            held.hashes, held.known_to = {}, ALL_CACHED
        self._holders, self._used, self.num_hashes = {}, set(), 0
        self.num_held[:] = 0

    def cached_from(self, instance: InstanceId) -> int:
        """What a member is to be told with the next subscription (`Subscribe.cached_from`)."""
        held = self._held.get(instance)
        return ALL_CACHED if held is None else held.known_to

    def on_cached(self, message: CachedBlocks) -> bool:
        """Take it in. False: it is from no member, cannot be read, says nothing new, or something is missing before it
        (which the next subscription asks for)."""
        held = self._held.get(InstanceId(message.instance))
        if held is None or held.epoch != message.epoch or not _can_be_read(message):
            return False
        added = _hashes(message.added)
        if message.begin == ALL_CACHED:
            if message.end < held.known_to:
                return False
            self._forget(held)
            # Most of what there is no room for is not even taken in.
            room = max(self._max_hashes - self.num_hashes, self._fair_share)
            added = added[max(0, len(added) - room) :]
        elif not message.begin <= held.known_to < message.end:
            return False
        held.known_to = message.end
        self.block_size = message.block_size
        self._remove(held, _hashes(message.removed))
        self._add(held, added)
        self._make_room()
        return True

    # ---- what is known
    def saved_blocks(self, prefix: Sequence[int]) -> Blocks | None:
        """How many of the first blocks of a prompt each member has, by row; `prefix`: the hashes of its blocks from the
        first on. None: nobody has the first one."""
        holders = self._holders.get
        alive = holders(prefix[0], 0) if prefix else 0
        if not alive:
            return None
        last_had: list[tuple[int, int]] = []
        """(blocks, the bits of those that have so many)."""
        for num_before, block_hash in enumerate(prefix):
            still = alive & holders(block_hash, 0)
            if still != alive:
                last_had.append((num_before, alive ^ still))
                alive = still
                if not still:
                    break
        if alive:
            last_had.append((len(prefix), alive))
        self._used.update(prefix[: last_had[-1][0]])
        return self._by_row(last_had)

    def _by_row(self, counts: Sequence[tuple[int, int]]) -> Blocks:
        """(count, bits) of disjoint sets of members -> the count of each row."""
        width = (len(self._row_of_slot) + 7) // 8
        packed = np.frombuffer(b"".join(bits.to_bytes(width, "little") for _, bits in counts), dtype=np.uint8)
        (at,) = np.nonzero(packed)
        which, bit = np.nonzero(np.unpackbits(packed[at, None], axis=1, bitorder="little"))
        line, byte = np.divmod(at[which], width)
        saved: Blocks = np.zeros(len(self._held))
        saved[self._row_of_slot[byte * 8 + bit]] = np.array([count for count, _ in counts], dtype=np.float64)[line]
        return saved

    # ---- parts
    def _add(self, held: _Held, hashes: Iterable[int]) -> None:
        bit, holders = 1 << held.slot, self._holders
        for one in hashes:
            if one not in held.hashes:
                held.hashes[one] = None
                holders[one] = holders.get(one, 0) | bit
                self.num_hashes += 1
        self.num_held[self._row_of_slot[held.slot]] = len(held.hashes)

    def _remove(self, held: _Held, hashes: Iterable[int]) -> None:
        bit, holders = 1 << held.slot, self._holders
        for one in hashes:
            if one in held.hashes:
                del held.hashes[one]
                self.num_hashes -= 1
                if others := holders[one] ^ bit:
                    holders[one] = others
                else:
                    del holders[one]
                    self._used.discard(one)
        self.num_held[self._row_of_slot[held.slot]] = len(held.hashes)

    def _forget(self, held: _Held) -> None:
        self._remove(held, list(held.hashes))
        held.hashes = {}

    @property
    def _fair_share(self) -> int:
        return self._max_hashes // max(1, len(self._held))

    def _make_room(self) -> None:
        """The oldest of the member with the most go (ties: that with the highest slot), until the bound holds."""
        while (excess := self.num_hashes - self._max_hashes) > 0:
            largest = max(self._held.values(), key=lambda held: (len(held.hashes), held.slot))
            self._drop_oldest(largest, min(excess, max(1, len(largest.hashes) - self._fair_share)))

    def _drop_oldest(self, held: _Held, num_dropped: int) -> None:
        """But those that prompts began with since they were last looked at here are spared, and count as new: else a
        system prompt that has been there from the start would be the first to go (the *clock* of page replacement)."""
        spared, dropped = list[int](), list[int]()
        for one in held.hashes:
            if len(dropped) == num_dropped:
                break
            (spared if one in self._used else dropped).append(one)
        short = num_dropped - len(dropped)
        dropped, spared = dropped + spared[:short], spared[short:]
        self._remove(held, dropped)
        for one in spared:
            self._used.discard(one)
            del held.hashes[one]
            held.hashes[one] = None

    def check_integrity(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Raise AssertionError unless it knows just these members, the bits are those of what each has, and the bound
        holds."""
        assert [(name, held.epoch) for name, held in self._held.items()] == list(members), "other members"
        slots = [held.slot for held in self._held.values()]
        assert len(set(slots)) == len(slots), "two members have one bit"
        assert self.num_held.tolist() == [len(held.hashes) for held in self._held.values()], "how many each has"
        assert [int(self._row_of_slot[slot]) for slot in slots] == list(range(len(slots))), "rows"
        holders: dict[int, int] = {}
        for held in self._held.values():
            for one in held.hashes:
                holders[one] = holders.get(one, 0) | 1 << held.slot
        assert holders == self._holders, "who has which hash"
        assert self._used <= self._holders.keys(), "a hash that nobody has counts as used"
        assert self.num_hashes == sum(len(held.hashes) for held in self._held.values()) <= self._max_hashes


def _can_be_read(message: CachedBlocks) -> bool:
    is_whole = len(message.added) % HASH_BYTES == 0 == len(message.removed) % HASH_BYTES
    is_whole &= len(message.added) + len(message.removed) <= MAX_MESSAGE_HASHES * HASH_BYTES
    return is_whole and message.block_size > 0 and ALL_CACHED <= message.begin <= message.end


def _hashes(data: bytes) -> Any:
    """A list of integers, as `hash_of` makes them."""
    return np.frombuffer(data, dtype=f">u{HASH_BYTES}").tolist()


def hash_of(digest: bytes) -> int:
    """A block's hash as this index knows it: the last HASH_BYTES of vLLM's."""
    return int.from_bytes(digest[-HASH_BYTES:], "big")
