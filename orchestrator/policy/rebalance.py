"""Which running request should move where, so that the fullest instance gains more than the emptiest loses?

First rule: repeatedly pair the instance with the lowest freeness with the one with the highest. The source must be
short of memory, and the move must pay: also after it the destination lacks nothing, and is freer than the source by a
margin. So the lower of the two only ever rises, no move is worth undoing, and a move that pays nothing is not made.
In one tick no instance both gives and takes.
Nor is one whose copy would take so long that the request had better stay: it must be expected to live twice as long. A
blocked head of the queue makes freeness negative, hence its instance a source: room is made for it (defragmentation).
So does a level whose headroom is not there: its less urgent neighbours move away (isolation), it never does for that.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving,
    freeness_steps,
    move_of,
    outliving_their_copies,
    spare_blocks,
    steps_left,
)

_RUNNING = "running"


@dataclass(frozen=True, slots=True)
class RebalanceParams:
    """Thresholds in decode steps: how long memory lasts at the present batch, so they need no tuning to a trace."""

    threshold_steps: float = 512.0
    """Below it an instance is a source. Whether another can take from it is a matter of the margin alone: where all are
    short, those that are worst off are still relieved by the others."""
    margin_steps: float = 64.0
    """By so much must the destination be freer than the source, before and after the move."""
    rest_s: float = 1.0
    """A moved request stays where it is for so long: two ticks, by when both its ends have reported without it, or with
    it. Longer rests (10 s) let heads of queues wait for memory that a moved request could have left."""
    pair_rest_s: float = 1.0
    """After a refusal or a failure this source asks this destination no more for so long. Most refusals are of blocks
    that were taken meanwhile, which some reports later are told."""
    max_moves: int = 8
    """Moves proposed in one tick."""
    max_destinations: int = 8
    """The freest ones with room, with which a source is compared. It bounds the work of a tick in a large fleet."""
    attain_margin: float = 0.1
    """Share of a target by which it must be missed before a move for its sake, and be met after it (`attain.py`)."""
    attain_sources: int = 8
    """Instances that miss targets, of which a tick looks at the requests: those that miss by the least first, so that
    what nothing can mend does not stand before what a move does."""
    attain_requests: int = 4
    """Requests that miss, for which a tick looks for another place; of each of those instances, and each time anew."""
    load: LoadParams = field(default_factory=LoadParams)
    """Headroom of each level."""


@dataclass(frozen=True, slots=True)
class Resting:
    """What must be left alone for now."""

    requests: frozenset[RequestId] = frozenset()
    pairs: frozenset[tuple[InstanceId, InstanceId]] = frozenset()


Plan = Callable[[tuple[InstanceView, ...], Resting, RebalanceParams], tuple[Move, ...]]
"""A policy that says which requests should move where."""


@dataclass(slots=True, eq=False)
class _Side:
    """An instance while the plan is made: its view and what the moves planned so far make of it."""

    view: InstanceView
    load: LoadReport
    slots_out: int
    slots_in: int
    params: LoadParams
    spare: float = 0.0
    """Blocks free of virtual usage now."""
    steps: float = 0.0
    """Its freeness now, in decode steps."""
    has_given: bool = False
    has_taken: bool = False
    """In this plan."""

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        """After each change of its load."""
        self.spare = spare_blocks(self.load, self.params)
        self.steps = steps_left(self.spare, self.load.num_running, self.load.block_size)


_Filed = tuple[float, InstanceId, InstanceView]
"""Names differ, so that views are never compared."""


def _as_source(side: _Side) -> _Filed:
    return (side.steps, side.view.instance, side.view)


def _as_destination(side: _Side) -> _Filed:
    return (-side.steps, side.view.instance, side.view)


class _Plan:
    """A plan while it is made: who is short and who is not, each in order, and nobody looked at twice without cause."""

    def __init__(self, views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> None:
        self._resting = resting
        self._params = params
        self._taken: set[str] = set(resting.requests)
        self._sides: dict[InstanceId, _Side] = {}
        """Of those that were looked at more closely."""
        threshold, load_params = params.threshold_steps, params.load
        steps = [(freeness_steps(view.load, load_params), view) for view in views if not view.draining]
        self._sources: list[_Filed] = [
            (left, view.instance, view) for left, view in steps if -math.inf < left < threshold and view.slots_out > 0
        ]
        """A heap, the least free first."""
        heapq.heapify(self._sources)
        self._destinations: list[_Filed] = [
            (-left, view.instance, view) for left, view in steps if left >= 0 and view.slots_in > 0
        ]
        """The freest first."""
        self._destinations.sort()

    def moves(self) -> tuple[Move, ...]:
        moves: list[Move] = []
        while len(moves) < self._params.max_moves and self._sources and self._destinations:
            source = self._side(heapq.heappop(self._sources)[2])
            if source.has_taken:
                continue
            if -self._destinations[0][0] - source.steps <= self._params.margin_steps:
                break  # nobody is free enough for it, nor for those behind it, which are freer than it is
            found = self._best(source)
            if found is None:
                continue  # as a source it has nothing more to propose in this tick
            destination, request, gain = found
            moves.append(self._book(source, destination, request, gain))
        return tuple(moves)

    def _side(self, view: InstanceView) -> _Side:
        side = self._sides.get(view.instance)
        if side is None:
            side = _Side(view, view.load, view.slots_out, view.slots_in, self._params.load)
            self._sides[view.instance] = side
        return side

    def _free_blocks(self, view: InstanceView) -> int:
        side = self._sides.get(view.instance)
        return (view if side is None else side).load.free_blocks

    def _is_source(self, side: _Side) -> bool:
        """Short of memory; an instance that does not serve is neither."""
        is_short = -math.inf < side.steps < self._params.threshold_steps
        return is_short and side.slots_out > 0 and not side.has_taken

    def _is_destination(self, side: _Side) -> bool:
        return side.steps >= 0 and side.slots_in > 0 and not side.has_given

    def _best(self, source: _Side) -> tuple[_Side, RequestLoad, _Gain] | None:
        """The first request, in the order of the rule, that pays at the freest destination where one does."""
        for movable in _groups(source, self._taken, self._params):
            found = self._best_of(source, movable)
            if found is not None:
                return found
        return None

    def _best_of(self, source: _Side, movable: list[RequestLoad]) -> tuple[_Side, RequestLoad, _Gain] | None:
        smallest = min((request.num_blocks for request in movable), default=None)
        if smallest is None:
            return None
        candidates: list[RequestLoad] | None = None
        for destination in self._asked(source, smallest):
            candidates = candidates or _in_order(source.load, movable)
            for request in candidates:
                gain = _gain(source, destination, request, self._params)
                if gain is not None:
                    return destination, request, gain
        return None

    def _asked(self, source: _Side, smallest: int) -> Iterator[_Side]:
        """Of the freest ones those where a request of `smallest` blocks would pay. The larger a request, the less free
        is the destination after it, and the freer the source: where the smallest does not pay, none does. (One that
        takes its level's headroom along makes the source freer still, and the destination less free.)"""
        num_looked_at = 0
        for minus_steps, name, view in self._destinations:
            if -minus_steps - source.steps <= self._params.margin_steps:
                return  # the source itself is among those that are left
            if smallest > self._free_blocks(view) or (source.view.instance, name) in self._resting.pairs:
                continue
            num_looked_at += 1
            if num_looked_at > self._params.max_destinations:
                return
            destination = self._side(view)
            if _may_pay(source, destination, smallest, self._params):
                yield destination

    def _book(self, source: _Side, destination: _Side, request: RequestLoad, gain: _Gain) -> Move:
        """Count the move as made: both sides stand elsewhere now."""
        cause = _cause(source, self._params)
        for side in (source, destination):
            if self._is_destination(side):
                del self._destinations[bisect.bisect_left(self._destinations, _as_destination(side))]
        source.has_given = destination.has_taken = True
        source.load = after_leaving(source.load, request.priority, request.num_blocks)
        source.slots_out -= 1
        destination.load = after_joining(destination.load, request.priority, request.num_blocks)
        destination.slots_in -= 1
        for side in (source, destination):
            side.look()
        if self._is_source(source):
            heapq.heappush(self._sources, _as_source(source))
        if self._is_destination(destination):
            bisect.insort(self._destinations, _as_destination(destination))
        self._taken.add(request.request_id)
        return _move(source, destination, request, gain, cause)


def plan_rebalance(views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:
    """Moves for this tick, in the order found. The same views give the same plan, in whatever order they come.

    Work: one look at each instance, and for each that is short at most one look at each of its requests and at
    `max_destinations` others; tests/support/slow_rebalance.py is the same rule without these short cuts.
    """
    return _Plan(views, resting, params).moves()


def _groups(source: _Side, taken: set[str], params: RebalanceParams) -> list[list[RequestLoad]]:
    """The requests that may be asked, level by level, the least urgent first; together where levels have no headroom.

    Where memory is short only of headroom, it is made by moving requests that are less urgent than the level it is for.
    """
    movable = [
        request
        for request in outliving_their_copies(source.view)
        if request.movable and request.status == _RUNNING and request.request_id not in taken
    ]
    if not params.load.headroom_blocks:
        return [movable]
    clear_for = _kept_clear_for(source.load, params)
    if clear_for is not None:
        movable = [request for request in movable if request.priority > clear_for]
    by_level: dict[float, list[RequestLoad]] = {}
    for request in movable:
        level = params.load.level(request.priority)
        by_level.setdefault(math.inf if level is None else level, []).append(request)
    return [by_level[level] for level in sorted(by_level, reverse=True)]


def _kept_clear_for(load: LoadReport, params: RebalanceParams) -> int | None:
    """Rank of the level whose headroom is all that this instance is short of, or None."""
    if freeness_steps(load) < params.threshold_steps:
        return None
    return params.load.kept_clear_for(load.running_by_priority)


def _in_order(load: LoadReport, requests: list[RequestLoad]) -> list[RequestLoad]:
    """Lower priority first (vLLM: the higher number), then shorter, then by name.

    Where the head of the queue does not fit, first those whose leaving alone makes room for it, the smallest of them
    first, then the others, the largest first: so it begins after as few moves, and as small ones, as can be.
    """
    missing = load.head_of_line_blocks - load.free_blocks
    if missing <= 0:
        return sorted(requests, key=_shortest_first)
    return sorted(requests, key=lambda one: _room_first(one, missing))


def _shortest_first(request: RequestLoad) -> tuple[int, int, str]:
    return (-request.priority, request.num_prompt_tokens + request.num_output_tokens, request.request_id)


def _room_first(request: RequestLoad, missing_blocks: int) -> tuple[int, bool, int, str]:
    is_enough = request.num_blocks >= missing_blocks
    size = request.num_blocks if is_enough else -request.num_blocks
    return (-request.priority, not is_enough, size, request.request_id)


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
        source_before=source.steps,
        source_after=freeness_steps(after_leaving(source.load, request.priority, request.num_blocks), params.load),
        destination_before=destination.steps,
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


def _may_pay(source: _Side, destination: _Side, num_blocks: int, params: RebalanceParams) -> bool:
    """Whether the destination would lack nothing and be freer than the source, after a request of that size had moved.

    As `_gain` tells it, without making the reports of afterwards: this is asked of every pair.
    """
    here, there = source.load, destination.load
    freed = min(num_blocks, here.total_blocks - here.free_blocks)
    after = steps_left(destination.spare - num_blocks, there.num_running + 1, there.block_size)
    if after < 0:
        return False
    return after - steps_left(source.spare + freed, here.num_running - 1, here.block_size) > params.margin_steps


def _cause(source: _Side, params: RebalanceParams) -> str:
    if source.view.load.head_of_line_blocks > source.view.load.free_blocks:
        return "defragment"
    clear_for = _kept_clear_for(source.load, params)
    if clear_for is None:
        return "rebalance"
    headroom = params.load.headroom_of(source.load.running_by_priority)
    return f"isolate: {headroom} blocks are kept free beside requests of priority {clear_for} or more urgent"


def _move(source: _Side, destination: _Side, request: RequestLoad, gain: _Gain, cause: str) -> Move:
    reason = (
        f"{cause}: source {gain.source_before:.0f} -> {gain.source_after:.0f}, "
        f"destination {gain.destination_before:.0f} -> {gain.destination_after:.0f} decode steps left"
    )
    return move_of(request, source.view, destination.view, reason)
