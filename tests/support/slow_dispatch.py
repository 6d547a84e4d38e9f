"""Which instance gets a new request? The choice of `DispatchBook.choose`, written out over a view: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Collection

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.policy.dispatch import Choice, ClusterView, DispatchParams, InstanceView, NoChoice
from orchestrator.policy.load import virtual_usage_blocks


def choose_instance(
    view: ClusterView,
    request_demand_blocks: int,
    params: DispatchParams,
    excluded: Collection[InstanceId] = (),
) -> Choice | NoChoice:
    """Pick the instance whose freeness with this request on it is highest; ties by fewest dispatched, then by id."""
    serving = [seen for seen in view.instances if seen.report.state == State.SERVING.value]
    fresh = [seen for seen in serving if seen.report_age_s <= params.max_report_age_s]
    candidates = [seen for seen in fresh if seen.instance not in excluded]
    if not candidates:
        return NoChoice("", any_serving=bool(fresh))
    # An instance it can never fit on is only asked when there is no other: its refusal then says so to the client.
    large_enough = [seen for seen in candidates if seen.report.total_blocks >= request_demand_blocks]
    best = min(
        large_enough or candidates,
        key=lambda seen: (-score(seen, request_demand_blocks, params), seen.num_dispatched, seen.instance),
    )
    reason = (
        f"score {score(best, request_demand_blocks, params):.2f} highest of {len(candidates)}"
        f" ({best.num_dispatched} dispatched since its report)"
    )
    return Choice(best.instance, best.epoch, reason, best.report_age_s)


def score(seen: InstanceView, demand_blocks: int, params: DispatchParams) -> float:
    """Freeness of the instance with own dispatches and this request on it, in decode steps; higher is better.

    When that would be negative the request has to wait, and the score is minus the blocks short for *everything* that
    waits here. Freeness itself would mislead there: it ignores all but the head of the queue, and dividing a negative
    number by a larger batch makes the fuller instance look better.
    """
    usage = virtual_usage_blocks(seen.report, params.load)
    if math.isinf(usage):
        return -math.inf
    added = seen.dispatched_blocks + demand_blocks
    spare = seen.report.total_blocks - usage - added
    if spare >= 0:
        return spare / max(1, seen.report.num_running + seen.num_dispatched + 1)
    return spare + seen.report.head_of_line_blocks - max(seen.report.waiting_blocks, seen.report.head_of_line_blocks)
