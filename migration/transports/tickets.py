"""Which blocks may a push of this migration write? The receiver's tickets: opened, looked up by chunk, closed when
idle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
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
        with self._lock:
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
        with self._lock:
            while not self._close_if_idle(migration_id):
                self._idle.wait()

    def try_close(self, migration_id: MigrationId) -> bool:
        """As `close`, but never waits: False when a chunk is still being written (and then `close` waits for it)."""
        with self._lock:
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

    def writing(
        self, migration_id: MigrationId, blocks: BlockRange, interrupt: Callable[[], None] | None = None
    ) -> Writing:
        """A context with the physical ids of these block indexes; `close` waits meanwhile. Entering it raises
        `CopyFailed` if the write is not allowed.

        `interrupt`: ends a write that waits for a peer, which `close` must not do; called from other threads, more
        than once.
        """
        return Writing(self, migration_id, blocks, interrupt)

    def begin_write(
        self, migration_id: MigrationId, first: int, end: int, interrupt: Callable[[], None] | None = None
    ) -> tuple[_Ticket, BlockTable]:
        """`writing` in two halves: the other is `end_write`, in any case. Raises `CopyFailed`."""
        if not 0 <= first < end:
            raise CopyFailed("empty or negative range of blocks")
        with self._lock:
            ticket = self._tickets.get(migration_id)
            if ticket is None or not ticket.is_open:
                raise CopyFailed("no open ticket for this migration")
            block_ids = [group[first:end] for group in ticket.block_table]
            for ids in block_ids:
                if len(ids) != end - first:
                    raise CopyFailed(f"blocks {first}..{end} lie outside the ticket's table")
            ticket.num_writing += 1
            if interrupt is not None:
                ticket.interrupts.append(interrupt)
        return ticket, tuple(block_ids)

    def end_write(self, ticket: _Ticket, interrupt: Callable[[], None] | None = None) -> None:
        with self._lock:
            ticket.num_writing -= 1
            if interrupt is not None:
                ticket.interrupts.remove(interrupt)
            if not ticket.num_writing and not ticket.is_open:
                self._idle.notify_all()

    def check_integrity(self) -> None:
        with self._lock:
            assert len(self._tickets) <= self._max_tickets
            assert all(ticket.num_writing >= 0 for ticket in self._tickets.values())


class Writing:
    """One write into the blocks of a ticket. No generator: that would be a tenth of what a chunk costs the interpreter,
    and the interpreter costs a tenth of a copy."""

    __slots__ = ("_blocks", "_interrupt", "_migration_id", "_ticket", "_tickets")

    def __init__(
        self,
        tickets: TicketTable,
        migration_id: MigrationId,
        blocks: BlockRange,
        interrupt: Callable[[], None] | None,
    ) -> None:
        self._tickets = tickets
        self._migration_id = migration_id
        self._blocks = blocks
        self._interrupt = interrupt

    def __enter__(self) -> BlockTable:
        self._ticket, block_ids = self._tickets.begin_write(
            self._migration_id, self._blocks.first, self._blocks.end, self._interrupt
        )
        return block_ids

    def __exit__(self, *_: object) -> None:
        self._tickets.end_write(self._ticket, self._interrupt)
