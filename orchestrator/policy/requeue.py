"""Which waiting request should begin elsewhere? One of a queue that cannot move on, where another instance has room.

Nothing is copied of a request that holds no blocks: its move costs a few messages, and it begins at once. So this is
asked before running requests move. Engines keep their queues by arrival, wherever that was. So it begins there before
all that have come later and wait there for more room; what has come earlier must have room beside it. In one plan no
instance both sends and receives.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from instance.headroom import kept_from
from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving_queue,
    blocks_missing,
    blocks_wanted,
    is_queued,
    move_of,
    outlives_its_copy,
    queue_order,
    steps_left,
)
from orchestrator.policy.rebalance import RebalanceParams, Resting


def plan_requeue(views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:
    """Moves for this tick, in the order found. The same views give the same plan, in whatever order they come.

    Work: one look at each instance; where a queue is blocked, one at each request of those that are, and at each
    instance that could take one, for each move. tests/support/slow_requeue.py is the same rule without short cuts.
    """
    most_kept = sum(blocks for _, blocks in params.load.headroom_blocks)
    blocked = [
        view
        for view in views
        if view.load.num_waiting > 0
        and view.slots_out > 0
        and not view.draining
        and _may_be_blocked(view.load, most_kept)
        and _why_blocked(view.load, view, params)
    ]
    return _Plan(blocked, views, resting, params).moves() if blocked else ()


_RUNNING = "running"
Level = int | None
"""Rank of a level that has headroom; None: any other."""


@dataclass(slots=True, eq=False)
class _Source:
    view: InstanceView
    load: LoadReport
    slots_out: int
    gone: set[str] = field(default_factory=set)

    def queue(self) -> Iterator[RequestLoad]:
        """What runs is passed over by one comparison: most do, and in a full fleet all instances are asked."""
        return (
            one
            for one in self.view.requests
            if one.status != _RUNNING and is_queued(one) and one.request_id not in self.gone
        )

    def send(self, request: RequestLoad) -> None:
        self.gone.add(request.request_id)
        self.load = after_leaving_queue(self.load, request, self.queue())
        self.slots_out -= 1


_Order = tuple[int, float, str]
"""Place in a queue, as `queue_order` has it."""


@dataclass(slots=True, eq=False)
class _Destination:
    view: InstanceView
    load: LoadReport
    slots_in: int
    spare: int = 0
    """Blocks free of what is kept free now; what waits there is not taken off."""
    levels: frozenset[Level] = frozenset()
    """That run there and have headroom."""
    queue: list[_Order] | None = None
    """Of those that wait there, as far as they are known; None: nobody has asked yet."""
    blocks_before: list[int] = field(default_factory=list)
    """What they lack, summed up to each of them, and to the end; with what those lack that are not known."""

    def can_take(self) -> bool:
        return self.slots_in > 0 and (self.load.num_running < self.load.max_running or not self.load.max_running)

    def ahead_of(self, order: _Order) -> tuple[int, int]:
        """(requests, blocks they lack) that would wait there before it. Whoever is not known counts as before it."""
        if self.load.num_waiting == 0:
            return 0, 0
        if self.queue is None:
            self._look_at_queue()
        queue = self.queue or []
        at = bisect.bisect_left(queue, order)
        return at + max(0, self.load.num_waiting - len(queue)), self.blocks_before[at]

    def _look_at_queue(self) -> None:
        size = self.load.block_size
        waiting = sorted((queue_order(one), blocks_missing(one, size)) for one in self.view.requests if is_queued(one))
        self.queue = [order for order, _ in waiting]
        known = [0, *accumulate(blocks for _, blocks in waiting)]
        unknown = max(0, max(self.load.waiting_blocks, self.load.head_of_line_blocks) - known[-1])
        self.blocks_before = [blocks + unknown for blocks in known]


_Filed = tuple[int, InstanceId, int, _Destination]
"""(minus the blocks that may come if nobody waits there, name, blocks to spare there for that level): names differ, so
that sides are never compared."""


class _Plan:
    """A plan while it is made. Destinations are filed once for each level that asks, the one that may take the most
    blocks first: so a request that fits nowhere is known by one comparison."""

    def __init__(
        self, blocked: list[InstanceView], views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams
    ) -> None:
        self._params = params
        self._resting = resting
        self._taken: set[str] = set(resting.requests)
        self._headroom = {rank: blocks for rank, blocks in params.load.headroom_blocks if blocks > 0}
        self._levels: dict[int, Level] = {}
        self._took: set[InstanceId] = set()
        """They send nothing in this plan. Nor does whoever has sent receive: its queue was blocked by a request that is
        before those of all sources that are looked at later."""
        sides = [
            _Destination(view, view.load, view.slots_in) for view in views if view.slots_in > 0 and not view.draining
        ]
        self._destinations = [side for side in sides if side.can_take()]
        for side in self._destinations:
            self._look(side)
        self._by_level: dict[Level, list[_Filed]] = {}
        # Where nobody may take even a request of one block, as in a fleet that is all full, no queue is looked at.
        sources = (_Source(view, view.load, view.slots_out) for view in (blocked if self._filed(None) else ()))
        self._sources = [filed for source in sources if (filed := _as_source(source)) is not None]
        heapq.heapify(self._sources)

    def moves(self) -> tuple[Move, ...]:
        moves: list[Move] = []
        while len(moves) < self._params.max_moves and self._sources and self._filed(None):
            _, _, source = heapq.heappop(self._sources)
            if source.view.instance in self._took:
                continue
            found = self._best(source)
            if found is None:
                continue  # nobody will have more room for it in this plan
            moves.append(self._book(source, *found))
            if source.slots_out > 0 and source.load.num_waiting > 0 and self._why_blocked(source):
                filed = _as_source(source)
                if filed is not None:
                    heapq.heappush(self._sources, filed)
        return tuple(moves)

    def _why_blocked(self, source: _Source) -> str:
        return _why_blocked(source.load, source.view, self._params, source.gone)

    # ---- who, and where
    def _best(self, source: _Source) -> tuple[RequestLoad, _Destination, float] | None:
        """The first of the queue that may go somewhere, where most is left after it, and how many steps that is."""
        size, taken, room = source.load.block_size, self._taken, self._room(source, None)
        most_tokens = room * size
        candidates = [
            one
            for one in source.queue()
            if one.num_prompt_tokens <= most_tokens  # most requests that are too large are so by their prompt
            and blocks_wanted(one, size) <= room
            and one.movable
            and one.request_id not in taken
            and outlives_its_copy(source.view, one)
        ]
        heap = [(*queue_order(one), one) for one in candidates]  # names differ, so that requests are never compared
        heapq.heapify(heap)
        while heap:
            request = heapq.heappop(heap)[-1]
            found = self._freest_after(source, request)
            if found is not None:
                return request, *found
        return None

    def _room(self, source: _Source, level: Level) -> float:
        """Blocks of the largest request of that level that may go anywhere, or more. A level with headroom has no more
        room than one without."""
        return next((-one[0] for one in self._filed(level) if not self._rests(source, one[1])), -1)

    def _rests(self, source: _Source, name: InstanceId) -> bool:
        here = source.view.instance
        return name == here or (here, name) in self._resting.pairs

    def _freest_after(self, source: _Source, request: RequestLoad) -> tuple[_Destination, float] | None:
        num_blocks, order = blocks_wanted(request, source.load.block_size), queue_order(request)
        best: tuple[float, InstanceId, _Destination] | None = None
        for minus_most, name, spare, side in self._filed(self._level(request.priority)):
            if -minus_most < num_blocks:
                break
            num_ahead, blocks_ahead = side.ahead_of(order)
            if num_blocks + blocks_ahead > -minus_most or self._rests(source, name):
                continue
            if side.load.num_running + num_ahead >= side.load.max_running > 0:
                continue
            left = steps_left(spare - blocks_ahead - num_blocks, side.load.num_running + 1, side.load.block_size)
            if best is None or (-left, name) < best[:2]:
                best = (-left, name, side)
        return None if best is None else (best[2], -best[0])

    # ---- destinations
    def _level(self, priority: int) -> Level:
        if priority not in self._levels:
            level = self._params.load.level(priority)
            self._levels[priority] = level if level in self._headroom else None
        return self._levels[priority]

    def _look(self, side: _Destination) -> None:
        """After each change of its load."""
        running = side.load.running_by_priority if self._headroom else ()
        side.levels = frozenset(self._level(priority) for priority, num in running if num > 0) - {None}
        kept = sum(self._headroom[level] for level in side.levels if level is not None)
        side.spare = side.load.free_blocks - kept

    def _filed(self, level: Level) -> list[_Filed]:
        if level not in self._by_level:
            filed = [self._as_destination(side, level) for side in self._destinations if side.can_take()]
            self._by_level[level] = sorted(one for one in filed if one[0] <= 0)
        return self._by_level[level]

    def _as_destination(self, side: _Destination, level: Level) -> _Filed:
        spare = side.spare
        if level is not None and level not in side.levels:
            spare -= self._headroom[level]
        return (side.load.num_running + 1 - spare, side.view.instance, spare, side)

    # ---- what it makes of both
    def _book(self, source: _Source, request: RequestLoad, there: _Destination, left: float) -> Move:
        """Count the move as made: both sides stand elsewhere now."""
        num_blocks = blocks_wanted(request, source.load.block_size)
        reason = (
            f"requeue: {self._why_blocked(source)}; it wants {num_blocks}, {left:.0f} decode steps left there with it"
        )
        for level, filed in self._by_level.items():
            at = bisect.bisect_left(filed, self._as_destination(there, level))
            if at < len(filed) and filed[at][-1] is there:
                del filed[at]
        there.load = after_joining(there.load, request.priority, num_blocks)
        there.slots_in -= 1
        self._look(there)
        for level, filed in self._by_level.items():
            renewed = self._as_destination(there, level)
            if there.can_take() and renewed[0] <= 0:
                bisect.insort(filed, renewed)
        source.send(request)
        self._took.add(there.view.instance)
        self._taken.add(request.request_id)
        return move_of(request, source.view, there.view, reason)


def _as_source(source: _Source) -> tuple[_Order, InstanceId, _Source] | None:
    """The one whose first request is the most urgent first, and has lived longest; None: nothing is known to wait."""
    first = min(map(queue_order, source.queue()), default=None)
    return None if first is None else (first, source.view.instance, source)


def _may_be_blocked(load: LoadReport, most_kept: int) -> bool:
    """`most_kept`: the headroom of all levels. Where there is none, this is the rule."""
    is_short = load.free_blocks - load.head_of_line_blocks < most_kept
    return is_short or load.num_running >= load.max_running > 0


def _why_blocked(
    load: LoadReport, view: InstanceView, params: RebalanceParams, gone: frozenset[str] | set[str] = frozenset()
) -> str:
    """What keeps the first of the queue from being begun; empty: nothing."""
    wanted, free = load.head_of_line_blocks, load.free_blocks
    if wanted > free:
        return f"the first in the queue wants {wanted} blocks, {free} are free here"
    if load.num_running >= load.max_running > 0:
        return f"all {load.max_running} that may run at once do here, {free} blocks are free"
    levels = params.load
    if free - wanted >= levels.headroom_of(load.running_by_priority):
        return ""
    queue = (one for one in view.requests if is_queued(one) and one.request_id not in gone)
    first = min(queue, key=queue_order, default=None)
    running = (priority for priority, count in load.running_by_priority if count > 0)
    kept = 0 if first is None else kept_from(levels.headroom_blocks, first.priority, running)
    if free - wanted >= kept:
        return ""
    return f"the first in the queue wants {wanted} blocks, {free} are free here, {kept} are kept for more urgent ones"
