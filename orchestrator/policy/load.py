"""How loaded is an instance, in one number? Virtual usage and freeness of Llumnix, from the sums of a load report.

`freeness` is read as "decode steps left before blocks run out": blocks free of virtual usage, over the batch.
Source: Sun et al., Llumnix (OSDI'24), as stated in the design; with levels of priority (`levels.py`) in place of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from instance.headroom import Headroom, level_of
from instance.lifecycle import State
from instance.messages import LoadReport


@dataclass(frozen=True, slots=True)
class LoadParams:
    headroom_blocks: Headroom = ()
    """(rank of a level, blocks kept free on an instance that runs requests of that level). All levels, or none."""

    def level(self, priority: int) -> int | None:
        """Rank of the most urgent level that this priority reaches; None: it reaches none."""
        return level_of(self.headroom_blocks, priority)

    def headroom(self, priority: int) -> int:
        """Blocks to keep free beside the requests of this priority's level; 0 unless set."""
        level = self.level(priority)
        return next((blocks for rank, blocks in self.headroom_blocks if rank == level), 0)

    def bearing(self, priority: int) -> int | None:
        """Rank of this priority's level, if that has headroom."""
        if not self.headroom_blocks:
            return None
        level = self.level(priority)
        return level if any(rank == level and blocks > 0 for rank, blocks in self.headroom_blocks) else None

    def headroom_of(self, running_by_priority: tuple[tuple[int, int], ...]) -> int:
        """Blocks to keep free where these run, as (priority, how many): each level that runs counts once."""
        if not self.headroom_blocks:
            return 0
        levels = {self.level(priority) for priority, count in running_by_priority if count > 0}
        return sum(blocks for rank, blocks in self.headroom_blocks if rank in levels)

    def kept_clear_for(self, running_by_priority: tuple[tuple[int, int], ...]) -> int | None:
        """Rank of the most urgent level with headroom that runs there, or None."""
        if not self.headroom_blocks:
            return None
        levels = {self.level(priority) for priority, count in running_by_priority if count > 0}
        return min((rank for rank, blocks in self.headroom_blocks if blocks and rank in levels), default=None)


NO_HEADROOM = LoadParams()
_SERVING = State.SERVING.value
"""An enum's value is looked up slowly, and each tick asks it of every instance, more than once."""


def running_blocks(report: LoadReport) -> int:
    """Blocks held by the requests that run here: neither free nor reserved for migrations coming in."""
    return report.total_blocks - report.free_blocks - report.reserved_blocks


def virtual_usage_blocks(report: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """Sum of the virtual usage of every request here, in blocks; infinite unless the instance serves.

    Running: physical blocks, and the headroom of its level shared by the requests of that level (so each level that
    runs here adds its headroom once). First of the queue: its full demand. Others waiting: 0. Reserved blocks count as
    used: the requests they are for are on their way.
    """
    if report.state != _SERVING:
        return math.inf
    headroom = params.headroom_of(report.running_by_priority) if params.headroom_blocks else 0
    # Running and reserved blocks are together all that are not free.
    return report.total_blocks - report.free_blocks + report.head_of_line_blocks + headroom


def freeness(report: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """(total blocks - virtual usage) / max(1, running requests); may be negative, -inf unless the instance serves."""
    return (report.total_blocks - virtual_usage_blocks(report, params)) / max(1, report.num_running)


def growth_blocks_per_s(report: LoadReport) -> float:
    """Blocks that the running requests take a second as they go on: each decodes one token a step. 0 before any has."""
    block_time_s = report.step_time_s * report.block_size
    return report.num_running / block_time_s if block_time_s > 0 else 0.0
