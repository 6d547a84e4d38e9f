"""What has changed since a reader was last told? Differences of snapshots: a slow reader costs no more than others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import grpc

from instance.messages import RequestLoad
from migration.types import Epoch, InstanceId
from orchestrator.admin import convert
from orchestrator.admin.failures import Failure, invalid
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.events import MigrationNumber
from orchestrator.state import InstanceSnapshot, MigrationRecord, Snapshot

ALL_TOPICS = frozenset({pb.WATCH_TOPIC_INSTANCES, pb.WATCH_TOPIC_REQUESTS, pb.WATCH_TOPIC_MIGRATIONS})


Place = tuple[InstanceId, Epoch]


@dataclass(frozen=True, slots=True)
class WatchParams:
    period_s: float = 0.25
    """Time between two looks; longer where a look takes more than a tenth of it."""
    alive_s: float = 10.0
    """An empty message after so long without a change."""
    max_streams: int = 16
    max_changes: int = 500
    """In one message."""
    gone_after_s: float = 0.6
    """A request on the move may be in nobody's report for a moment: it has ended when it is missing for so long."""
    requests_at_once: int = 500
    """Looked at before others have their turn."""


SHARE = 0.1
"""Of the time one stream may spend looking."""


@dataclass(frozen=True, slots=True)
class _Report:
    """The last report of an instance that the reader was told of."""

    loads: tuple[RequestLoad, ...]
    ids: frozenset[str]
    at_s: float


class Watcher:
    """What one reader knows. Bounded by what there is: nothing is queued."""

    def __init__(self, topics: frozenset[int], params: WatchParams) -> None:
        self._topics = topics
        self._params = params
        self._instances: dict[Place, tuple[object, ...]] = {}
        self._reports: dict[Place, _Report] = {}
        self._requests: dict[str, tuple[Place, str, int, str]] = {}
        """Owner, status, priority and the client's id as told, by the engine's id."""
        self._missing_since_s: dict[str, float] = {}
        self._in_flight: set[MigrationNumber] = set()
        self._latest: MigrationNumber | None = None
        """The highest number seen; None before the first look."""
        self.num_missed = 0
        """Migrations that were forgotten before this reader looked."""

    def look(self, snapshot: Snapshot) -> list[pb.Change]:
        """What it is to be told now."""
        return [change for part in self.parts(snapshot) for change in part]

    def parts(self, snapshot: Snapshot) -> Iterator[list[pb.Change]]:
        """The same in parts, none of which takes long to make."""
        if pb.WATCH_TOPIC_INSTANCES in self._topics:
            yield list(self._look_at_instances(snapshot))
        if pb.WATCH_TOPIC_REQUESTS in self._topics:
            yield from self._look_at_requests(snapshot)
        if pb.WATCH_TOPIC_MIGRATIONS in self._topics:
            yield list(self._look_at_migrations(snapshot))

    def _look_at_instances(self, snapshot: Snapshot) -> Iterator[pb.Change]:
        now: dict[Place, tuple[object, ...]] = {}
        for item in snapshot.instances:
            key = _place(item)
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
    def _look_at_requests(self, snapshot: Snapshot) -> Iterator[list[pb.Change]]:
        """Only reports that are new are looked at."""
        now = {_place(item): item for item in snapshot.instances}
        for place in self._reports.keys() - now.keys():
            self._miss(place, self._reports.pop(place).ids, snapshot.now_s)
        changes: list[pb.Change] = []
        num_seen = 0
        for place, item in now.items():
            known = self._reports.get(place)
            if known is not None and known.loads is item.requests:
                continue
            report = _Report(
                item.requests,
                frozenset(load.request_id for load in item.requests),
                snapshot.now_s - item.requests_age_s,
            )
            changes += self._look_at_report(place, item, report)
            self._reports[place] = report
            if known is not None:
                self._miss(place, known.ids - report.ids, snapshot.now_s)
            num_seen += len(item.requests)
            if num_seen >= self._params.requests_at_once:
                yield changes
                changes, num_seen = [], 0
        over_s = snapshot.now_s - self._params.gone_after_s
        for request_id in [one for one, since_s in self._missing_since_s.items() if since_s <= over_s]:
            changes.append(pb.Change(kind=pb.Change.KIND_ENDED, request=self._forget(request_id)))
        yield changes

    def _look_at_report(self, place: Place, item: InstanceSnapshot, report: _Report) -> Iterator[pb.Change]:
        for load in item.requests:
            request_id = load.request_id
            told = self._requests.get(request_id)
            now = (place, load.status, load.priority, load.external_id)
            if told is not None and told[0] != place:
                other = self._reports.get(told[0])
                if other is not None and request_id in other.ids and other.at_s >= report.at_s:
                    continue  # for a moment after a hand-over both sides list it: the later word counts
            if self._missing_since_s:
                self._missing_since_s.pop(request_id, None)
            if told == now:
                continue
            self._requests[request_id] = now
            kind = pb.Change.KIND_ADDED if told is None else pb.Change.KIND_CHANGED
            yield pb.Change(kind=kind, request=convert.request(load, item))

    def _miss(self, place: Place, request_ids: frozenset[str], now_s: float) -> None:
        """Their owner does not list them any more."""
        for request_id in request_ids:
            told = self._requests.get(request_id)
            if told is not None and told[0] == place:
                self._missing_since_s.setdefault(request_id, now_s)

    def _forget(self, request_id: str) -> pb.Request:
        del self._missing_since_s[request_id]
        (owner, _), status, priority, external_id = self._requests.pop(request_id)
        return pb.Request(
            name=convert.REQUESTS + request_id,
            external_id=external_id,
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


def _place(item: InstanceSnapshot) -> Place:
    return item.incarnation.instance, item.incarnation.epoch


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
        now_s, size = asyncio.get_running_loop().time, self._params.max_changes
        is_synced, told_s = False, now_s()
        while not self._closing.is_set():
            looking_s, began_s = 0.0, now_s()
            for changes in watcher.parts(self._look()):
                looking_s += now_s() - began_s
                for start in range(0, len(changes), size):
                    yield self._message(watcher, is_synced, changes[start : start + size])
                    told_s = now_s()
                await asyncio.sleep(0)  # the loop has more to do than to tell people about it
                began_s = now_s()
            if not is_synced or now_s() - told_s >= self._params.alive_s:
                is_synced = True
                yield self._message(watcher, is_synced, [])
                told_s = now_s()
            try:
                async with asyncio.timeout(max(self._params.period_s, looking_s / SHARE)):
                    await self._closing.wait()
            except TimeoutError:
                continue
        raise Failure(grpc.StatusCode.UNAVAILABLE, "STOPPING", "the orchestrator is being stopped")

    @staticmethod
    def _message(watcher: Watcher, is_synced: bool, changes: list[pb.Change]) -> pb.WatchResponse:
        return pb.WatchResponse(changes=changes, synced=is_synced, num_missed_migrations=watcher.num_missed)

    def _look(self) -> Snapshot:
        """One snapshot serves all streams that look at about the same time."""
        now_s = asyncio.get_running_loop().time()
        if self._looked is None or not 0 <= now_s - self._looked.now_s < self._params.period_s / 2:
            self._looked = self._snapshot()
        return self._looked
