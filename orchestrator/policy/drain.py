"""Where should the requests of a draining instance go? To the freest others, a few at a time, until it is empty.

What cannot be moved runs to its end where it is; what fits nowhere yet waits for room.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from instance.messages import LoadReport, RequestLoad
from migration.types import RequestId
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import InstanceView, Move, after_joining, freeness_steps, move_of


@dataclass(frozen=True, slots=True)
class DrainParams:
    retry_s: float = 0.5
    """A request whose move ended without a commit is tried again after this long (longer than reports are old)."""
    max_moves: int = 16
    """Moves proposed in one tick."""
    load: LoadParams = field(default_factory=LoadParams)


@dataclass(slots=True)
class _Destination:
    view: InstanceView
    load: LoadReport
    slots_in: int


def plan_drain(views: tuple[InstanceView, ...], resting: frozenset[RequestId], params: DrainParams) -> tuple[Move, ...]:
    """Moves for this tick: draining instances by name, their requests the most urgent first, then the shortest."""
    if not any(view.draining for view in views):
        return ()
    ordered = sorted(views, key=lambda view: view.instance)
    destinations = [_Destination(view, view.load, view.slots_in) for view in ordered if not view.draining]
    moves: list[Move] = []
    for source in ordered:
        if not source.draining:
            continue
        slots_out = source.slots_out
        for request in sorted(source.requests, key=_order):
            if slots_out <= 0 or len(moves) >= params.max_moves:
                break
            if not request.movable or RequestId(request.request_id) in resting:
                continue
            destination = _freest(destinations, request, params.load)
            if destination is None:
                continue
            slots_out -= 1
            moves.append(_book(source, destination, request, params.load))
    return tuple(moves)


def _order(request: RequestLoad) -> tuple[int, int, str]:
    return (request.priority, request.num_prompt_tokens + request.num_output_tokens, request.request_id)


def _freest(destinations: list[_Destination], request: RequestLoad, params: LoadParams) -> _Destination | None:
    """The freest instance with room for what the request holds now; ties by name."""
    able = (item for item in destinations if item.slots_in > 0 and item.load.free_blocks >= request.num_blocks)
    return min(able, key=lambda item: (-freeness_steps(item.load, params), item.view.instance), default=None)


def _book(source: InstanceView, destination: _Destination, request: RequestLoad, params: LoadParams) -> Move:
    before = freeness_steps(destination.load, params)
    destination.load = after_joining(destination.load, request.priority, request.num_blocks)
    destination.slots_in -= 1
    reason = f"drain: the destination is the freest with room, {before:.0f} decode steps left"
    return move_of(request, source, destination.view, reason)
