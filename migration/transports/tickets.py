"""Which blocks may a push of this migration write? The receiver's tickets: opened, looked up by chunk, closed when
idle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from migration.errors import CopyFailed
from migration.transports.store import KVLayout
from migration.types import BlockRange, BlockTable, MigrationId


@dataclass(slots=True)
class _Ticket:
    block_table: BlockTable
    is_open: bool = True
    num_writing: int = 0
    interrupts: list[Callable[[], None]] = field(default_factory=list)
    """How to end the writes that wait for a peer."""


class TicketTable:
    """Thread-safe. A chunk is written only inside `writing`, and `close` waits for those that are."""

    def __init__(self, layout: KVLayout, max_tickets: int) -> None:
        self._layout = layout
        self._max_tickets = max_tickets
        self._changed = threading.Condition()
        self._tickets: dict[MigrationId, _Ticket] = {}

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        """Accept chunks of this migration into these blocks; a second call replaces the table (it has grown).

        Raises `CopyFailed` when too many are open, `ValueError` when the table does not fit the layout.
        """
        if len(block_table) != len(self._layout.group_block_bytes):
            raise ValueError(
                f"{len(block_table)} groups in the table, {len(self._layout.group_block_bytes)} in the layout"
            )
        for group in block_table:
            if group and not 0 <= min(group) <= max(group) < self._layout.num_blocks:
                raise ValueError(f"block ids must lie in [0, {self._layout.num_blocks})")
        with self._changed:
            ticket = self._tickets.get(migration_id)
            if ticket is not None:
                if not ticket.is_open:
                    raise CopyFailed("the ticket is being closed")
                ticket.block_table = block_table
                return
            if len(self._tickets) >= self._max_tickets:
                raise CopyFailed(f"{self._max_tickets} migrations are open already")
            self._tickets[migration_id] = _Ticket(block_table)

    def close(self, migration_id: MigrationId) -> None:
        """Refuse further chunks at once; return when none is being written. Unknown ids are ignored."""
        with self._changed:
            while not self._close_if_idle(migration_id):
                self._changed.wait()

    def try_close(self, migration_id: MigrationId) -> bool:
        """As `close`, but never waits: False when a chunk is still being written (and then `close` waits for it)."""
        with self._changed:
            return self._close_if_idle(migration_id)

    def _close_if_idle(self, migration_id: MigrationId) -> bool:
        ticket = self._tickets.get(migration_id)
        if ticket is None:
            return True
        ticket.is_open = False
        if ticket.num_writing:
            for interrupt in ticket.interrupts:
                interrupt()
            return False
        del self._tickets[migration_id]
        return True

    @contextmanager
    def writing(
        self, migration_id: MigrationId, blocks: BlockRange, interrupt: Callable[[], None] | None = None
    ) -> Iterator[BlockTable]:
        """The physical ids of these block indexes; `close` waits meanwhile. Raises `CopyFailed` if not allowed.

        `interrupt`: ends a write that waits for a peer, which `close` must not do; called from other threads, more
        than once.
        """
        with self._changed:
            ticket = self._tickets.get(migration_id)
            if ticket is None or not ticket.is_open:
                raise CopyFailed("no open ticket for this migration")
            if not 0 <= blocks.first < blocks.end:
                raise CopyFailed("empty or negative range of blocks")
            if any(blocks.end > len(group) for group in ticket.block_table):
                raise CopyFailed(f"blocks {blocks.first}..{blocks.end} lie outside the ticket's table")
            block_ids = tuple(group[blocks.first : blocks.end] for group in ticket.block_table)
            ticket.num_writing += 1
            if interrupt is not None:
                ticket.interrupts.append(interrupt)
        try:
            yield block_ids
        finally:
            with self._changed:
                ticket.num_writing -= 1
                if interrupt is not None:
                    ticket.interrupts.remove(interrupt)
                if not ticket.num_writing:
                    self._changed.notify_all()

    def check_integrity(self) -> None:
        with self._changed:
            assert len(self._tickets) <= self._max_tickets
            assert all(ticket.num_writing >= 0 for ticket in self._tickets.values())
