"""Who answers the admin API? A gRPC server beside the loop: values out of its snapshot, commands through its core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from migration.types import InstanceId
from orchestrator.admin import convert
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.pb.kvferry.admin.v1.scaling_pb2_grpc import add_ScalingServiceServicer_to_server
from orchestrator.admin.scaling import SERVICE as SCALING_SERVICE
from orchestrator.admin.scaling import ScalingService
from orchestrator.effects import MigrationFinished, Refused, Result
from orchestrator.errors import StartUpError
from orchestrator.events import DrainRequested, Event, MigrateRequested, Token, UndrainRequested
from orchestrator.state import Snapshot

SERVICE = "kvferry.admin.v1.AdminService"
MAX_MESSAGE_BYTES = 4 << 20
MAX_CONCURRENT_RPCS = 128
PROGRESS_S = 0.25
"""Time between two progress messages of a drain."""
DEFAULT_REQUESTS = 1000
DEFAULT_MIGRATIONS = 100
MAX_PAGE = 10_000

Context = grpc.aio.ServicerContext[Any, Any]


class Brain(Protocol):
    """What the service needs of the loop."""

    def snapshot(self) -> Snapshot: ...

    async def ask(self, make: Callable[[Token], Event]) -> Result: ...


class AdminService(pb_grpc.AdminServiceServicer):
    """The methods of proto/kvferry/admin/v1/admin.proto."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    async def ListInstances(self, _request: pb.ListInstancesRequest, _context: Context) -> pb.ListInstancesResponse:
        snapshot = self._brain.snapshot()
        return pb.ListInstancesResponse(
            instances=[convert.instance(item) for item in snapshot.instances],
            gateways=[convert.gateway(item) for item in snapshot.gateways],
        )

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        parent = await _instance_id(request.parent, context) if request.parent else None
        first = await _page_token(request.page_token, context)
        size = await _page_size(request.page_size, DEFAULT_REQUESTS, context)
        owned = [
            (load, item)
            for item in self._brain.snapshot().instances
            if parent is None or item.incarnation.instance == parent
            for load in item.requests
        ]
        page = owned[first : first + size]
        return pb.ListRequestsResponse(
            requests=[convert.request(load, item) for load, item in page],
            next_page_token=str(first + size) if first + size < len(owned) else "",
            total_size=len(owned),
        )

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: Context) -> pb.ListMigrationsResponse:
        size = await _page_size(request.page_size, DEFAULT_MIGRATIONS, context)
        snapshot = self._brain.snapshot()
        records = snapshot.migrations[:size]
        return pb.ListMigrationsResponse(migrations=[convert.migration(item, snapshot.now_s) for item in records])

    async def MigrateRequest(self, request: pb.MigrateRequestRequest, context: Context) -> pb.MigrateRequestResponse:
        destination = await _instance_id(request.destination, context)
        reference = request.name.removeprefix(convert.REQUESTS)
        if not reference:
            await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, "name a request: requests/NAME")
        mode = convert.MODES.get(request.mode, "live")
        result = await self._brain.ask(lambda token: MigrateRequested(token, reference, destination, mode))
        if not isinstance(result, MigrationFinished):
            await _decline(result, context)
        return pb.MigrateRequestResponse(migration=convert.migration(result.record, self._brain.snapshot().now_s))

    async def DrainInstance(
        self, request: pb.DrainInstanceRequest, context: Context
    ) -> AsyncIterator[pb.DrainInstanceResponse]:
        name = await _instance_id(request.name, context)
        command = asyncio.ensure_future(self._brain.ask(lambda token: DrainRequested(token, name, request.wait)))
        try:
            while True:
                settled, _ = await asyncio.wait([command], timeout=PROGRESS_S)
                if settled:
                    break
                yield convert.drain_progress(self._brain.snapshot(), name, done=False)
        finally:
            command.cancel()
        result = command.result()
        if isinstance(result, Refused):
            await _decline(result, context)
        yield convert.drain_progress(self._brain.snapshot(), name, done=request.wait)

    async def UndrainInstance(self, request: pb.UndrainInstanceRequest, context: Context) -> pb.UndrainInstanceResponse:
        name = await _instance_id(request.name, context)
        result = await self._brain.ask(lambda token: UndrainRequested(token, name))
        if isinstance(result, Refused):
            await _decline(result, context)
        return pb.UndrainInstanceResponse(instance=convert.drain_progress(self._brain.snapshot(), name, False).instance)


async def _instance_id(name: str, context: Context) -> InstanceId:
    try:
        return convert.instance_id(name)
    except convert.BadName as error:
        await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))


async def _page_size(asked: int, default: int, context: Context) -> int:
    if asked < 0:
        await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, f"page_size is {asked}, it cannot be negative")
    return min(asked or default, MAX_PAGE)


async def _page_token(text: str, context: Context) -> int:
    if text and not text.isdecimal():
        await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, f"page_token {text!r} is none of ours")
    return int(text or 0)


async def _decline(result: Result, context: Context) -> NoReturn:
    assert isinstance(result, Refused), "the core answers a command with its own kind of result, or refuses"
    await _fail(context, convert.STATUS_CODES[result.kind], result.reason)


async def _fail(context: Context, code: grpc.StatusCode, reason: str) -> NoReturn:
    await context.abort(code, reason)
    raise AssertionError("abort raises")


class AdminServer:
    """The gRPC server: AdminService, grpc.health.v1 and reflection, without authentication, so on a local address."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Serve; returns `host:port`. Raises StartUpError when the port is taken."""
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        pb_grpc.add_AdminServiceServicer_to_server(AdminService(self._brain), server)
        add_ScalingServiceServicer_to_server(ScalingService(self._brain), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, SCALING_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise StartUpError(f"the admin port {port} on {host} is taken: choose another with --admin-port") from error
        await server.start()
        for service in ("", SERVICE, SCALING_SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        return f"{host}:{bound}"

    async def stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)
