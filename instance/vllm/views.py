"""How does vLLM's scheduler look from outside? Its load in blocks, and each request's view. Also works on vLLM's own
scheduler."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.request import Request
from vllm.v1.request import RequestStatus as VllmStatus

from instance.types import EngineLoad, RequestStatus, RequestView
from instance.vllm import blocks, compat
from instance.vllm.refusals import why_unmovable
from migration.types import RequestId


def load_of(scheduler: Any, block_size: int, *, has_reservations: bool) -> EngineLoad:
    holding = [
        _demand(scheduler, request, block_size) - _num_held(scheduler, request)
        for request in scheduler.kv_holding_waiting
    ]
    demands = [max(0, demand) for demand in holding]
    if scheduler.waiting:  # the first alone in the queue's order: the order of all costs a sort at each step
        first = scheduler.waiting.peek_request()
        others = [request for request in compat.unordered(scheduler.waiting) if request is not first]
        demands += [_demand(scheduler, request, block_size) for request in (first, *others)]
    priorities = Counter(request.priority for request in scheduler.running)
    return EngineLoad(
        free_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        reserved_blocks=scheduler.ferry_num_reserved_blocks() if has_reservations else 0,
        num_running=len(scheduler.running),
        num_waiting=len(demands),
        running_by_priority=tuple(sorted(priorities.items())),
        head_of_line_blocks=demands[0] if demands else 0,
        waiting_blocks=sum(demands),
        num_preemptions=getattr(scheduler, "ferry_num_preemptions", 0),
    )


def view_of(scheduler: Any, request: Request, external_id: str, is_engine_movable: bool) -> RequestView:
    return RequestView(
        request_id=RequestId(request.request_id),
        external_id=external_id,
        status=status_of(scheduler, request),
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        max_tokens=request.max_tokens,
        num_blocks=_num_held(scheduler, request),
        movable=is_engine_movable
        and why_unmovable(request, scheduler.ferry_images_refused, scheduler.num_spec_tokens) is None,
    )


def status_of(scheduler: Any, request: Request) -> RequestStatus:
    if request.request_id in getattr(scheduler, "ferry_out", ()):
        return RequestStatus.MIGRATING_OUT
    if request.status == VllmStatus.RUNNING:
        return RequestStatus.RUNNING
    return RequestStatus.PREEMPTED if request.status == VllmStatus.PREEMPTED else RequestStatus.WAITING


def _num_held(scheduler: Any, request: Request) -> int:
    """Of the pool, all KV-cache groups together."""
    return len(blocks.held_by(scheduler.kv_cache_manager, (request.request_id,)))


def _demand(scheduler: Any, request: Request, block_size: int) -> int:
    """Blocks that hold all its tokens so far."""
    if not hasattr(scheduler, "ferry_in"):  # vLLM's own, perhaps of a version whose insides are not known
        return -(-int(request.num_tokens) // block_size)
    return blocks.num_needed(scheduler.kv_cache_manager, int(request.num_tokens))
