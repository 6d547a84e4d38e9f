"""What do the records say of each instance? `view.instance_views`, written out: each is made anew. For tests."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from instance.lifecycle import State
from migration.types import Incarnation, InstanceId, RequestId
from orchestrator.counting import after_moves
from orchestrator.events import MigrationNumber
from orchestrator.policy.moves import InstanceView
from orchestrator.state import CoreParams, InstanceRecord, MigrationRecord


def instance_views(
    records: Mapping[InstanceId, InstanceRecord],
    migrations: Mapping[MigrationNumber, MigrationRecord],
    params: CoreParams,
    now_s: float,
) -> tuple[InstanceView, ...]:
    """The live instances whose report is fresh, with the moves in flight counted as if they had been made."""
    instances, in_flight = records.values(), migrations.values()
    moving = {record.request_id for record in in_flight}
    sources: defaultdict[Incarnation, list[MigrationRecord]] = defaultdict(list)
    destinations: defaultdict[Incarnation, list[MigrationRecord]] = defaultdict(list)
    for move in in_flight:
        sources[move.source].append(move)
        destinations[move.destination].append(move)
    on_the_way = {
        item.request_id: item
        for record in instances
        if record.incarnation in sources
        for item in record.requests
        if RequestId(item.request_id) in moving
    }
    known_s = [record.copy_s_per_block for record in instances if record.copy_s_per_block > 0]
    usual_s = statistics.median(known_s) if known_s else 0.0
    views: list[InstanceView] = []
    for record in instances:
        if record.load is None or now_s - record.load_at_s > params.stale_after_s:
            continue
        leaving, joining = sources.get(record.incarnation, []), destinations.get(record.incarnation, [])
        requests = record.requests
        if leaving or joining:  # nobody else can have said that one of those is there
            requests = tuple(item for item in requests if RequestId(item.request_id) not in moving)
        views.append(
            InstanceView(
                instance=record.instance,
                load=after_moves(record.load, requests, leaving, joining, on_the_way),
                requests=requests,
                draining=record.state is not State.SERVING or record.load.state != State.SERVING.value,
                slots_out=max(0, params.max_migrations_out - len(leaving)),
                slots_in=max(0, params.max_migrations_in - len(joining)),
                signal_age_s=now_s - min(record.load_at_s, record.requests_at_s or record.load_at_s),
                copy_s_per_block=record.copy_s_per_block or usual_s,
                tightest=record.tightest,
                arriving=tuple(on_the_way[move.request_id] for move in joining if move.request_id in on_the_way),
            )
        )
    return tuple(views)
