"""How does a test get an admin API without Ray? The real loop, core and server over a fake cluster of two instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from instance.mailbox import Mailbox
from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.access import ServerAccess
from orchestrator.admin.idempotency import RepetitionParams
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.pb.kvferry.admin.v1.priorities_pb2_grpc import PriorityServiceStub
from orchestrator.admin.server import AdminServer
from orchestrator.admin.watching import WatchParams
from orchestrator.core import Orchestrator
from orchestrator.events import GatewayStarted, InstanceStarted, ReportReceived, RequestsReceived
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams
from tests.support.fake_cluster import FakeCluster
from tests.support.reports import load_report, request_load, request_report

GATEWAY = "kvferry-gateway-0"
NAMES = ("instance-0", "instance-1")


@dataclass(frozen=True)
class Terms:
    """Under which the server runs."""

    access: ServerAccess | None = None
    repetitions: RepetitionParams | None = None
    watching: WatchParams | None = None
    core: CoreParams = CoreParams()  # noqa: RUF009 - frozen
    made: Orchestrator | None = None
    """A core that is there already."""
    journal: Journal | None = None
    """Of that core; closed at the end."""


class World:
    """A loop with two instances and a gateway, its admin server, and a stock client."""

    def __init__(self, loop: OrchestratorLoop, cluster: FakeCluster, server: AdminServer, address: str) -> None:
        self.loop, self.cluster, self.server, self.address = loop, cluster, server, address
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = pb_grpc.AdminServiceStub(self.channel)
        self.priorities = PriorityServiceStub(self.channel)
        self._step = 1

    def reports(self, instance: str, *request_ids: str, step: int = 1, state: str = "serving") -> None:
        num = len(request_ids)
        load = load_report(instance, step=step, state=state, num_running=num, free_blocks=1000 - 10 * num)
        self.loop.handle(ReportReceived(load))
        self.loop.handle(RequestsReceived(request_report(instance, *map(request_load, request_ids), step=step)))

    def runs(self, instance: str, *requests: RequestLoad) -> None:
        """A later report of this instance: these are its requests now."""
        self._step += 1
        load = load_report(instance, step=self._step, num_running=len(requests))
        self.loop.handle(ReportReceived(load))
        self.loop.handle(RequestsReceived(request_report(instance, *requests, step=self._step)))


@asynccontextmanager
async def admin_world(terms: Terms | None = None) -> AsyncIterator[World]:
    """instance-0 runs cmpl-1 and cmpl-2, instance-1 nothing."""
    terms = terms or Terms()
    cluster, mailbox = FakeCluster(), Mailbox("test")
    await mailbox.open()
    params = LoopParams(tick_s=0.02)
    core = terms.made or Orchestrator(terms.core)
    loop = OrchestratorLoop(core, cluster, mailbox, params, terms.journal)
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    server = AdminServer(loop, terms.access, terms.repetitions, terms.watching)
    made = World(loop, cluster, server, await server.start("127.0.0.1", 0))
    loop.add(GatewayStarted("gateway-0", GATEWAY, "http://127.0.0.1:8000"))
    for name in NAMES:
        incarnation = Incarnation(InstanceId(name), Epoch(1), "tcp://127.0.0.1:1")
        loop.add(InstanceStarted(incarnation, f"kvferry-{name}-1", "tiny", 16, 1000, process_id=7))
    made.reports("instance-0", "cmpl-1", "cmpl-2")
    made.reports("instance-1")
    try:
        yield made
    finally:
        cluster.may_end.set()
        await made.channel.close()
        await server.stop(0)
        loop.stop()
        await running
        core.check_integrity()
        mailbox.close()
        if terms.journal is not None:
            terms.journal.close()
