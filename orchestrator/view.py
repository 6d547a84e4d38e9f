"""What do the records say? Frozen views for the policies and for people, and the look-ups a command needs. Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from instance.lifecycle import State
from instance.messages import RequestLoad
from migration.types import Incarnation, InstanceId, Outcome, RequestId
from orchestrator.counting import after_moves
from orchestrator.effects import Member, Refused, UpdateMembers
from orchestrator.errors import RefusalKind
from orchestrator.events import DrainRequested, MigrateRequested, MigrationEnded, MigrationNumber
from orchestrator.policy.load import NO_HEADROOM, LoadParams
from orchestrator.policy.moves import InstanceView, Move, freeness_steps
from orchestrator.state import (
    CoreParams,
    GatewayRecord,
    GatewaySnapshot,
    InstanceRecord,
    InstanceSnapshot,
    MigrationRecord,
    ScalingSnapshot,
    Snapshot,
)

_SERVING, _SERVING_WORD = State.SERVING, State.SERVING.value
_MAX_NAMED = 5
"""Alternatives spelled out in a refusal."""
NOT_OF_THE_PAIR = {Outcome.COMMITTED, Outcome.FINISHED_AT_SOURCE, Outcome.ABORTED_BY_CLIENT, Outcome.PREEMPTED}
"""Ends of a migration that say nothing against the next one from the same source to the same destination."""

Since = tuple[tuple[InstanceView, ...], tuple[Move, ...]]
"""Views made earlier at the same time, and the moves that have begun since."""


def instance_views(
    records: Mapping[InstanceId, InstanceRecord],
    migrations: Mapping[MigrationNumber, MigrationRecord],
    params: CoreParams,
    now_s: float,
    since: Since = ((), ()),
) -> tuple[InstanceView, ...]:
    """The live instances whose report is fresh, with the moves in flight counted as if they had been made. A source
    that has sent nothing yet is taken to copy as the others do.

    `since`: all else is as it was.
    """
    before, begun = since
    if before and not begun:
        return before
    look = _Look(records, migrations.values(), params, now_s)
    if before:
        changed = {name for move in begun for name in (move.source, move.destination)}
        return tuple(look.at(one.instance) if one.instance in changed else one for one in before)
    return tuple(
        look.at(name)
        for name, record in records.items()
        if record.load is not None and now_s - record.load_at_s <= params.stale_after_s
    )


class _Look:
    """At instances at one time. A tick looks at every one: what is found is filed by name, whose hash is known."""

    def __init__(
        self,
        records: Mapping[InstanceId, InstanceRecord],
        in_flight: Collection[MigrationRecord],
        params: CoreParams,
        now_s: float,
    ) -> None:
        self._records, self._now_s = records, now_s
        self._slots_out, self._slots_in = params.max_migrations_out, params.max_migrations_in
        self._moving: set[str] = {move.request_id for move in in_flight}
        self._leaving: defaultdict[InstanceId, list[MigrationRecord]] = defaultdict(list)
        self._joining: defaultdict[InstanceId, list[MigrationRecord]] = defaultdict(list)
        for move in in_flight:
            if self._is_there(move.source):
                self._leaving[move.source.instance].append(move)
            if self._is_there(move.destination):
                self._joining[move.destination.instance].append(move)
        self._on_the_way = {
            item.request_id: item
            for name, record in records.items()
            if name in self._leaving
            for item in record.requests
            if item.request_id in self._moving
        }
        self._usual_s: float | None = None

    def _is_there(self, incarnation: Incarnation) -> bool:
        record = self._records.get(incarnation.instance)
        return record is not None and record.incarnation == incarnation

    def at(self, name: InstanceId) -> InstanceView:
        record = self._records[name]
        arriving: tuple[RequestLoad, ...]
        load, requests, arriving = record.load, record.requests, ()
        slots_out, slots_in = self._slots_out, self._slots_in
        assert load is not None, "nobody looks at one that has said nothing"
        leaving, joining = self._leaving.get(name, ()), self._joining.get(name, ())
        if leaving or joining:  # nobody else can have said that one of those is there
            requests = tuple(item for item in requests if item.request_id not in self._moving)
            load, arriving = after_moves(load, requests, leaving, joining, self._on_the_way), self._arriving(joining)
            slots_out, slots_in = slots_out - len(leaving), slots_in - len(joining)
        return InstanceView(
            instance=name,
            load=load,
            requests=requests,
            draining=record.state is not _SERVING or load.state != _SERVING_WORD,
            slots_out=slots_out if slots_out > 0 else 0,
            slots_in=slots_in if slots_in > 0 else 0,
            signal_age_s=self._now_s - min(record.load_at_s, record.requests_at_s or record.load_at_s),
            copy_s_per_block=record.copy_s_per_block or self._usual_copy_s(),
            tightest=record.tightest,
            arriving=arriving,
        )

    def _arriving(self, joining: Sequence[MigrationRecord]) -> tuple[RequestLoad, ...]:
        return tuple(self._on_the_way[move.request_id] for move in joining if move.request_id in self._on_the_way)

    def _usual_copy_s(self) -> float:
        """Of those that have sent something."""
        if self._usual_s is None:
            known_s = [record.copy_s_per_block for record in self._records.values() if record.copy_s_per_block > 0]
            self._usual_s = statistics.median(known_s) if known_s else 0.0
        return self._usual_s


def members(
    instances: list[InstanceRecord], gateways: list[GatewayRecord], params: CoreParams, reason: str
) -> UpdateMembers:
    ordered = sorted(instances, key=lambda record: record.instance)
    told = tuple(Member(item.incarnation, item.actor_name, item.state) for item in ordered)
    return UpdateMembers(told, sum(gateway.alive for gateway in gateways), params.dispatch, reason)


def is_empty(record: InstanceRecord) -> bool:
    """The instance has confirmed that it drains, and since then both its reports say that nothing is left on it."""
    set_at_s, load = record.draining_set_at_s, record.load
    if record.state is not State.DRAINING or set_at_s is None or load is None:
        return False
    is_quiet = load.num_running + load.num_waiting + load.migrations_in + load.migrations_out == 0
    is_fresh = load.state == State.DRAINING.value and record.requests_at_s > set_at_s
    return is_quiet and is_fresh and not record.requests


def is_moving(instance: InstanceId, in_flight: Collection[MigrationRecord]) -> bool:
    """Whether anything leaves it, or is on its way there."""
    return any(instance in (move.source.instance, move.destination.instance) for move in in_flight)


# ---------------------------------------------------------------------- a command's look-ups
def find_move(
    event: MigrateRequested,
    instances: Mapping[InstanceId, InstanceRecord],
    in_flight: list[MigrationRecord],
    params: CoreParams,
    now_s: float,
) -> Move | Refused:
    """The one request that is meant, and whether it may go there now."""
    destination = instances.get(event.destination)
    if destination is None:
        return no_such_instance(event.destination, instances)
    found = find_request(event.reference, instances)
    if isinstance(found, Refused):
        return found
    source, request = found
    refusal = _why_not_move(source, destination, request, in_flight, params)
    if refusal is not None:
        return refusal
    return Move(
        request_id=RequestId(request.request_id),
        source=source.instance,
        destination=destination.instance,
        priority=request.priority,
        num_blocks=request.num_blocks,
        reason="asked for",
        signal_age_s=now_s - source.requests_at_s,
    )


def find_request(
    reference: str, instances: Mapping[InstanceId, InstanceRecord]
) -> tuple[InstanceRecord, RequestLoad] | Refused:
    """Exact engine id, else exact client id, else a prefix of either; the best kind of match that finds any decides."""
    owned = [(instances[name], request) for name in sorted(instances) for request in instances[name].requests]
    kinds = (
        [pair for pair in owned if pair[1].request_id == reference],
        [pair for pair in owned if pair[1].external_id == reference],
        [pair for pair in owned if reference and _has_prefix(pair[1], reference)],
    )
    for matches in kinds:
        # For a moment after a hand-over both sides may list a request: the later word counts.
        latest = {pair[1].request_id: pair for pair in sorted(matches, key=lambda pair: pair[0].requests_at_s)}
        if len(latest) == 1:
            return next(iter(latest.values()))
        if latest:
            named = ", ".join(sorted(latest)[:_MAX_NAMED])
            return Refused(RefusalKind.AMBIGUOUS, f"{reference!r} fits {len(latest)} requests: {named}")
    return Refused(RefusalKind.NOT_FOUND, f"no running request is named {reference!r}; `kvferry status` lists them")


def _has_prefix(request: RequestLoad, prefix: str) -> bool:
    return request.request_id.startswith(prefix) or request.external_id.startswith(prefix)


def _why_not_move(
    source: InstanceRecord,
    destination: InstanceRecord,
    request: RequestLoad,
    in_flight: list[MigrationRecord],
    params: CoreParams,
) -> Refused | None:
    def no(kind: RefusalKind, reason: str) -> Refused:
        return Refused(kind, reason)

    if source is destination:
        return no(RefusalKind.PRECONDITION, f"{request.request_id} is on {destination.instance} already")
    if destination.state is not State.SERVING:
        return no(RefusalKind.PRECONDITION, f"{destination.instance} is {destination.state.value}")
    if any(move.request_id == request.request_id for move in in_flight):
        return no(RefusalKind.PRECONDITION, f"{request.request_id} is on the move already")
    if not request.movable:
        return no(RefusalKind.PRECONDITION, f"{request.request_id} cannot be moved (now)")
    if sum(move.source == source.incarnation for move in in_flight) >= params.max_migrations_out:
        return no(RefusalKind.EXHAUSTED, f"{source.instance} sends {params.max_migrations_out} requests already")
    if sum(move.destination == destination.incarnation for move in in_flight) >= params.max_migrations_in:
        return no(RefusalKind.EXHAUSTED, f"{destination.instance} receives {params.max_migrations_in} requests already")
    return None


def why_not_drain(
    event: DrainRequested, instances: Mapping[InstanceId, InstanceRecord], num_waiters: int, params: CoreParams
) -> Refused | None:
    record = instances.get(event.instance)
    if record is None:
        return no_such_instance(event.instance, instances)
    if record.state is State.DRAINING:
        if not event.wait:
            return Refused(RefusalKind.PRECONDITION, f"{event.instance} is draining already")
    elif not any(other.state is State.SERVING for other in instances.values() if other is not record):
        last = f"{event.instance} is the last instance that serves; nothing could go anywhere"
        return Refused(RefusalKind.PRECONDITION, last)
    if event.wait and num_waiters >= params.max_waiters:
        return Refused(RefusalKind.EXHAUSTED, f"{params.max_waiters} callers are waiting already")
    return None


def no_such_instance(instance: InstanceId, instances: Mapping[InstanceId, InstanceRecord]) -> Refused:
    named = ", ".join(sorted(instances)[:_MAX_NAMED]) or "none"
    return Refused(RefusalKind.NOT_FOUND, f"no instance is named {instance!r}; there: {named}")


# ---------------------------------------------------------------------- records
def without_caller(record: MigrationRecord) -> MigrationRecord:
    return replace(record, token=None)


def begun(
    number: MigrationNumber, move: Move, source: Incarnation, destination: Incarnation, now_s: float
) -> MigrationRecord:
    """The record of a live migration that nobody waits for."""
    return MigrationRecord(
        number=number,
        request_id=move.request_id,
        source=source,
        destination=destination,
        mode="live",
        cause=move.reason,
        priority=move.priority,
        num_blocks=move.num_blocks,
        started_s=now_s,
        token=None,
    )


def ended(record: MigrationRecord, event: MigrationEnded, now_s: float) -> MigrationRecord:
    return replace(record, outcome=event.outcome, reason=event.reason, figures=event.figures, ended_s=now_s)


def snapshot(
    instances: list[InstanceRecord],
    gateways: list[GatewayRecord],
    migrations: list[MigrationRecord],
    now_s: float,
    params: LoadParams = NO_HEADROOM,
    scaling: ScalingSnapshot | None = None,
) -> Snapshot:
    by_name = sorted(instances, key=lambda record: (record.instance, record.epoch))
    return Snapshot(
        now_s=now_s,
        instances=tuple(_instance_snapshot(record, now_s, params) for record in by_name),
        gateways=tuple(
            GatewaySnapshot(item.gateway, item.url, item.process_id, item.alive)
            for item in sorted(gateways, key=lambda item: item.gateway)
        ),
        migrations=tuple(sorted(migrations, key=lambda record: -record.number)),
        scaling=scaling,
    )


def _instance_snapshot(record: InstanceRecord, now_s: float, params: LoadParams) -> InstanceSnapshot:
    load = record.load
    left = freeness_steps(load, params) if load is not None and record.state is State.SERVING else -math.inf
    return InstanceSnapshot(
        incarnation=Incarnation(record.instance, record.epoch, record.incarnation.address),
        model=record.model,
        block_size=record.block_size,
        total_blocks=record.total_blocks,
        process_id=record.process_id,
        state=record.state,
        reason=record.reason,
        load=load,
        report_age_s=None if load is None else now_s - record.load_at_s,
        freeness_steps=left if math.isfinite(left) else None,
        requests=record.requests,
        requests_age_s=now_s - record.requests_at_s,
        drained=record.drained,
    )
