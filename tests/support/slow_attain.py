"""Who meets which target? The formulas of a decode step and of a queue, written out for one instance. For tests."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from instance.messages import RequestLoad
from orchestrator.policy.moves import InstanceView
from orchestrator.policy.standing import Speed
from tests.support.slow_slo import predicted_ttft_s, step_s

OUTPUT_TOKENS = 256.0


def tpot_s(view: InstanceView, speed: Speed) -> float:
    """A decode step of all that runs, and of as much of what waits as there is room for."""
    load = view.load
    waiting_blocks = max(load.waiting_blocks, load.head_of_line_blocks)
    share = min(1.0, load.free_blocks / waiting_blocks) if waiting_blocks else 1.0
    batch = min(load.num_running + share * load.num_waiting, load.max_running or math.inf)
    context = (load.total_blocks - load.free_blocks + share * waiting_blocks) * load.block_size
    return step_s(speed, 0, batch, context)


def ttft_s(view: InstanceView, speed: Speed, request: RequestLoad) -> float:
    """Behind those that wait there before it, by priority and then by arrival."""

    def rank(one: RequestLoad) -> tuple[int, float, str]:
        return (one.priority, -(one.waited_s + one.arrived_s), one.request_id)

    queue = [one for one in view.requests if one.status in ("waiting", "preempted")]
    before = [one.num_prompt_tokens + one.num_output_tokens for one in queue if rank(one) < rank(request)]
    # As if only these waited: the formula of a newcomer, which has them all before it.
    size = view.load.block_size
    changes: dict[str, Any] = {"num_waiting": len(before), "waiting_blocks": sum(before) / size}
    only = msgspec.structs.replace(view.load, head_of_line_blocks=0, **changes)
    total_s = predicted_ttft_s(only, speed, 0, 0, request.num_prompt_tokens, expected_output_tokens=OUTPUT_TOKENS)
    each = sum(before) / max(1, len(before))
    total_s -= speed[5] * max(1, len(before)) * each * each / 2  # prompts of equal length
    return total_s + speed[5] * sum(one * one / 2 for one in before)


def met(view: InstanceView, speed: Speed, tolerance: float = 0.0) -> set[tuple[str, str]]:
    """(request, which target) of all that are predicted to be met there; blocks round the tokens that wait up."""
    found = set()
    for one in view.requests:
        if one.tpot_s is not None and tpot_s(view, speed) <= one.tpot_s * (1 + tolerance):
            found.add((one.request_id, "tpot"))
        if one.ttft_s is not None and one.status == "waiting" and not one.num_output_tokens:
            left_s = one.ttft_s - one.waited_s - one.arrived_s - view.signal_age_s
            if ttft_s(view, speed, one) <= left_s * (1 + tolerance):
                found.add((one.request_id, "ttft"))
    return found
