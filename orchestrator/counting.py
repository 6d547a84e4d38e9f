"""What do the migrations in flight make of an instance's load? As if they had been made: what leaves is gone, what
comes runs. Pure.

One that waits holds no blocks, or few: at its source it leaves the queue and nothing else, and where it goes it counts
with the blocks it will want. So who waits is helped once, by one policy of a tick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from instance.messages import LoadReport, RequestLoad
from orchestrator.policy.moves import after_joining, after_leaving, after_leaving_queue, blocks_wanted, is_queued
from orchestrator.state import MigrationRecord


def after_moves(
    load: LoadReport,
    requests: Sequence[RequestLoad],
    leaving: Sequence[MigrationRecord],
    joining: Sequence[MigrationRecord],
    on_the_way: Mapping[str, RequestLoad],
) -> LoadReport:
    """`requests`: of the instance, but for those that move; `on_the_way`: these, by id, as their sources tell them."""
    for move in leaving:
        load = _after_leaving(load, move, on_the_way.get(move.request_id), requests)
    reserved_blocks = load.reserved_blocks
    for move in joining:
        one, num_blocks = on_the_way.get(move.request_id), move.num_blocks
        if one is not None and (is_queued(one) or not num_blocks):
            num_blocks = max(num_blocks, blocks_wanted(one, load.block_size))
        already = min(reserved_blocks, num_blocks)  # what the instance itself has set aside is not counted twice
        reserved_blocks -= already
        load = after_joining(load, move.priority, num_blocks - already)
    return load


def _after_leaving(
    load: LoadReport, move: MigrationRecord, one: RequestLoad | None, requests: Sequence[RequestLoad]
) -> LoadReport:
    if one is None or one.status == "running":
        return after_leaving(load, move.priority, move.num_blocks)
    if is_queued(one):
        return after_leaving_queue(load, one, filter(is_queued, requests))
    if not move.num_blocks:
        return load  # stopped before it had begun: it is out of the queue already
    return after_leaving(load, move.priority, move.num_blocks)
