"""Which waiting request should begin elsewhere? `plan_requeue`, written out: all is looked at anew for every move.

A queue is blocked where its head does not fit, or nothing more may run, or a more urgent level that runs there would
lack headroom beside it. The queue whose first has lived longest is looked at first (but for urgency). Of what waits
there, the first that has somewhere to go goes to the instance that has the most decode steps left with it: one where it
begins at once, beside all that wait there and have lived longer, and each that runs then has a block more to grow into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from instance.messages import LoadReport, RequestLoad
from migration.types import RequestId
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving_queue,
    blocks_wanted,
    freeness_steps,
    outlives_its_copy,
)
from orchestrator.policy.rebalance import RebalanceParams, Resting


@dataclass(slots=True)
class _Side:
    view: InstanceView
    load: LoadReport
    slots_out: int
    slots_in: int
    gone: set[str] = field(default_factory=set)
    has_given: bool = False
    has_taken: bool = False

    def queue(self) -> list[RequestLoad]:
        waiting = [one for one in self.view.requests if one.status in ("waiting", "preempted")]
        waiting.sort(key=_place)
        return [one for one in waiting if one.request_id not in self.gone]

    def first(self) -> tuple[int, float, str]:
        queue = self.queue()
        return _place(queue[0]) if queue else (0, math.inf, "")

    def ahead_of(self, request: RequestLoad) -> tuple[int, int]:
        """(requests, blocks they lack); those that are not known are before it."""
        if not self.load.num_waiting:
            return 0, 0
        known = [one for one in self.view.requests if one.status in ("waiting", "preempted")]
        before = [one for one in known if _place(one) < _place(request)]
        blocks = max(self.load.waiting_blocks, self.load.head_of_line_blocks) - sum(map(self._lacks, known))
        num = max(0, self.load.num_waiting - len(known))
        return len(before) + num, sum(map(self._lacks, before)) + max(0, blocks)

    def _lacks(self, request: RequestLoad) -> int:
        return blocks_wanted(request, self.load.block_size) - request.num_blocks


def _place(request: RequestLoad) -> tuple[int, float, str]:
    return (request.priority, -request.waited_s - request.arrived_s, request.request_id)


def plan_requeue(views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:
    sides = [
        _Side(view, view.load, view.slots_out, view.slots_in)
        for view in sorted(views, key=lambda view: view.instance)
        if not view.draining
    ]
    moves: list[Move] = []
    while len(moves) < params.max_moves:
        move = _next(sides, resting, params)
        if move is None:
            break
        moves.append(move)
    return tuple(moves)


def _next(sides: list[_Side], resting: Resting, params: RebalanceParams) -> Move | None:
    for source in sorted(sides, key=lambda side: (side.first(), side.view.instance)):
        if source.has_taken or source.slots_out <= 0 or why_blocked(source.load, source.queue(), params.load) is None:
            continue
        for request in source.queue():
            if not request.movable or RequestId(request.request_id) in resting.requests:
                continue
            if not outlives_its_copy(source.view, request):
                continue
            able = [
                (steps_after(side.load, request, params, side.ahead_of(request)[1]), side)
                for side in sides
                if side is not source
                and not side.has_given
                and side.slots_in > 0
                and (source.view.instance, side.view.instance) not in resting.pairs
                and takes(side.load, request, params, *side.ahead_of(request))
            ]
            if able:
                left, there = min(able, key=lambda option: (-option[0], option[1].view.instance))
                return _book(source, there, request, left, params)
    return None


def why_blocked(load: LoadReport, queue: list[RequestLoad], levels: LoadParams) -> str | None:
    wanted, free = load.head_of_line_blocks, load.free_blocks
    if load.num_waiting == 0:
        return None
    if wanted > free:
        return f"the first in the queue wants {wanted} blocks, {free} are free here"
    if load.max_running and load.num_running >= load.max_running:
        return f"all {load.max_running} that may run at once do here, {free} blocks are free"
    kept = headroom_above(load, queue[0].priority, levels) if queue else 0
    if free - wanted < kept:
        return (
            f"the first in the queue wants {wanted} blocks, {free} are free here, {kept} are kept for more urgent ones"
        )
    return None


def headroom_above(load: LoadReport, priority: int, levels: LoadParams) -> int:
    """Of the levels that run there and are more urgent than this priority's."""
    running = {levels.level(one) for one, num in load.running_by_priority if num}
    own = levels.level(priority)
    return sum(blocks for rank, blocks in levels.headroom_blocks if rank in running and (own is None or rank < own))


def takes(load: LoadReport, request: RequestLoad, params: RebalanceParams, num_ahead: int, blocks_ahead: int) -> bool:
    return (not load.max_running or load.num_running + num_ahead < load.max_running) and steps_after(
        load, request, params, blocks_ahead
    ) >= load.block_size


def steps_after(load: LoadReport, request: RequestLoad, params: RebalanceParams, blocks_ahead: int) -> float:
    """What waits there and has come later is as if it were not."""
    joined = after_joining(load, request.priority, blocks_ahead + blocks_wanted(request, load.block_size))
    return freeness_steps(msgspec.structs.replace(joined, head_of_line_blocks=0), params.load)


def _book(source: _Side, there: _Side, request: RequestLoad, left: float, params: RebalanceParams) -> Move:
    wanted = blocks_wanted(request, source.load.block_size)
    why = why_blocked(source.load, source.queue(), params.load)
    source.gone.add(request.request_id)
    source.load = after_leaving_queue(source.load, request, source.queue())
    source.slots_out -= 1
    there.load = after_joining(there.load, request.priority, wanted)
    there.slots_in -= 1
    source.has_given = there.has_taken = True
    return Move(
        request_id=RequestId(request.request_id),
        source=source.view.instance,
        destination=there.view.instance,
        priority=request.priority,
        num_blocks=request.num_blocks,
        reason=f"requeue: {why}; it wants {wanted}, {left:.0f} decode steps left there with it",
        signal_age_s=max(source.view.signal_age_s, there.view.signal_age_s),
    )
