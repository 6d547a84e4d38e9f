"""How long does a simulated copy of KV take? Links between instances: a latency, a bandwidth, those who share them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from migration.errors import CopyFailed
from migration.types import BlockRange, BlockTable, CopyReceipt, MigrationId


@dataclass(frozen=True, slots=True)
class LinkParams:
    """Of every instance's link, in each direction."""

    bytes_per_s: float = 8e9
    """A 64 Gbit/s network (`llumnix.md` has its copies over one)."""
    latency_s: float = 0.0002


@dataclass(slots=True, eq=False)
class _Transfer:
    source: str
    destination: str
    left_bytes: float
    rate: float
    at_s: float
    """When `left_bytes` was so much."""
    done: asyncio.Future[None]
    timer: asyncio.TimerHandle | None = None


class Links:
    """All copies of one world. A copy has the lesser of its shares of the way out of its source and of the way into its
    destination; shares are equal."""

    def __init__(self, params: LinkParams) -> None:
        self._params = params
        self._loop = asyncio.get_running_loop()
        self._transfers: list[_Transfer] = []
        self._gone: set[str] = set()
        self.way: Callable[[str, str], Awaitable[None]] | None = None
        """Returns when blocks may pass from source to destination, raises CopyFailed when they cannot; None: always."""

    async def copy(self, source: str, destination: str, num_bytes: int) -> None:
        """Raises CopyFailed when the destination is gone, or goes."""
        await asyncio.sleep(self._params.latency_s)
        if self.way is not None:
            await self.way(source, destination)
        if destination in self._gone:
            raise CopyFailed(f"nobody receives at {destination}")
        if num_bytes <= 0:
            return
        transfer = _Transfer(source, destination, num_bytes, 0.0, self._loop.time(), self._loop.create_future())
        self._transfers.append(transfer)
        self._share()
        try:
            await transfer.done
        finally:
            if transfer in self._transfers:  # broken off
                self._forget(transfer)
        if self.way is not None:
            await self.way(source, destination)
            if destination in self._gone:
                raise CopyFailed(f"{destination} is gone")

    def break_off(self, is_cut: Callable[[str, str], bool]) -> None:
        """The connections of these copies are broken."""
        for one in [one for one in self._transfers if is_cut(one.source, one.destination)]:
            if not one.done.done():
                one.done.set_exception(CopyFailed(f"the connection to {one.destination} broke"))
            self._forget(one)

    def remove(self, name: str) -> None:
        """This instance is gone: what was on its way to it fails, and what came from it ends."""
        self._gone.add(name)
        for one in [one for one in self._transfers if name in (one.source, one.destination)]:
            if not one.done.done():
                one.done.set_exception(CopyFailed(f"{name} is gone"))
            self._forget(one)

    def _forget(self, transfer: _Transfer) -> None:
        self._transfers.remove(transfer)
        if transfer.timer is not None:
            transfer.timer.cancel()
        self._share()

    def _share(self) -> None:
        now_s, bytes_per_s = self._loop.time(), self._params.bytes_per_s
        leaving: dict[str, int] = {}
        coming: dict[str, int] = {}
        for one in self._transfers:
            leaving[one.source] = leaving.get(one.source, 0) + 1
            coming[one.destination] = coming.get(one.destination, 0) + 1
        for one in self._transfers:
            rate = bytes_per_s / max(leaving[one.source], coming[one.destination])
            if rate == one.rate:
                continue
            one.left_bytes = max(0.0, one.left_bytes - one.rate * (now_s - one.at_s))
            one.rate, one.at_s = rate, now_s
            if one.timer is not None:
                one.timer.cancel()
            one.timer = self._loop.call_at(now_s + one.left_bytes / rate, self._landed, one)

    def _landed(self, transfer: _Transfer) -> None:
        transfer.timer = None
        if not transfer.done.done():
            transfer.done.set_result(None)
        if transfer in self._transfers:
            self._forget(transfer)


class SimMover:
    """See `migration.ports.BlockMover`: of one instance."""

    def __init__(self, name: str, links: Links, bytes_per_block: int) -> None:
        self._name = name
        self._links = links
        self._bytes_per_block = bytes_per_block
        self.num_bytes = 0

    def endpoints(self) -> tuple[str, ...]:
        return (f"sim://{self._name}",)

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        """Whoever is told the endpoint may push."""

    async def close(self, migration_id: MigrationId) -> None:
        """The driver cancels its own push."""

    async def push(
        self,
        migration_id: MigrationId,  # noqa: ARG002 - the port's shape
        endpoints: tuple[str, ...],
        block_table: BlockTable,  # noqa: ARG002
        blocks: BlockRange,
        *,
        urgent: bool,  # noqa: ARG002
    ) -> CopyReceipt:
        num_bytes = len(blocks) * self._bytes_per_block
        await self._links.copy(self._name, endpoints[0].removeprefix("sim://"), num_bytes)
        self.num_bytes += num_bytes
        return CopyReceipt(len(blocks), num_bytes)
