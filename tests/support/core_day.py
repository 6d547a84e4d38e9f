"""What does a day of a small cluster look like to its core? One fixed story with a little of everything."""

from __future__ import annotations

from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.events import (
    DrainingSet,
    DrainRequested,
    Event,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
)
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report

A, B = InstanceId("instance-0"), InstanceId("instance-1")
PARAMS = CoreParams(rebalance=RebalanceParams(margin_steps=16))
COPIED = MigrationFigures(num_stages=2, copied_blocks=30, tail_blocks=2, stopped_s=0.0124)


def started(name: InstanceId) -> InstanceStarted:
    return InstanceStarted(Incarnation(name, Epoch(1), f"tcp://{name}"), f"kvferry-{name}-1", "tiny", 16, 1000)


def a_day() -> list[tuple[float, Event]]:
    """A is full and gives two requests away; one move commits, one is refused; then A drains, and B dies."""
    requests = tuple(request_load(f"r{number:02}", num_blocks=32) for number in range(30))
    rest = tuple(request_load(f"r{number:02}", num_blocks=32) for number in range(1, 30))
    empty = ReportReceived(load_report(A, step=4, state="draining"))
    return [
        (0.0, GatewayStarted("gateway-0", "g", "http://127.0.0.1:8000")),
        (0.0, started(A)),
        (0.0, started(B)),
        (0.1, ReportReceived(load_report(B))),
        (0.0, RequestsReceived(request_report(B))),
        (0.1, ReportReceived(load_report(A, step=2, free_blocks=40, num_running=30))),
        (0.1, RequestsReceived(request_report(A, *requests))),
        (0.2, Ticked()),
        (0.5, MigrationEnded(MigrationNumber(1), Outcome.COMMITTED, "", COPIED)),
        (0.1, MigrationEnded(MigrationNumber(2), Outcome.REFUSED, "no blocks", MigrationFigures())),
        (0.1, RequestsReceived(request_report(A, *rest, step=3))),
        (0.0, MigrateRequested(Token(7), "r05", InstanceId("instance-9"))),
        (0.1, DrainRequested(Token(8), A, wait=True)),
        (0.1, DrainingSet(A, Epoch(1), True)),
        (1.0, empty),
        (0.1, RequestsReceived(request_report(A, step=4))),
        (0.1, InstanceLost(B, Epoch(1), "killed")),
    ]
