"""How does an asyncio driver use carriers that live in threads? One rank's sender and receiver behind the `BlockMover`
port.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from migration.errors import CopyFailed
from migration.transports.receiver import BlockReceiver
from migration.transports.sender import BlockSender
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId


class RankMover:
    """`BlockMover` over the one rank that lives in this process."""

    def __init__(
        self, sender: BlockSender, receiver: BlockReceiver, *, push_timeout_s: float, num_threads: int
    ) -> None:
        """`num_threads`: pushes (and waits for a ticket to close) at the same time."""
        self._sender = sender
        self._receiver = receiver
        self._push_timeout_s = push_timeout_s
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="kv-push")

    def endpoints(self) -> tuple[str, ...]:
        return (self._receiver.url,)

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        self._receiver.open(migration_id, block_table)

    async def close(self, migration_id: MigrationId) -> None:
        self._sender.break_off(migration_id)
        if not self._receiver.try_close_ticket(migration_id):
            # A thread of its own: the pool's may all be pushing, and this wait lasts one chunk.
            await asyncio.to_thread(self._receiver.close_ticket, migration_id)

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        if len(endpoints) != 1:
            raise CopyFailed(f"one rank here, {len(endpoints)} at the peer")
        work = self._threads.submit(
            self._sender.push,
            migration_id,
            endpoints[0],
            block_table,
            blocks,
            timeout_s=self._push_timeout_s,
            urgent=urgent,
        )
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            self._sender.break_off(migration_id)
            raise

    def shut_down(self) -> None:
        """End the threads, the sender and the receiver."""
        self._sender.close()
        self._receiver.close()
        self._threads.shutdown()
