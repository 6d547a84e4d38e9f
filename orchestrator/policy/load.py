"""How loaded is an instance, in one number? Virtual usage and freeness of Llumnix, from the sums of a load report.

`freeness` is read as "decode steps left before blocks run out": blocks free of virtual usage, over the batch.
Source: Sun et al., Llumnix (OSDI'24), as stated in the design; `headroom` is 0 until priorities have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from instance.lifecycle import State
from instance.messages import LoadReport


@dataclass(frozen=True, slots=True)
class LoadParams:
    headroom_blocks: tuple[tuple[int, int], ...] = ()
    """(priority, blocks kept free on an instance that runs requests of that priority)."""

    def headroom(self, priority: int) -> int:
        """Blocks to keep free beside the requests of this priority; 0 unless set."""
        return next((blocks for known, blocks in self.headroom_blocks if known == priority), 0)


NO_HEADROOM = LoadParams()


def running_blocks(report: LoadReport) -> int:
    """Blocks held by the requests that run here: neither free nor reserved for migrations coming in."""
    return report.total_blocks - report.free_blocks - report.reserved_blocks


def virtual_usage_blocks(report: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """Sum of the virtual usage of every request here, in blocks; infinite unless the instance serves.

    Running: physical blocks, and headroom(priority) shared by the requests of that priority (so each priority that
    runs here adds its headroom once). First of the queue: its full demand. Others waiting: 0. Reserved blocks count as
    used: the requests they are for are on their way.
    """
    if report.state != State.SERVING.value:
        return math.inf
    headroom = sum(params.headroom(priority) for priority, count in report.running_by_priority if count > 0)
    return running_blocks(report) + report.reserved_blocks + report.head_of_line_blocks + headroom


def freeness(report: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """(total blocks - virtual usage) / max(1, running requests); may be negative, -inf unless the instance serves."""
    return (report.total_blocks - virtual_usage_blocks(report, params)) / max(1, report.num_running)


def growth_blocks_per_s(report: LoadReport) -> float:
    """Blocks that the running requests take a second as they go on: each decodes one token a step. 0 before any has."""
    block_time_s = report.step_time_s * report.block_size
    return report.num_running / block_time_s if block_time_s > 0 else 0.0
