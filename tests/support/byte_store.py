"""What stands in for a rank's KV memory in carrier tests? Plain bytes, two groups of unequal block size."""

from __future__ import annotations

import threading
from collections.abc import Callable

from migration.transports import KVLayout
from migration.types import BlockTable

GROUP_BLOCK_BYTES = (96, 32)
NUM_BLOCKS = 256


class ByteStore:
    """Blocks as bytearrays; `before_scatter` lets a test hold a scatter in the middle."""

    def __init__(self, seed: int, group_block_bytes: tuple[int, ...] = GROUP_BLOCK_BYTES) -> None:
        self.layout = KVLayout(group_block_bytes, NUM_BLOCKS)
        self.blocks = [
            [
                bytearray((seed * 31 + group * 17 + block * 7 + i) % 251 for i in range(size))
                for block in range(NUM_BLOCKS)
            ]
            for group, size in enumerate(group_block_bytes)
        ]
        self.before_scatter: Callable[[], object] = lambda: None
        self.scattered: list[BlockTable] = []
        self._lock = threading.Lock()

    def gather(self, block_ids: BlockTable, out: memoryview) -> None:
        data = b"".join(self.blocks[group][block] for group, ids in enumerate(block_ids) for block in ids)
        out[:] = data

    def scatter(self, block_ids: BlockTable, data: memoryview) -> None:
        self.before_scatter()
        start = 0
        with self._lock:
            self.scattered.append(block_ids)
            for group, ids in enumerate(block_ids):
                size = self.layout.group_block_bytes[group]
                for block in ids:
                    self.blocks[group][block][:] = data[start : start + size]
                    start += size
        assert start == len(data)


class MappedByteStore(ByteStore):
    """One whose memory sockets may read and write themselves: `migration.transports.store.HostKVStore`."""

    def views(self, block_ids: BlockTable) -> list[memoryview]:
        if any(block_ids):
            self.before_scatter()
            with self._lock:
                self.scattered.append(block_ids)
        return [memoryview(self.blocks[group][block]) for group, ids in enumerate(block_ids) for block in ids]
