"""How do the blocks of an engine with several ranks move? Rank to peer rank, all ranks at once, one receipt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from instance.vllm.rank import Rank
from migration.errors import CopyFailed
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId

T = TypeVar("T")

MAX_PUSHES = 8
"""Pushes of this instance at once, in migrations; the instance's own limit of migrations out is lower."""


class RanksMover:
    """`BlockMover` over the ranks of one engine. A push has landed when it has landed on every rank."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = tuple(ranks)
        # Pushes in a pool of their own: an order to open or close must not wait behind them.
        self._pushers = ThreadPoolExecutor(MAX_PUSHES * max(1, len(self._ranks)), thread_name_prefix="kv-push")
        self._tickets = ThreadPoolExecutor(MAX_PUSHES * max(1, len(self._ranks)), thread_name_prefix="kv-ticket")

    def endpoints(self) -> tuple[str, ...]:
        return tuple(rank.url for rank in self._ranks)

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        await self._every(self._tickets, [partial(rank.open, migration_id, block_table) for rank in self._ranks])

    async def close(self, migration_id: MigrationId) -> None:
        await self._every(self._tickets, [partial(rank.close, migration_id) for rank in self._ranks])

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        if len(endpoints) != len(self._ranks):
            raise CopyFailed(f"{len(self._ranks)} ranks here, {len(endpoints)} at the peer")
        pushes = [
            partial(rank.push, migration_id, url, block_table, blocks, urgent)
            for rank, url in zip(self._ranks, endpoints, strict=True)
        ]
        try:
            receipts = await self._every(self._pushers, pushes)
        except asyncio.CancelledError:
            for rank in self._ranks:
                self._tickets.submit(rank.close, migration_id)  # breaks the push off; it has no ticket at a source
            raise
        return CopyReceipt(receipts[0].num_blocks, sum(receipt.num_bytes for receipt in receipts))

    def shut_down(self) -> None:
        """End the threads. The ranks are shut down by their engine."""
        self._pushers.shutdown(wait=False, cancel_futures=True)
        self._tickets.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    async def _every(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Every result; when a call has failed, its exception, but only after all are over: none still writes then."""
        loop = asyncio.get_running_loop()
        waiting: list[Awaitable[T]] = [loop.run_in_executor(pool, call) for call in calls]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]
