"""What do the moving policies (rebalance, drain) look at, and what do they propose? Frozen views in, moves out."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.load import NO_HEADROOM, LoadParams, virtual_usage_blocks


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One live instance whose report is fresh, with the moves in flight already counted in `load`."""

    instance: InstanceId
    load: LoadReport
    requests: tuple[RequestLoad, ...]
    """Those that may be proposed: movable, not on the move."""
    draining: bool
    slots_out: int
    """Migrations it may still send at once."""
    slots_in: int
    signal_age_s: float


@dataclass(frozen=True, slots=True)
class Move:
    """A proposal; the instances may still refuse it."""

    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    priority: int
    num_blocks: int
    reason: str
    signal_age_s: float
    """Age of the older of the two reports it rests on."""


def freeness_steps(load: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """Decode steps until memory is used up if every running request goes on: freeness in tokens; -inf unless it serves.

    A shortage is not divided by the batch: a larger batch would make it look smaller, and taking a request away could
    make it look larger. So a departure always raises the figure, and an arrival always lowers it.
    """
    return steps_left(spare_blocks(load, params), load.num_running, load.block_size)


def spare_blocks(load: LoadReport, params: LoadParams = NO_HEADROOM) -> float:
    """Blocks free of virtual usage; -inf unless it serves."""
    return load.total_blocks - virtual_usage_blocks(load, params)


def steps_left(spare_blocks: float, num_running: int, block_size: int) -> float:
    """As `freeness_steps`, of its parts."""
    tokens = spare_blocks * block_size
    return tokens / max(1, num_running) if tokens >= 0 else tokens


def after_leaving(load: LoadReport, priority: int, num_blocks: int) -> LoadReport:
    """The load once a running request of that size is gone."""
    return msgspec.structs.replace(
        load,
        free_blocks=min(load.total_blocks, load.free_blocks + num_blocks),
        num_running=max(0, load.num_running - 1),
        running_by_priority=_counted(load.running_by_priority, priority, -1),
    )


def after_joining(load: LoadReport, priority: int, num_blocks: int) -> LoadReport:
    """The load once a request of that size has come and runs."""
    return msgspec.structs.replace(
        load,
        free_blocks=load.free_blocks - num_blocks,
        num_running=load.num_running + 1,
        running_by_priority=_counted(load.running_by_priority, priority, +1),
    )


def _counted(
    running_by_priority: tuple[tuple[int, int], ...], priority: int, change: int
) -> tuple[tuple[int, int], ...]:
    counts = dict(running_by_priority)
    counts[priority] = counts.get(priority, 0) + change
    return tuple(sorted((level, num) for level, num in counts.items() if num > 0))
