"""Is a reader of Watch told what is there and each change once, however seldom it looks?"""

from __future__ import annotations

from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.watching import ALL_TOPICS, Watcher, WatchParams
from orchestrator.core import Orchestrator
from orchestrator.events import (
    Event,
    InstanceLost,
    InstanceStarted,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    ReportReceived,
    RequestsReceived,
    Token,
)
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report

A, B = InstanceId("instance-0"), InstanceId("instance-1")
PARAMS = WatchParams(gone_after_s=0.5)
REQUESTS = frozenset({int(pb.WATCH_TOPIC_REQUESTS)})
MIGRATIONS = frozenset({int(pb.WATCH_TOPIC_MIGRATIONS)})


class Scene:
    """A core with two instances, and one reader."""

    def __init__(self, topics: frozenset[int] = frozenset(map(int, ALL_TOPICS)), **core: int) -> None:
        self.core = Orchestrator(CoreParams(is_rebalancing=False, **core))  # type: ignore[arg-type]
        self.now_s, self.step, self.num_moves = 10.0, 0, 0
        self.watcher = Watcher(topics, PARAMS)
        for instance in (A, B):
            self.on(InstanceStarted(Incarnation(instance, Epoch(1), "tcp://127.0.0.1:1"), "actor", "tiny", 16, 1000))
            self.runs(instance)

    def on(self, event: Event) -> None:
        self.core.on(event, self.now_s)

    def runs(self, instance: InstanceId, *requests: RequestLoad) -> None:
        self.step += 1
        self.now_s += 0.01
        self.on(ReportReceived(load_report(instance, step=self.step, num_running=len(requests))))
        self.on(RequestsReceived(request_report(instance, *requests, step=self.step)))

    def moves(self, request_id: str) -> None:
        self.num_moves += 1
        self.on(MigrateRequested(Token(self.num_moves), request_id, B))

    def ends(self, number: int) -> None:
        self.on(MigrationEnded(MigrationNumber(number), Outcome.COMMITTED, "", MigrationFigures()))

    def looks(self, after_s: float = 0.0) -> list[tuple[str, str]]:
        """(kind, name) of each change."""
        self.now_s += after_s
        told = []
        for change in self.watcher.look(self.core.snapshot(self.now_s)):
            resource = getattr(change, change.WhichOneof("resource") or "")
            told.append((pb.Change.Kind.Name(change.kind).removeprefix("KIND_").lower(), resource.name))
        return told


def test_the_first_look_is_the_whole_state_and_the_next_only_what_changed() -> None:
    scene = Scene()
    scene.runs(A, request_load("r"))
    assert scene.looks() == [
        ("added", "instances/instance-0"),
        ("added", "instances/instance-1"),
        ("added", "requests/r"),
    ]
    assert scene.looks() == [], "age alone is no change"
    scene.runs(B, request_load("s"))
    assert scene.looks() == [("changed", "instances/instance-1"), ("added", "requests/s")]


def test_a_request_that_moves_has_changed_also_when_nobody_reports_it_for_a_moment() -> None:
    scene = Scene(REQUESTS)
    scene.runs(A, request_load("r"))
    assert scene.looks() == [("added", "requests/r")]
    scene.runs(A)
    assert scene.looks(after_s=0.2) == [], "it may be on its way"
    scene.runs(B, request_load("r"))
    assert scene.looks() == [("changed", "requests/r")]
    assert scene.looks(after_s=5.0) == []


def test_a_request_that_both_sides_report_is_where_the_later_report_says() -> None:
    scene = Scene(REQUESTS)
    scene.runs(A, request_load("r"))
    scene.looks()
    scene.runs(B, request_load("r"))
    (change,) = scene.watcher.look(scene.core.snapshot(scene.now_s))
    assert change.request.instance == "instances/instance-1"


def test_a_request_that_is_missing_for_long_has_ended_once() -> None:
    scene = Scene(REQUESTS)
    scene.runs(A, request_load("r"), request_load("s", status="waiting"))
    scene.looks()
    scene.runs(A, request_load("s"))
    assert scene.looks() == [("changed", "requests/s")], "its status"
    assert scene.looks(after_s=0.6) == [("ended", "requests/r")]
    assert scene.looks(after_s=9.0) == []
    scene.on(InstanceLost(A, Epoch(1), "killed"))
    scene.looks()
    assert scene.looks(after_s=0.6) == [("ended", "requests/s")]


def test_migrations_start_and_end_and_old_ones_are_not_told() -> None:
    scene = Scene(MIGRATIONS)
    scene.runs(A, request_load("r"), request_load("s"))
    scene.moves("r")
    scene.ends(1)
    scene.moves("s")
    assert scene.looks() == [("added", "migrations/2")], "what had ended before is no news"
    scene.ends(2)
    assert scene.looks() == [("ended", "migrations/2")]
    scene.moves("r")
    scene.ends(3)
    assert scene.looks() == [("ended", "migrations/3")], "it began and ended between two looks"
    assert scene.looks() == [] and scene.watcher.num_missed == 0


def test_migrations_that_are_forgotten_before_the_reader_looks_are_counted() -> None:
    scene = Scene(MIGRATIONS, max_history=2)
    scene.runs(A, request_load("r"), request_load("s"))
    scene.moves("s")
    scene.looks()
    scene.ends(1)
    for number in range(2, 7):
        scene.moves("r")
        scene.ends(number)
    assert scene.looks() == [("ended", "migrations/5"), ("ended", "migrations/6")]
    assert scene.watcher.num_missed == 4
    assert scene.looks() == [] and scene.watcher.num_missed == 4


def test_an_instance_that_is_not_remembered_any_more_has_ended() -> None:
    scene = Scene(max_stopped=1)
    scene.looks()
    scene.on(InstanceLost(A, Epoch(1), "killed"))
    assert scene.looks() == [("changed", "instances/instance-0")]
    scene.on(InstanceLost(B, Epoch(1), "killed"))
    assert scene.looks() == [("changed", "instances/instance-1"), ("ended", "instances/instance-0")]
