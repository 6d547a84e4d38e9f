"""What has changed since a reader was last told? Differences of snapshots: a slow reader costs no more than others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from operator import is_

import grpc

from instance.messages import RequestLoad
from migration.types import InstanceId
from orchestrator.admin import convert
from orchestrator.admin.failures import Failure, invalid
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.events import MigrationNumber
from orchestrator.state import InstanceSnapshot, MigrationRecord, Snapshot

ALL_TOPICS = frozenset({pb.WATCH_TOPIC_INSTANCES, pb.WATCH_TOPIC_REQUESTS, pb.WATCH_TOPIC_MIGRATIONS})


@dataclass(frozen=True, slots=True)
class WatchParams:
    period_s: float = 0.25
    """Time between two looks."""
    alive_s: float = 10.0
    """An empty message after so long without a change."""
    max_streams: int = 16
    max_changes: int = 500
    """In one message."""
    gone_after_s: float = 0.6
    """A request on the move may be in nobody's report for a moment: it has ended when it is missing for so long."""


class Watcher:
    """What one reader knows. Bounded by what there is: nothing is queued."""

    def __init__(self, topics: frozenset[int], params: WatchParams) -> None:
        self._topics = topics
        self._params = params
        self._instances: dict[tuple[str, int], tuple[object, ...]] = {}
        self._reports: list[tuple[RequestLoad, ...]] = []
        self._requests: dict[str, tuple[InstanceId, str, int]] = {}
        """Owner, status and priority as told, by the engine's id."""
        self._external_ids: dict[str, str] = {}
        self._missing_since_s: dict[str, float] = {}
        self._in_flight: set[MigrationNumber] = set()
        self._latest: MigrationNumber | None = None
        """The highest number seen; None before the first look."""
        self.num_missed = 0
        """Migrations that were forgotten before this reader looked."""

    def look(self, snapshot: Snapshot) -> list[pb.Change]:
        """What it is to be told now."""
        changes: list[pb.Change] = []
        if pb.WATCH_TOPIC_INSTANCES in self._topics:
            changes += self._look_at_instances(snapshot)
        if pb.WATCH_TOPIC_REQUESTS in self._topics:
            changes += self._look_at_requests(snapshot)
        if pb.WATCH_TOPIC_MIGRATIONS in self._topics:
            changes += self._look_at_migrations(snapshot)
        return changes

    def _look_at_instances(self, snapshot: Snapshot) -> Iterator[pb.Change]:
        now: dict[tuple[str, int], tuple[object, ...]] = {}
        for item in snapshot.instances:
            key = (item.incarnation.instance, item.incarnation.epoch)
            now[key] = (item.state, item.reason, item.drained, item.load)
            if key not in self._instances:
                yield pb.Change(kind=pb.Change.KIND_ADDED, instance=convert.instance(item))
            elif self._instances[key] != now[key]:
                yield pb.Change(kind=pb.Change.KIND_CHANGED, instance=convert.instance(item))
        for name, epoch in self._instances.keys() - now.keys():
            gone = pb.Instance(name=convert.INSTANCES + name, epoch=epoch)
            yield pb.Change(kind=pb.Change.KIND_ENDED, instance=gone)
        self._instances = now

    # ------------------------------------------------------------------ requests
    def _look_at_requests(self, snapshot: Snapshot) -> Iterator[pb.Change]:
        reports = [item.requests for item in snapshot.instances]
        is_same = len(reports) == len(self._reports) and all(map(is_, reports, self._reports))
        if is_same and not self._missing_since_s:
            return
        self._reports = reports
        there: dict[str, tuple[RequestLoad, InstanceSnapshot]] = {}
        for item in sorted(snapshot.instances, key=lambda item: -item.requests_age_s):
            there.update((load.request_id, (load, item)) for load in item.requests)  # the later word counts
        for request_id, (load, item) in there.items():
            self._missing_since_s.pop(request_id, None)
            told = self._requests.get(request_id)
            now = (item.incarnation.instance, load.status, load.priority)
            if told == now:
                continue
            self._requests[request_id] = now
            self._external_ids[request_id] = load.external_id
            kind = pb.Change.KIND_ADDED if told is None else pb.Change.KIND_CHANGED
            yield pb.Change(kind=kind, request=convert.request(load, item))
        for request_id in self._requests.keys() - there.keys():
            self._missing_since_s.setdefault(request_id, snapshot.now_s)
        over_s = snapshot.now_s - self._params.gone_after_s
        for request_id in [one for one, since_s in self._missing_since_s.items() if since_s <= over_s]:
            yield pb.Change(kind=pb.Change.KIND_ENDED, request=self._forget(request_id))

    def _forget(self, request_id: str) -> pb.Request:
        del self._missing_since_s[request_id]
        owner, status, priority = self._requests.pop(request_id)
        return pb.Request(
            name=convert.REQUESTS + request_id,
            external_id=self._external_ids.pop(request_id),
            instance=convert.INSTANCES + owner,
            status=status,
            priority=priority,
        )

    # ------------------------------------------------------------------ migrations
    def _look_at_migrations(self, snapshot: Snapshot) -> Iterator[pb.Change]:
        is_first = self._latest is None
        latest = self._latest or MigrationNumber(0)
        new = [record for record in snapshot.migrations if record.number > latest]
        known = {record.number: record for record in snapshot.migrations if record.number in self._in_flight}
        self._latest = max((record.number for record in new), default=latest)
        if not is_first:
            self.num_missed += (self._latest - latest - len(new)) + len(self._in_flight - known.keys())
        ended = {number for number, record in known.items() if record.outcome is not None}
        self._in_flight = (self._in_flight & known.keys()) - ended
        for record in [known[number] for number in sorted(ended)] + sorted(new, key=lambda record: record.number):
            if record.outcome is None:
                self._in_flight.add(record.number)
                yield _migration(pb.Change.KIND_ADDED, record, snapshot.now_s)
            elif not is_first:
                yield _migration(pb.Change.KIND_ENDED, record, snapshot.now_s)


def _migration(kind: pb.Change.Kind.ValueType, record: MigrationRecord, now_s: float) -> pb.Change:
    return pb.Change(kind=kind, migration=convert.migration(record, now_s))


class Watchtower:
    """All open Watch streams."""

    def __init__(self, snapshot: Callable[[], Snapshot], params: WatchParams | None = None) -> None:
        self._snapshot = snapshot
        self._params = params or WatchParams()
        self._closing = asyncio.Event()
        self._looked: Snapshot | None = None
        self.num_streams = 0

    async def watch(self, asked: pb.WatchRequest) -> AsyncIterator[pb.WatchResponse]:
        """Until the reader leaves. Raises Failure: no such topic, too many streams, or the server stops."""
        topics = frozenset(asked.topics) or ALL_TOPICS
        if not topics <= ALL_TOPICS:
            raise invalid("topics", f"{min(topics - ALL_TOPICS)} is none of its values")
        if self.num_streams >= self._params.max_streams:
            text = f"{self._params.max_streams} Watch streams are open already"
            raise Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS", text)
        self.num_streams += 1
        try:
            async for message in self._tell(Watcher(topics, self._params)):
                yield message
        finally:
            self.num_streams -= 1

    def close(self) -> None:
        """End all streams."""
        self._closing.set()

    async def _tell(self, watcher: Watcher) -> AsyncIterator[pb.WatchResponse]:
        is_synced, told_s = False, 0.0
        while not self._closing.is_set():
            snapshot = self._look()
            changes, size = watcher.look(snapshot), self._params.max_changes
            for start in range(0, len(changes), size):
                message = pb.WatchResponse(changes=changes[start : start + size])
                message.num_missed_migrations = watcher.num_missed
                message.synced = is_synced or start + size >= len(changes)
                yield message
            if not changes and (not is_synced or snapshot.now_s - told_s >= self._params.alive_s):
                yield pb.WatchResponse(synced=True, num_missed_migrations=watcher.num_missed)
                told_s = snapshot.now_s
            if changes:
                told_s = snapshot.now_s
            is_synced = True
            try:
                async with asyncio.timeout(self._params.period_s):
                    await self._closing.wait()
            except TimeoutError:
                continue
        raise Failure(grpc.StatusCode.UNAVAILABLE, "STOPPING", "the orchestrator is being stopped")

    def _look(self) -> Snapshot:
        """One snapshot serves all streams that look at about the same time."""
        now_s = asyncio.get_running_loop().time()
        if self._looked is None or not 0 <= now_s - self._looked.now_s < self._params.period_s / 2:
            self._looked = self._snapshot()
        return self._looked
