"""Which request should move so that targets are met that would be missed? Of those that have targets, or beside one.

A request is predicted to miss where it is (`standing.py`), and to meet all its targets at another instance after it has
come, each by a margin. The move pays: it lives twice as long as its copy takes, the other instance has room and keeps
its decode steps, and nobody there who is predicted to meet a target misses it then. Those it leaves only gain. Where no
such move helps one that decodes too slowly, a neighbour without targets whose leaving is enough may go instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving,
    blocks_wanted,
    freeness_steps,
    is_queued,
    move_of,
    outlives_its_copy,
    queue_order,
)
from orchestrator.policy.places import Places
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.standing import NOBODY, Ahead, Speed, Speeds, Standing, standing_of
from orchestrator.policy.targets import awaits_first_token, is_any_wanted, tpot_wanted_s, ttft_left_s

RUNNING, WAITING = "running", "waiting"


def plan_attain(
    views: tuple[InstanceView, ...], speeds: Speeds, resting: Resting, params: RebalanceParams
) -> tuple[Move, ...]:
    """Moves for this tick, in the order found. The same views give the same plan, in whatever order they come.

    `speeds`: coefficients of those whose steps are known; no others take part. Work: one look at each instance that is
    known, and if any misses, at the requests of `attain_sources` of them.
    """
    if not is_any_wanted(view.tightest for view in views):
        return ()
    taking_part = [view for view in views if view.instance in speeds and not view.draining]
    plan = _Plan(sorted(taking_part, key=lambda view: view.instance), speeds, resting, params)
    for row in plan.places.missing():
        plan.relieve(row)
    return tuple(plan.moves)


class Wanting(NamedTuple):
    """A request with targets, what it may still take, and what is predicted for it."""

    request: RequestLoad
    tpot_s: float
    """Target; infinite: none."""
    left_s: float
    """Until its first token is due; infinite: it has one, or does not care, or it is too late."""
    predicted_tpot_s: float
    predicted_ttft_s: float


@dataclass(slots=True, eq=False)
class _Side:
    """An instance while the plan is made: its view, and what the moves planned so far make of it."""

    view: InstanceView
    speed: Speed
    load: LoadReport = field(init=False)
    standing: Standing = field(init=False)
    slots_out: int = field(init=False)
    slots_in: int = field(init=False)
    gone: set[str] = field(default_factory=set)
    came: list[RequestLoad] = field(default_factory=list)
    # Found when they are first asked for:
    _untargeted: list[RequestLoad] | None = None
    _strictest_s: float | None = None
    _queue: list[tuple[RequestLoad, Ahead]] | None = None
    _on_time: set[str] | None = None
    """Those of the queue that are predicted to get their first token in time."""

    def __post_init__(self) -> None:
        self.load, self.slots_out, self.slots_in = self.view.load, self.view.slots_out, self.view.slots_in
        self.standing = standing_of(self.load, self.speed)
        for request in self.view.arriving:
            if awaits_first_token(request):  # counted as running in the view, since all that moves is
                counted = blocks_wanted(request, self.load.block_size) * self.load.block_size
                self.standing = self.standing.without_running(counted).with_waiting(request.num_prompt_tokens)

    # ---- who is there
    def requests(self) -> tuple[RequestLoad, ...]:
        if not self.gone:
            return self.view.requests
        return tuple(request for request in self.view.requests if request.request_id not in self.gone)

    def untargeted(self) -> list[RequestLoad]:
        """Those that run and want nothing."""
        if self._untargeted is None:
            self._untargeted = [
                one for one in self.requests() if one.ttft_s is None and one.tpot_s is None and one.status == RUNNING
            ]
        return self._untargeted

    def queue(self) -> list[tuple[RequestLoad, Ahead]]:
        """Those that wait, in the engine's order: by priority, then by arrival; each with what is ahead of it."""
        if self._queue is None:
            arriving = [one for one in (*self.view.arriving, *self.came) if awaits_first_token(one)]
            waiting = sorted([*filter(is_queued, self.requests()), *arriving], key=queue_order)
            self._queue = _one_after_the_other(waiting)
        return self._queue

    def strictest_s(self) -> float:
        """Of the TPOT targets that are predicted to be met, of those that are there or on their way."""
        if self._strictest_s is None:
            there, now_s = (*self.requests(), *self.view.arriving, *self.came), self.standing.tpot_s()
            wanted = [wanted_s for one in there if (wanted_s := one.tpot_s) is not None]
            self._strictest_s = min((one_s for one_s in wanted if one_s >= now_s and one_s > 0.0), default=math.inf)
        return self._strictest_s

    def missing(self, margin: float) -> list[Wanting]:
        """Those that run or wait there and miss a target by the margin, the most urgent first, then the shorter, then
        by name."""
        tpot_s, most, first_s = self.standing.tpot_s(), 1.0 + margin, self._first_s()
        found: list[Wanting] = []
        for one in self.requests():
            if (one.tpot_s is None and one.ttft_s is None) or one.status not in (RUNNING, WAITING):
                continue
            wanted_s, ttft_s, left_s = tpot_wanted_s(one), 0.0, math.inf
            if one.ttft_s is not None:
                ttft_s = first_s.get(one.request_id, 0.0)
                its_s = ttft_left_s(one) - self.view.signal_age_s
                left_s = its_s if its_s > 0.0 else math.inf
            if tpot_s > wanted_s * most or ttft_s > left_s * most:
                found.append(Wanting(one, wanted_s, left_s, tpot_s, ttft_s))
        return sorted(found, key=lambda one: (one.request.priority, _num_tokens(one.request), one.request.request_id))

    def _first_s(self) -> dict[str, float]:
        """When those that wait for it get their first token."""
        if not math.isfinite(self.view.tightest.left_s):
            return {}
        return {
            request.request_id: self.standing.first_token_s(ahead, request.num_prompt_tokens)
            for request, ahead in self.queue()
            if request.ttft_s is not None
        }

    # ---- what a move makes of it
    def left_by(self, request: RequestLoad) -> Standing:
        if request.status == RUNNING:
            # What is held: of a prompt that is half computed that is less than all of it.
            held = min(_num_tokens(request), request.num_blocks * self.load.block_size)
            return self.standing.without_running(held)
        return self.standing.without_waiting(request.num_prompt_tokens)

    def joined_by(self, request: RequestLoad) -> Standing:
        if request.status == RUNNING:
            return self.standing.with_running(_num_tokens(request))
        return self.standing.with_waiting(request.num_prompt_tokens)

    def makes_miss_coming(self, request: RequestLoad, after: Standing) -> bool:
        """Whether somebody here, who is predicted to meet a target now, misses it when this one has come, which makes
        `after` of this side."""
        if self._slows_too_much(after):
            return True
        queue = self.queue()
        if request.status == WAITING:
            # Of its own priority it may have been longer on its way than those that are here: it counts as first.
            queue = [
                (one, ahead.and_one(request.num_prompt_tokens) if request.priority <= one.priority else ahead)
                for one, ahead in queue
            ]
        return self._makes_late(after, queue)

    def makes_miss_leaving(self, request: RequestLoad) -> bool:
        """The same when it has gone: nobody should, but what waits for an end waits longer where fewer run."""
        left, after = [one for one, _ in self.queue() if one is not request], self.left_by(request)
        return self._slows_too_much(after) or self._makes_late(after, _one_after_the_other(left))

    def _slows_too_much(self, after: Standing) -> bool:
        return after.tpot_s() > self.strictest_s()

    def _makes_late(self, after: Standing, queue: list[tuple[RequestLoad, Ahead]]) -> bool:
        if not queue:
            return False
        if self._on_time is None:
            queued = self.queue()
            self._on_time = {one.request_id for one, ahead in queued if self._is_on_time(one, ahead, self.standing)}
        on_time = self._on_time
        return any(one.request_id in on_time and not self._is_on_time(one, ahead, after) for one, ahead in queue)

    def _is_on_time(self, one: RequestLoad, ahead: Ahead, standing: Standing) -> bool:
        left_s = ttft_left_s(one) - self.view.signal_age_s
        return left_s < math.inf and standing.first_token_s(ahead, one.num_prompt_tokens) <= left_s

    def send(self, request: RequestLoad) -> None:
        self.standing = self.left_by(request)
        if request.status == RUNNING:
            self.load = after_leaving(self.load, request.priority, request.num_blocks)
        self.slots_out -= 1
        self.gone.add(request.request_id)
        self._untargeted = self._strictest_s = self._queue = self._on_time = None

    def receive(self, request: RequestLoad) -> None:
        self.standing = self.joined_by(request)
        self.load = after_joining(self.load, request.priority, blocks_wanted(request, self.load.block_size))
        self.slots_in -= 1
        self.came.append(request)
        self._strictest_s = self._queue = self._on_time = None


class _Plan:
    def __init__(self, views: list[InstanceView], speeds: Speeds, resting: Resting, params: RebalanceParams) -> None:
        self.moves: list[Move] = []
        self.places = Places(views, speeds, params)
        self._views = views
        self._speeds = speeds
        self._sides: dict[int, _Side] = {}
        self._resting = resting
        self._taken: set[RequestId] = set(resting.requests)
        self._params = params
        for row, view in enumerate(views):
            if view.arriving:
                self._changed(row)

    def relieve(self, row: int) -> None:
        source = self._side(row)
        while source.slots_out > 0 and len(self.moves) < self._params.max_moves and self._next(row, source):
            pass

    def _side(self, row: int) -> _Side:
        side = self._sides.get(row)
        if side is None:
            view = self._views[row]
            speed = tuple(map(float, self._speeds[view.instance]))
            side = self._sides[row] = _Side(view, speed)
        return side

    def _changed(self, row: int) -> None:
        side = self._side(row)
        self.places.changed(row, side.load, side.standing, side.slots_in)

    def _next(self, row: int, source: _Side) -> bool:
        """Plan one more move from there. False: none pays."""
        not_there = {source.view.instance}
        not_there |= {pair[1] for pair in self._resting.pairs if pair[0] == source.view.instance}
        if not (missing := source.missing(self._params.attain_margin)):
            return False
        missing.sort(key=self._is_hopeless)
        return any(
            self._move_it(row, source, one, not_there) or self._move_a_neighbour(row, source, one, not_there)
            for one in missing[: self._params.attain_requests]
        )

    def _is_hopeless(self, one: Wanting) -> bool:
        """There is no place where a token could come as fast, or the first one as soon."""
        share, (tpot_s, first_s) = 1.0 - self._params.attain_margin, self.places.fastest()
        return one.tpot_s * share < tpot_s or one.left_s * share < first_s

    def _move_it(self, row: int, source: _Side, one: Wanting, not_there: set[InstanceId]) -> bool:
        request, share = one.request, 1.0 - self._params.attain_margin
        if self._is_hopeless(one) or not self._may_move(source, request):
            return False
        copy_s = request.num_blocks * source.view.copy_s_per_block
        most_ttft_s = one.left_s * share - copy_s
        for at in self._freest(source, request, (one.tpot_s * share, most_ttft_s), not_there):
            there = self._side(at)
            after, ttft_s = there.joined_by(request), 0.0
            is_met = (tpot_s := after.tpot_s()) <= one.tpot_s * share
            if is_met and one.left_s < math.inf:
                ttft_s = there.standing.first_token_s(there.standing.queue(), request.num_prompt_tokens)
                is_met = ttft_s <= most_ttft_s
            if is_met and self._takes(there, request, after):
                self._book(row, at, request, _reason(one, tpot_s, ttft_s + copy_s))
                return True
        return False

    def _move_a_neighbour(self, row: int, source: _Side, one: Wanting, not_there: set[InstanceId]) -> bool:
        """One without targets, no more urgent, whose leaving is enough: the least urgent and shortest of these."""
        short_s = one.predicted_tpot_s - one.tpot_s
        if one.request.status != RUNNING or not short_s > 0.0:
            return False
        least = source.standing.least_tokens(short_s)
        neighbours = [
            other
            for other in source.untargeted()
            if other.priority >= one.request.priority
            and _num_tokens(other) >= least
            and source.left_by(other).tpot_s() <= one.tpot_s
        ]
        neighbours.sort(key=lambda other: (-other.priority, _num_tokens(other), other.request_id))
        for other in neighbours[: self._params.attain_requests]:
            if not self._may_move(source, other):
                continue
            for at in self._freest(source, other, (math.inf, math.inf), not_there):
                there = self._side(at)
                if self._takes(there, other, there.joined_by(other)):
                    self._book(row, at, other, _neighbours_reason(one, source.left_by(other).tpot_s()))
                    return True
        return False

    def _may_move(self, source: _Side, request: RequestLoad) -> bool:
        return (
            request.movable
            and RequestId(request.request_id) not in self._taken
            and outlives_its_copy(source.view, request)
            and not source.makes_miss_leaving(request)
        )

    def _freest(
        self, source: _Side, request: RequestLoad, within: tuple[float, float], not_there: set[InstanceId]
    ) -> list[int]:
        num_blocks = blocks_wanted(request, source.load.block_size)
        return self.places.freest(num_blocks, _num_tokens(request), within, not_there)

    def _takes(self, there: _Side, request: RequestLoad, after: Standing) -> bool:
        """It stays no source of the memory's rule, and nobody there misses a target for it."""
        if there.makes_miss_coming(request, after):
            return False
        joined = after_joining(there.load, request.priority, blocks_wanted(request, there.load.block_size))
        return freeness_steps(joined, self._params.load) >= self._params.threshold_steps

    def _book(self, row: int, at: int, request: RequestLoad, reason: str) -> None:
        source, there = self._side(row), self._side(at)
        move = move_of(request, source.view, there.view, reason)
        self.moves.append(move)
        self._taken.add(move.request_id)
        source.send(request)
        there.receive(request)
        self._changed(row)
        self._changed(at)


def _num_tokens(request: RequestLoad) -> int:
    return request.num_prompt_tokens + request.num_output_tokens


def _one_after_the_other(queue: list[RequestLoad]) -> list[tuple[RequestLoad, Ahead]]:
    """Each with what is ahead of it."""
    found, ahead = [], NOBODY
    for request in queue:
        found.append((request, ahead))
        ahead = ahead.and_one(_num_tokens(request))
    return found


def _reason(one: Wanting, tpot_s: float, ttft_s: float) -> str:
    parts = []
    if one.left_s < math.inf:
        parts.append(
            f"the first token in {_ms(one.predicted_ttft_s)} here, {_ms(ttft_s)} there, {_ms(one.left_s)} are left"
        )
    if one.tpot_s < math.inf:
        parts.append(f"a token every {_ms(one.predicted_tpot_s)} here, {_ms(tpot_s)} there, {_ms(one.tpot_s)} wanted")
    return f"attain: {'; '.join(parts)}"


def _neighbours_reason(one: Wanting, tpot_s: float) -> str:
    before, after, wanted = _ms(one.predicted_tpot_s), _ms(tpot_s), _ms(one.tpot_s)
    return (
        f"attain: {one.request.request_id} gets a token every {before} beside it, {after} without it, {wanted} wanted"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
