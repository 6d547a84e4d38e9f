"""What do the moving policies (requeue, rebalance, attain, drain) look at, and what do they propose? Frozen views in,
moves out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from instance.messages import LoadReport, RequestLoad
from migration.types import InstanceId, RequestId
from orchestrator.policy.load import NO_HEADROOM, LoadParams, virtual_usage_blocks
from orchestrator.policy.targets import NOTHING_WANTED, Tightest


class InstanceView(msgspec.Struct, frozen=True):
    """One live instance whose report is fresh, with the moves in flight already counted in `load`.

    A struct, since every tick makes one of each instance: a frozen dataclass takes ten times as long.
    """

    instance: InstanceId
    load: LoadReport
    requests: tuple[RequestLoad, ...]
    """Those that may be proposed: movable, not on the move."""
    draining: bool
    slots_out: int
    """Migrations it may still send at once."""
    slots_in: int
    signal_age_s: float
    copy_s_per_block: float = 0.0
    """What its migrations have taken of late for a block that was copied; 0: not known yet."""
    tightest: Tightest = NOTHING_WANTED
    """Of all its requests."""
    arriving: tuple[RequestLoad, ...] = ()
    """On their way here; counted in `load`."""


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


def move_of(request: RequestLoad, source: InstanceView, destination: InstanceView, reason: str) -> Move:
    return Move(
        request_id=RequestId(request.request_id),
        source=source.instance,
        destination=destination.instance,
        priority=request.priority,
        num_blocks=request.num_blocks,
        reason=reason,
        signal_age_s=max(source.signal_age_s, destination.signal_age_s),
    )


YOUNG_TOKENS = 64
"""A request is expected to give at least so many tokens more, as far as it may."""
COPY_TIME_WEIGHT = 0.2
"""Weight of the newest migration in the smoothed time of a block: about the last ten count."""


def smooth_copy_time(previous_s: float, num_blocks: int, duration_s: float) -> float:
    """Exponentially weighted mean of the seconds a copied block took; the first migration counts whole."""
    if num_blocks <= 0 or duration_s <= 0:
        return previous_s
    observed_s = duration_s / num_blocks
    return observed_s if previous_s == 0.0 else previous_s + COPY_TIME_WEIGHT * (observed_s - previous_s)


def expected_steps(request: RequestLoad) -> int:
    """Decode steps it is expected to go on: as many as it has made, within its bound.

    Lengths of answers have heavy tails, where what is still to come grows with what has been (a Pareto tail of exponent
    2, that of the Zipf lengths in llumnix.md, has a mean residual equal to the present length).
    """
    return max(0, min(request.max_tokens - request.num_output_tokens, max(request.num_output_tokens, YOUNG_TOKENS)))


def copy_steps(view: InstanceView, request: RequestLoad) -> float:
    """Decode steps the source makes while the request is copied; 0 while nothing is known of either."""
    step_time_s = view.load.step_time_s
    return request.num_blocks * view.copy_s_per_block / step_time_s if step_time_s > 0 else 0.0


def outlives_its_copy(view: InstanceView, request: RequestLoad) -> bool:
    """Whether more is gained than it costs, both in decode steps of the source: while the copy goes on, both instances
    hold the request's blocks; afterwards the source is rid of them for as long as the request lives. So it must be
    expected to live for twice the time of its copy."""
    return expected_steps(request) >= 2 * copy_steps(view, request)


def outliving_their_copies(view: InstanceView) -> Sequence[RequestLoad]:
    """Its requests of which `outlives_its_copy` is true. Written out: where nobody does, a tick asks this of every
    request of each instance that is short of memory."""
    copy_s, step_s, young = view.copy_s_per_block, view.load.step_time_s, YOUNG_TOKENS
    if copy_s <= 0.0 or not step_s > 0.0:
        return view.requests  # a copy of no steps, as far as is known
    return [
        one
        for one in view.requests
        if (
            (least := 2 * (one.num_blocks * copy_s / step_s)) <= one.max_tokens - one.num_output_tokens
            and (least <= young or least <= one.num_output_tokens)
        )
        or least <= 0.0
    ]


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


# ---------------------------------------------------------------------- queues
def is_queued(request: RequestLoad) -> bool:
    """It waits there, for its first token or after a preemption."""
    return request.status in ("waiting", "preempted")


def queue_order(request: RequestLoad) -> tuple[int, float, str]:
    """The engine's: by priority, then who has lived longest, then by name."""
    return (request.priority, -(request.waited_s + request.arrived_s), request.request_id)


def blocks_wanted(request: RequestLoad, block_size: int) -> int:
    """What it holds, and what its next token needs: of a prompt that is half computed only a part is held. (The newest
    token of one that decodes is in no block yet.)"""
    tokens = request.num_prompt_tokens + request.num_output_tokens + (request.num_output_tokens == 0)
    return max(request.num_blocks, -(-tokens // max(1, block_size)))


def after_leaving_queue(load: LoadReport, request: RequestLoad, others: Iterable[RequestLoad]) -> LoadReport:
    """The load once a request that waits there is gone. `others` wait beside it, as far as they are known: the next of
    them is the head of the queue, if this one was."""
    num_waiting = max(0, load.num_waiting - 1)
    waiting_blocks = max(0, load.waiting_blocks - blocks_missing(request, load.block_size)) if num_waiting else 0
    head_blocks = min(load.head_of_line_blocks, waiting_blocks)
    first = min(others, key=queue_order, default=None)
    if num_waiting and first is not None:
        was_head = queue_order(request) < queue_order(first)
        head_blocks = blocks_missing(first, load.block_size) if was_head else load.head_of_line_blocks
    return msgspec.structs.replace(
        load,
        free_blocks=min(load.total_blocks, load.free_blocks + request.num_blocks),
        num_waiting=num_waiting,
        head_of_line_blocks=head_blocks,
        waiting_blocks=max(waiting_blocks, head_blocks),
    )


def blocks_missing(request: RequestLoad, block_size: int) -> int:
    return blocks_wanted(request, block_size) - request.num_blocks
