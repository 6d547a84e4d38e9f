"""Which instance gets a new request? The choice of `DispatchBook.choose`, written out over a view: slow and obvious."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.policy.dispatch import Choice, ClusterView, DispatchParams, InstanceView, NoChoice
from orchestrator.policy.load import growth_blocks_per_s, running_blocks, virtual_usage_blocks


def choose_instance(
    view: ClusterView,
    request_demand_blocks: int,
    params: DispatchParams,
    excluded: Collection[InstanceId] = (),
    saved: Mapping[InstanceId, int] = {},
    num_cached: Mapping[InstanceId, int] = {},
    *,
    priority: int = 0,
) -> Choice | NoChoice:
    """Pick the instance whose score with this request on it is highest; ties by fewest dispatched, then by fewest
    cached blocks, then by id. `saved`: how many blocks of the prompt who has cached; `num_cached`: of any."""
    serving = [seen for seen in view.instances if seen.report.state == State.SERVING.value]
    fresh = [seen for seen in serving if seen.report_age_s <= params.max_report_age_s]
    candidates = [seen for seen in fresh if seen.instance not in excluded]
    if not candidates:
        return NoChoice("", any_serving=bool(fresh))

    def score_of(seen: InstanceView) -> float:
        return score(
            seen, request_demand_blocks, params, view.num_gateways, saved.get(seen.instance, 0), priority=priority
        )

    # An instance it can never fit on is only asked when there is no other: its refusal then says so to the client.
    large_enough = [seen for seen in candidates if seen.report.total_blocks >= request_demand_blocks]

    def rank(seen: InstanceView) -> tuple[float, int, int, InstanceId]:
        return -score_of(seen), seen.num_dispatched, num_cached.get(seen.instance, 0), seen.instance

    best = min(large_enough or candidates, key=rank)
    dispatched = f"{best.num_dispatched} dispatched since its report"
    if best.instance in saved:
        dispatched += f", {saved[best.instance]} blocks saved"
    reason = f"score {score_of(best):.2f} highest of {len(candidates)} ({dispatched})"
    return Choice(best.instance, best.epoch, reason, best.report_age_s)


def score(
    seen: InstanceView,
    demand_blocks: int,
    params: DispatchParams,
    num_gateways: int,
    saved_blocks: int = 0,
    *,
    priority: int = 0,
) -> float:
    """Freeness of the instance with this request and all dispatches of all gateways on it, in decode steps, after what
    its running requests have taken since its report; less in its first seconds. When that would be negative the request
    has to wait, and the score is minus the blocks short for everything that waits there; unless it is the headroom of
    its own level that is lacking: then it begins at once, and the score is between -1 and 0, the higher the more decode
    steps are left when that headroom does not count. What it has of the prompt is demand that is not there, and counts
    as if so many blocks of what runs there were gone, with their requests. The headroom of its level, and of those
    dispatched, counts as used, once a level.
    """
    report = seen.report
    num_unseen = seen.num_dispatched * num_gateways
    spare = report.total_blocks - virtual_usage_blocks(report, params.load) - seen.dispatched_blocks * num_gateways
    running = {params.load.level(priority) for priority, count in report.running_by_priority if count > 0}
    added = (seen.dispatched_levels | {params.load.level(priority)}) - running
    spare -= sum(blocks for rank, blocks in params.load.headroom_blocks if rank in added)
    spare = spare - seen.report_age_s * growth_blocks_per_s(report) - demand_blocks + saved_blocks
    own = params.load.headroom(priority)
    if spare + own < 0 or (spare < 0 and own == 0):
        return spare + (report.head_of_line_blocks - max(report.waiting_blocks, report.head_of_line_blocks))
    share = 1.0
    if params.slow_start_s > 0:
        share = min(1.0, max(params.slow_start_share, seen.known_for_s / params.slow_start_s))
    batch = max(1, report.num_running + num_unseen + 1)
    used = running_blocks(report) + seen.dispatched_blocks * num_gateways
    requests_per_block = (report.num_running + num_unseen) / max(1, used)
    batch_left = max(1.0, batch - params.prefix_weight * saved_blocks * requests_per_block)
    if spare < 0:
        return -1.0 / (1.0 + (spare + own) / batch_left * share)
    return spare / batch_left * share
