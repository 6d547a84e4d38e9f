"""What does a carrier need from the memory that holds KV blocks? A layout, a gather and a scatter, called from
threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from migration.types import BlockTable


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's KV memory, as a carrier sees it."""

    group_block_bytes: tuple[int, ...]
    """Bytes of one block in each KV-cache group, all its layers together."""
    num_blocks: int
    """Physical blocks of this rank: every id is in [0, num_blocks)."""
    page_order: str = ""
    """The order of the bytes that `gather` makes, in the store's own words; a peer must say the same."""

    @property
    def index_bytes(self) -> int:
        """Bytes of one block index: its block in every group."""
        return sum(self.group_block_bytes)


class KVStore(Protocol):
    """One rank's KV memory. Called from several threads at once, never twice for the same physical block."""

    @property
    def layout(self) -> KVLayout: ...

    def gather(self, block_ids: BlockTable, out: memoryview) -> None:
        """Write the blocks into `out` (format "B", contiguous, exactly n * index_bytes long).

        `block_ids`: shape [num_groups][n]. The order of the bytes is the store's own (such as group, layer, block);
        both sides must agree on it: `KVLayout.page_order`, compared at the handshake. Must let other threads run
        meanwhile, or take no longer than a chunk lasts.
        """

    def scatter(self, block_ids: BlockTable, data: memoryview) -> None:
        """Write `data` (as `gather` made it) into the blocks. `data` is only valid during the call."""


@runtime_checkable
class HostKVStore(KVStore, Protocol):
    """A store whose memory the processor can address: sockets read and write it without a buffer between."""

    def views(self, block_ids: BlockTable) -> list[memoryview] | None:
        """The memory of the blocks itself (format "B", writable), one piece after the other in the order of `gather`.
        None: not addressable after all (a GPU's)."""


def host_store(store: KVStore) -> HostKVStore | None:
    """The store, if its memory can be addressed. Asked once: the answer takes longer than a page."""
    return store if isinstance(store, HostKVStore) and store.views(((),) * _num_groups(store)) is not None else None


def _num_groups(store: KVStore) -> int:
    return len(store.layout.group_block_bytes)
