"""Which full blocks can be found in vLLM's prefix cache, and which come and go? Noted where vLLM keeps them.

`BlockPool.cached_block_hash_to_block` is replaced by a map that does the same and takes notes, once somebody asks.
vLLM's own KV events are not used: they cost a slice of tokens and extra keys a block, and repeat what is reused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from instance.cached import CacheNotes
from instance.messages import HASH_BYTES
from instance.types import CachedChanges
from instance.vllm import compat

_LOG = logging.getLogger(__name__)


class NotingMap(BlockHashToBlockMap):
    """vLLM's map of cached blocks, which notes the hashes of one KV-cache group that appear in it and disappear."""

    def __init__(self, known: Any, group: int, notes: CacheNotes) -> None:
        """Takes over what `known` holds."""
        super().__init__()
        self._cache = known._cache
        self._notes = notes
        # A key is a block hash and its group's number; both methods run for each block that is filled or given away.
        self._ending = bytes(make_block_hash_with_group_id(BlockHash(b""), group))
        self._short = slice(-len(self._ending) - HASH_BYTES, -len(self._ending))

    def insert(self, key: bytes, block: Any) -> None:
        if not self._notes.is_void and key not in self._cache and key.endswith(self._ending):
            self._notes.note(key[self._short], True)
        super().insert(key, block)

    def pop(self, key: bytes, block_id: int) -> Any:
        block = super().pop(key, block_id)
        # Where the key is there still, another block has the same content.
        if block is not None and not self._notes.is_void and key not in self._cache and key.endswith(self._ending):
            self._notes.note(key[self._short], False)
        return block

    def hashes(self) -> Iterable[bytes]:
        """Of all that is cached in the group, in order of appearance: the last HASH_BYTES of each block hash, as vLLM
        shortens it in its own KV events."""
        ending, short = self._ending, self._short
        return [key[short] for key in self._cache if key.endswith(ending)]


class CacheWatch:
    """What an engine tells of its prefix cache. Costs nothing before the first `take`."""

    def __init__(self, scheduler: Any, block_size: int) -> None:
        """`scheduler`: vLLM's. `block_size`: tokens of a block as the fleet counts them."""
        self._notes = CacheNotes()
        self._map: NotingMap | None = None
        self._group: int | None = None
        reason = compat.why_unsupported() or compat.why_cache_untold(scheduler)
        if reason is None:
            self._pool = scheduler.kv_cache_manager.block_pool
            self._group = group_of(scheduler, block_size)
            reason = None if self._group is not None else f"no full attention in blocks of {block_size} tokens"
        if self._group is None:
            _LOG.info("what the prefix cache holds is not told: %s", reason)

    def take(self) -> CachedChanges | None:
        """See `Engine.take_cached_changes`."""
        if self._group is None:
            return None
        found = self._pool.cached_block_hash_to_block
        if self._map is None or found is not self._map:  # `reset_prefix_cache` makes a new one
            self._notes.void()
            self._map = NotingMap(found, self._group, self._notes)
            self._pool.cached_block_hash_to_block = self._map
        return self._notes.take(self._map.hashes)


def group_of(scheduler: Any, block_size: int) -> int | None:
    """The first full-attention group whose blocks are those that hashes and reports count in. None: there is none.

    A block that a window has left is not cached, so a window's group says less of a prefix; one of other blocks has
    hashes that a prompt's do not equal.
    """
    if scheduler.kv_cache_manager.block_pool.hash_block_size != block_size:
        return None
    for group in scheduler.kv_cache_manager.coordinator.single_type_managers:
        if type(group).__name__ == "FullAttentionManager" and group.block_size == block_size:
            return int(group.kv_cache_group_id)
    return None
