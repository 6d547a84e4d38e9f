"""What is there? The reading methods for instances, requests and migrations: values out of the loop's snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import grpc

from instance.messages import RequestLoad
from orchestrator.admin import convert
from orchestrator.admin.failures import Failure, invalid
from orchestrator.admin.paging import Cursor, Pager
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.state import InstanceSnapshot, MigrationRecord, Snapshot

DEFAULT_INSTANCES = 1000
DEFAULT_REQUESTS = 1000
DEFAULT_MIGRATIONS = 100
STATUSES = ("running", "waiting", "preempted", "migrating_out")


class Reader:
    """The Get and List methods. All raise Failure."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._pager = Pager()

    # ------------------------------------------------------------------ instances
    def list_instances(self, asked: pb.ListInstancesRequest) -> pb.ListInstancesResponse:
        size = self._pager.size(asked.page_size, DEFAULT_INSTANCES)
        after = self._pager.cursor(asked, tuple[str, int])
        states = {_known(convert.STATE_OF, number, "states") for number in asked.states}
        snapshot = self._snapshot()
        found = (
            ((item.incarnation.instance, item.incarnation.epoch), partial(convert.instance, item))
            for item in snapshot.instances
            if not states or item.state in states
        )
        instances, next_token = self._pager.page(asked, _behind(found, after), size)
        gateways = [convert.gateway(item) for item in snapshot.gateways] if after is None else []
        return pb.ListInstancesResponse(instances=instances, gateways=gateways, next_page_token=next_token)

    def get_instance(self, asked: pb.GetInstanceRequest) -> pb.GetInstanceResponse:
        name = convert.instance_id(asked.name)
        found = convert.find_instance(self._snapshot(), name)
        if found is None:
            raise _not_found(f"no instance is named {name!r}")
        return pb.GetInstanceResponse(instance=convert.instance(found))

    # ------------------------------------------------------------------ requests
    def list_requests(self, asked: pb.ListRequestsRequest) -> pb.ListRequestsResponse:
        size = self._pager.size(asked.page_size, DEFAULT_REQUESTS)
        after = self._pager.cursor(asked, tuple[str, int, str])
        parent = convert.instance_id(asked.parent, "parent") if asked.parent else None
        if asked.status and asked.status not in STATUSES:
            raise invalid("status", f"it is none of {', '.join(STATUSES)}")
        owners = [item for item in self._snapshot().instances if parent is None or item.incarnation.instance == parent]

        def is_asked_for(load: RequestLoad) -> bool:
            return (not asked.status or load.status == asked.status) and (
                not asked.external_id or load.external_id == asked.external_id
            )

        is_filtered = bool(asked.status or asked.external_id)
        requests, next_token = self._pager.page(asked, _requests_behind(owners, after, is_asked_for), size)
        total = sum(sum(map(is_asked_for, item.requests)) if is_filtered else len(item.requests) for item in owners)
        return pb.ListRequestsResponse(requests=requests, next_page_token=next_token, total_size=total)

    def get_request(self, asked: pb.GetRequestRequest) -> pb.GetRequestResponse:
        name = convert.bare(asked.name, convert.REQUESTS)
        owned = [(load, item) for item in self._snapshot().instances for load in item.requests]
        found = [pair for pair in owned if pair[0].request_id == name]
        found = found or [pair for pair in owned if pair[0].external_id == name]
        if not found:
            raise _not_found(f"no running request is named {name!r}")
        if len({load.request_id for load, _ in found}) > 1:
            raise invalid("name", f"{name!r} is the client's id of {len(found)} requests: give the engine's id of one")
        # For a moment after a hand-over both sides may list it: the later word counts.
        load, owner = min(found, key=lambda pair: pair[1].requests_age_s)
        return pb.GetRequestResponse(request=convert.request(load, owner))

    # ------------------------------------------------------------------ migrations
    def list_migrations(self, asked: pb.ListMigrationsRequest) -> pb.ListMigrationsResponse:
        size = self._pager.size(asked.page_size, DEFAULT_MIGRATIONS)
        before = self._pager.cursor(asked, tuple[int])
        outcomes = {_known(convert.OUTCOME_OF, number, "outcomes") for number in asked.outcomes}
        request = convert.bare(asked.request, convert.REQUESTS, "request") if asked.request else None
        instance = convert.instance_id(asked.instance, "instance") if asked.instance else None
        snapshot = self._snapshot()

        def is_asked_for(record: MigrationRecord) -> bool:
            return (
                (not outcomes or record.outcome in outcomes)
                and (request is None or record.request_id == request)
                and (instance is None or instance in (record.source.instance, record.destination.instance))
            )

        found = (
            ((-record.number,), partial(convert.migration, record, snapshot.now_s))
            for record in snapshot.migrations
            if is_asked_for(record)
        )
        migrations, next_token = self._pager.page(asked, _behind(found, before), size)
        return pb.ListMigrationsResponse(migrations=migrations, next_page_token=next_token)

    def get_migration(self, asked: pb.GetMigrationRequest) -> pb.GetMigrationResponse:
        number = convert.migration_number(asked.name)
        snapshot = self._snapshot()
        for record in snapshot.migrations:
            if record.number == number:
                return pb.GetMigrationResponse(migration=convert.migration(record, snapshot.now_s))
        raise _not_found(f"no migration has the number {number}, or it ended long ago")


def _behind(
    found: Iterator[tuple[Cursor, Callable[[], convert.Resource]]], after: Cursor | None
) -> Iterator[tuple[Cursor, Callable[[], convert.Resource]]]:
    """What is sorted by its key, from behind the cursor on."""
    return (pair for pair in found if after is None or pair[0] > after)


def _requests_behind(
    owners: list[InstanceSnapshot], after: Cursor | None, is_asked_for: Callable[[RequestLoad], bool]
) -> Iterator[tuple[Cursor, Callable[[], pb.Request]]]:
    """By instance, epoch and id; only the instances of one page are sorted."""
    for owner in owners:
        place = (owner.incarnation.instance, owner.incarnation.epoch)
        if after is not None and place < after[:2]:
            continue
        for load in sorted(filter(is_asked_for, owner.requests), key=lambda load: load.request_id):
            if after is None or (*place, load.request_id) > after:
                yield (*place, load.request_id), partial(convert.request, load, owner)


def _known(names: dict[int, convert.Value], number: int, field: str) -> convert.Value:
    if number not in names:
        raise invalid(field, f"{number} is none of its values")
    return names[number]


def _not_found(text: str) -> Failure:
    return Failure(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", text)
