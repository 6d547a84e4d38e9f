"""How does a request in vLLM's scheduler become more (or less) urgent? Between two steps, in its queue's order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from instance.types import PriorityAnswer, PriorityOutcome
from instance.vllm.views import status_of
from migration.types import RequestId

FCFS_REASON = (
    "this engine serves first come first served, whatever the priority: leave out --scheduling-policy fcfs"
    " (kvferry's own default is priority)"
)


def set_priority(scheduler: Any, request_id: RequestId, priority: int) -> PriorityAnswer:
    """Also works on vLLM's own scheduler.

    vLLM's queues by priority are heaps over the requests themselves, so a request that waits is taken out, changed and
    put back. One that runs is compared anew when a step has to preempt somebody.
    """
    request = scheduler.requests.get(request_id)
    if request is None or request.is_finished():
        return PriorityAnswer(PriorityOutcome.NOT_HERE, reason="no such request is here")
    if getattr(scheduler, "policy", None) is not SchedulingPolicy.PRIORITY:
        return PriorityAnswer(PriorityOutcome.UNSUPPORTED, reason=FCFS_REASON)
    stopped: Iterable[str] = getattr(scheduler, "ferry_out", ())
    returning: Iterable[str] = getattr(scheduler, "ferry_returning", ())
    if request_id in stopped and request_id not in returning:
        return PriorityAnswer(PriorityOutcome.ON_THE_MOVE, reason="it is stopped, on its way to another instance")
    previous, status = request.priority, status_of(scheduler, request)
    held_by = None
    for queue in (scheduler.waiting, scheduler.kv_holding_waiting):
        num_waiting = len(queue)
        queue.remove_requests([request])
        if len(queue) < num_waiting:
            held_by = queue
    request.priority = priority
    if held_by is not None:
        held_by.add_request(request)
    return PriorityAnswer(PriorityOutcome.SET, previous, status)
