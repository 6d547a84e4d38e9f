"""Which running request should move where? `plan_rebalance`, written out: every pair is looked at anew for every move.

Repeatedly pair the instance with the lowest freeness with the one with the highest. The source must be short of
memory, and the move must pay: also after it the destination lacks nothing, and is freer than the source by a margin. So
the lower of the two only ever rises, no move is worth undoing, and a move that pays nothing is not made. No instance
both gives and takes. A blocked head of the queue makes freeness negative, hence its instance a source: room is made for
it (defragmentation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from instance.messages import LoadReport, RequestLoad
from migration.types import RequestId
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving,
    freeness_steps,
    outlives_its_copy,
)
from orchestrator.policy.rebalance import RebalanceParams, Resting

_RUNNING = "running"


@dataclass(slots=True)
class _Side:
    """An instance while the plan is made: its view and what the moves planned so far make of it."""

    view: InstanceView
    load: LoadReport
    slots_out: int
    slots_in: int
    params: RebalanceParams
    is_exhausted: bool = False
    """As a source it has nothing more to propose in this tick."""
    has_given: bool = False
    has_taken: bool = False

    @property
    def freeness_steps(self) -> float:
        return freeness_steps(self.load, self.params.load)


def plan_rebalance(views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:
    """Moves for this tick, in the order found. The same views give the same plan, in whatever order they come."""
    sides = [
        _Side(view, view.load, view.slots_out, view.slots_in, params)
        for view in sorted(views, key=lambda view: view.instance)
        if not view.draining
    ]
    taken: set[RequestId] = set(resting.requests)
    moves: list[Move] = []
    while len(moves) < params.max_moves:
        source = _next_source(sides, params)
        if source is None:
            break
        move = _best_move(source, sides, taken, resting, params)
        if move is None:
            source.is_exhausted = True
            continue
        moves.append(move)
        taken.add(move.request_id)
    return tuple(moves)


def _next_source(sides: list[_Side], params: RebalanceParams) -> _Side | None:
    """The least free instance that is short of memory and may still send."""
    short = (
        side
        for side in sides
        if not (side.is_exhausted or side.has_taken)
        and side.slots_out > 0
        and side.freeness_steps < params.threshold_steps
    )
    return min(short, key=lambda side: (side.freeness_steps, side.view.instance), default=None)


def _best_move(
    source: _Side, sides: list[_Side], taken: set[RequestId], resting: Resting, params: RebalanceParams
) -> Move | None:
    """The first request, in the order of the rule, that pays at the freest destination; books the move."""
    destinations = sorted(
        (
            side
            for side in sides
            if side is not source
            and side.slots_in > 0
            and not side.has_given
            and (source.view.instance, side.view.instance) not in resting.pairs
        ),
        key=lambda side: (-side.freeness_steps, side.view.instance),
    )
    candidates = sorted(
        (
            request
            for request in source.view.requests
            if request.movable
            and request.status == _RUNNING
            and RequestId(request.request_id) not in taken
            and outlives_its_copy(source.view, request)
        ),
        key=lambda request: _order(request, source.load.head_of_line_blocks - source.load.free_blocks),
    )
    clear_for = _kept_clear_for(source, params)
    if clear_for is not None:
        candidates = [request for request in candidates if request.priority > clear_for]
    for level in sorted({_level(request, params) for request in candidates}, reverse=True):
        for destination in destinations:
            for request in candidates:
                if _level(request, params) != level:
                    continue
                gain = _gain(source, destination, request, params)
                if gain is not None:
                    return _book(source, destination, request, gain)
    return None


def _level(request: RequestLoad, params: RebalanceParams) -> float:
    """All alike where there are no levels."""
    level = params.load.level(request.priority)
    return math.inf if level is None else level


def _kept_clear_for(source: _Side, params: RebalanceParams) -> int | None:
    """The most urgent rank with headroom that runs there, when memory is short of nothing but headroom."""
    if freeness_steps(source.load) < params.threshold_steps:
        return None
    ranks = [params.load.level(priority) for priority, num in source.load.running_by_priority if num]
    with_headroom = [rank for rank in ranks if rank is not None and params.load.headroom(rank)]
    return min(with_headroom, default=None)


def _order(request: RequestLoad, missing_blocks: int) -> tuple[int, int, int, str]:
    """Lower priority first (vLLM: the higher number), then shorter, then by name. Where the head of the queue lacks
    blocks, those that free enough for it, the smallest first, then the others, the largest first."""
    if missing_blocks <= 0:
        return (-request.priority, 0, request.num_prompt_tokens + request.num_output_tokens, request.request_id)
    if request.num_blocks >= missing_blocks:
        return (-request.priority, 0, request.num_blocks, request.request_id)
    return (-request.priority, 1, -request.num_blocks, request.request_id)


@dataclass(frozen=True, slots=True)
class _Gain:
    source_before: float
    source_after: float
    destination_before: float
    destination_after: float


def _gain(source: _Side, destination: _Side, request: RequestLoad, params: RebalanceParams) -> _Gain | None:
    """What the move makes of both (decode steps), or None when it does not pay."""
    if request.num_blocks > destination.load.free_blocks:
        return None
    gain = _Gain(
        source_before=source.freeness_steps,
        source_after=freeness_steps(after_leaving(source.load, request.priority, request.num_blocks), params.load),
        destination_before=destination.freeness_steps,
        destination_after=freeness_steps(
            after_joining(destination.load, request.priority, request.num_blocks), params.load
        ),
    )
    pays = (
        gain.destination_after >= 0
        and gain.destination_before - gain.source_before > params.margin_steps
        and gain.destination_after - gain.source_after > params.margin_steps
        and gain.source_after > gain.source_before
    )
    return gain if pays else None


def _book(source: _Side, destination: _Side, request: RequestLoad, gain: _Gain) -> Move:
    cause = "rebalance"
    if source.view.load.head_of_line_blocks > source.view.load.free_blocks:
        cause = "defragment"
    elif (clear_for := _kept_clear_for(source, source.params)) is not None:
        kept = source.params.load.headroom_of(source.load.running_by_priority)
        cause = f"isolate: {kept} blocks are kept free beside requests of priority {clear_for} or more urgent"
    source.load = after_leaving(source.load, request.priority, request.num_blocks)
    source.slots_out -= 1
    source.has_given = destination.has_taken = True
    destination.load = after_joining(destination.load, request.priority, request.num_blocks)
    destination.slots_in -= 1
    return Move(
        request_id=RequestId(request.request_id),
        source=source.view.instance,
        destination=destination.view.instance,
        priority=request.priority,
        num_blocks=request.num_blocks,
        reason=(
            f"{cause}: source {gain.source_before:.0f} -> {gain.source_after:.0f}, "
            f"destination {gain.destination_before:.0f} -> {gain.destination_after:.0f} decode steps left"
        ),
        signal_age_s=max(source.view.signal_age_s, destination.view.signal_age_s),
    )
