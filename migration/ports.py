"""What does a migration need from the world? Ports: a control channel, the two engines, and a mover of KV blocks.

Every port is asynchronous and belongs to the shell. The adapters live elsewhere: engines and the control channel in
`instance`, movers in `migration.transports` (the carriers) and `instance.vllm` (one carrier endpoint a rank).
"""

from __future__ import annotations

from typing import Protocol

from migration.messages import Message
from migration.types import (
    BlockRange,
    BlockTable,
    CopyReceipt,
    Description,
    MigrationId,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)


class ControlChannel(Protocol):
    """One-way messages to one peer. A message may be lost, late or doubled; none is altered."""

    async def send(self, message: Message) -> None:
        """Hand the message over. Raises `ChannelClosed` when it cannot be sent; neither that nor silence proves an
        end: only the agent's word (`SourceDriver.peer_lost`) makes a source take a request back after `Commit`.
        """


class SourceEngine(Protocol):
    """The engine that owns the request. Each call is one visit to the engine's loop, between two steps.

    Every call may raise `EngineFault`. An abort by the client frees a stopped request as it frees a running one.
    """

    async def describe(self, request_id: RequestId) -> Description | Refusal | None:
        """None: no such request (finished or aborted). Refusal: it is there but cannot be moved, and why."""

    async def progress(self, request_id: RequestId) -> Progress | None:
        """None: it is gone (finished or aborted)."""

    async def stop(self, request_id: RequestId, *, without_kv: bool) -> StoppedRequest | NotStopped:
        """Take the request out of the batch, wait until no token is in flight, export its small state; one visit.

        `without_kv`: the exported state says that nothing is computed (settled_tokens 0, empty block table), so that
        the destination computes it again; the blocks stay here until `release`, and `resume` still goes on with them.
        """

    async def resume(self, request_id: RequestId) -> None:
        """Put a stopped request back. Unknown or finished ids, and those that are not stopped, are ignored."""

    async def release(self, request_id: RequestId) -> None:
        """Free a stopped request without emitting any output: the destination owns it. Unknown ids are ignored."""


class DestinationEngine(Protocol):
    """The engine that may receive the request. Each call is one visit to the engine's loop, between two steps.

    Every call but `commit` may raise `EngineFault`. A commit that fails is unknown, so it must end the instance.
    """

    async def reserve(self, migration_id: MigrationId, description: Description) -> Reservation | Refusal:
        """Hold blocks for the description's settled tokens, plus slack for what the source decodes meanwhile.

        0 settled tokens: hold no block. Never more blocks than the longest request this engine can hold.
        """

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        """Hold blocks for at least `num_tokens`. A refusal leaves the reservation as it was."""

    async def wait_ready(self, migration_id: MigrationId) -> Refusal | None:
        """Return when the request could be committed at once (its grammar is compiled, its adapter loaded)."""

    async def commit(self, migration_id: MigrationId, state: bytes) -> Refusal | None:
        """Make the request schedulable, its next token at the next offset. A refusal has cancelled the reservation."""

    async def cancel(self, migration_id: MigrationId) -> None:
        """Give the reserved blocks back. Unknown ids are ignored."""

    async def abort(self, request_id: RequestId) -> None:
        """End a committed request whose client left while it was being committed. Unknown ids are ignored."""


class BlockMover(Protocol):
    """Moves blocks between the KV memory of two instances, rank to peer rank, beside the engine's loop."""

    def endpoints(self) -> tuple[str, ...]:
        """Where a peer pushes to: one URL a rank, such as ``tcp://127.0.0.1:1234`` or ``shm://127.0.0.1:1234``."""

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        """Destination: accept pushes of this migration into these blocks. Called again when the table has grown."""

    async def close(self, migration_id: MigrationId) -> None:
        """Destination: refuse further pushes; returns when no push of it can touch a block any more. Source: break off
        a push of it that is under way, and forget it. Unknown ids are ignored.
        """

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        """Source: copy these block indexes (of the source's table) to the peer; returns when they have landed.

        `urgent`: the request stands still, so the copy is not paced.

        Raises `CopyFailed` (reason) when the peer refused, died, or the deadline passed: nothing may be assumed
        landed.
        """
