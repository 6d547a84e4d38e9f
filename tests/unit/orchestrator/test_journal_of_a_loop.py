"""Does the journal of a loop that carried out what its core decided hold all of it? Over a fake cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from instance.mailbox import Mailbox
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.core import Orchestrator
from orchestrator.effects import Drained
from orchestrator.events import (
    DrainRequested,
    GatewayStarted,
    InstanceStarted,
    MigrateRequested,
    ReportReceived,
    RequestsReceived,
)
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams
from tests.support.fake_cluster import FakeCluster
from tests.support.reports import load_report, request_load, request_report
from tests.support.written_journal import PROMPT, read

A, B = InstanceId("instance-0"), InstanceId("instance-1")


def say(loop: OrchestratorLoop, instance: InstanceId, num_requests: int, step: int, state: str = "serving") -> None:
    requests = tuple(request_load(f"r{number:02}", num_blocks=32) for number in range(num_requests))
    free_blocks = 1000 - 32 * num_requests
    load = load_report(instance, step=step, state=state, free_blocks=free_blocks, num_running=num_requests)
    loop.handle(ReportReceived(load))
    loop.handle(RequestsReceived(request_report(instance, *requests, step=step)))


async def run_a_day(path: Path, cluster: FakeCluster) -> None:
    """Two instances; one is crowded, gives requests away, drains, and dies."""
    mailbox = Mailbox("test")
    await mailbox.open()
    core = Orchestrator(CoreParams())
    journal = Journal(path, core, asyncio.get_running_loop().time(), PROMPT)
    loop = OrchestratorLoop(core, cluster, mailbox, LoopParams(tick_s=0.001), journal)
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    try:
        loop.add(GatewayStarted("gateway-0", "kvferry-gateway-0", "http://127.0.0.1:8000"))
        for name in (A, B):
            loop.add(
                InstanceStarted(Incarnation(name, Epoch(1), "tcp://127.0.0.1:1"), f"kvferry-{name}-1", "tiny", 16, 1000)
            )
        say(loop, B, 0, 1)
        say(loop, A, 31, 1)
        async with asyncio.timeout(30.0):
            await until(lambda: len(cluster.migrated) >= 2)
            await loop.ask(lambda token: MigrateRequested(token, "r20", B))
            drain = asyncio.create_task(loop.ask(lambda token: DrainRequested(token, A, wait=True)))
            await until(lambda: (f"kvferry-{A}-1", True) in cluster.draining)
            step = 2
            while not drain.done():
                say(loop, A, 0, step, "draining")
                step += 1
                await asyncio.sleep(0)
            assert drain.result() == Drained(A)
            cluster.deaths[f"kvferry-{A}-1"].set_result("killed")
            await until(lambda: bool(cluster.fenced))
    finally:
        loop.stop()
        await running
        journal.close()
        mailbox.close()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - the fake cluster tells nobody
        await asyncio.sleep(0)


async def test_a_day_of_a_loop_is_explained_and_replays_to_the_last_effect(tmp_path: Path) -> None:
    cluster = FakeCluster()
    await run_a_day(tmp_path / "j", cluster)
    story, replay = read(tmp_path / "j")
    assert replay.divergence is None and replay.num_lost == 0
    assert replay.num_verified == sum(story.summary.events.values()) > 10
    moves = [row for row in story.rows if row.what.startswith("move ")]
    assert len(moves) == len(cluster.migrated)
    assert {row.why.partition(":")[0] for row in moves} >= {"rebalance", "asked for"}
    assert all(row.came_of_it.startswith("committed after") and row.age_s is not None for row in moves)
    (drain,) = [row for row in story.rows if row.what == f"drain {A}" and row.is_decision]
    assert drain.came_of_it.startswith("confirmed, empty after")
    assert any(row.what.startswith(f"fence {A}, epoch 1, at {B}") and row.why == "killed" for row in story.rows)
