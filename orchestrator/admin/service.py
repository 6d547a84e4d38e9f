"""Who answers which method of the admin API? Each kind has its own object; here they meet the generated servicer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from orchestrator.admin.commands import Brain, Commander
from orchestrator.admin.idempotency import Repetitions
from orchestrator.admin.listing import Reader
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.policy import PolicyKeeper
from orchestrator.admin.watching import Watchtower

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(pb_grpc.AdminServiceServicer):
    """The methods of proto/kvferry/admin/v1/admin.proto. They raise Failure, which `guard.Guard` turns into a status;
    it also answers a request_id that was seen before, for every method with one answer."""

    def __init__(self, brain: Brain, repetitions: Repetitions, watchtower: Watchtower) -> None:
        self._reader = Reader(brain.snapshot)
        self._commander = Commander(brain, repetitions)
        self._policy = PolicyKeeper(brain)
        self._watchtower = watchtower

    # ------------------------------------------------------------------ what is there
    async def ListInstances(self, request: pb.ListInstancesRequest, _context: Context) -> pb.ListInstancesResponse:
        return self._reader.list_instances(request)

    async def GetInstance(self, request: pb.GetInstanceRequest, _context: Context) -> pb.GetInstanceResponse:
        return self._reader.get_instance(request)

    async def ListRequests(self, request: pb.ListRequestsRequest, _context: Context) -> pb.ListRequestsResponse:
        return self._reader.list_requests(request)

    async def GetRequest(self, request: pb.GetRequestRequest, _context: Context) -> pb.GetRequestResponse:
        return self._reader.get_request(request)

    async def ListMigrations(self, request: pb.ListMigrationsRequest, _context: Context) -> pb.ListMigrationsResponse:
        return self._reader.list_migrations(request)

    async def GetMigration(self, request: pb.GetMigrationRequest, _context: Context) -> pb.GetMigrationResponse:
        return self._reader.get_migration(request)

    def Watch(self, request: pb.WatchRequest, _context: Context) -> AsyncIterator[pb.WatchResponse]:
        return self._watchtower.watch(request)

    # ------------------------------------------------------------------ commands
    async def MigrateRequest(self, request: pb.MigrateRequestRequest, _context: Context) -> pb.MigrateRequestResponse:
        return await self._commander.migrate_request(request)

    async def SetRequestPriority(
        self, request: pb.SetRequestPriorityRequest, _context: Context
    ) -> pb.SetRequestPriorityResponse:
        return await self._commander.set_request_priority(request)

    async def CancelRequest(self, request: pb.CancelRequestRequest, _context: Context) -> pb.CancelRequestResponse:
        return await self._commander.cancel_request(request)

    async def CancelMigration(
        self, request: pb.CancelMigrationRequest, _context: Context
    ) -> pb.CancelMigrationResponse:
        return await self._commander.cancel_migration(request)

    def DrainInstance(
        self, request: pb.DrainInstanceRequest, _context: Context
    ) -> AsyncIterator[pb.DrainInstanceResponse]:
        return self._commander.drain_instance(request)

    async def UndrainInstance(
        self, request: pb.UndrainInstanceRequest, _context: Context
    ) -> pb.UndrainInstanceResponse:
        return await self._commander.undrain_instance(request)

    # ------------------------------------------------------------------ policy
    async def GetPolicy(self, request: pb.GetPolicyRequest, _context: Context) -> pb.GetPolicyResponse:
        return self._policy.get(request)

    async def UpdatePolicy(self, request: pb.UpdatePolicyRequest, _context: Context) -> pb.UpdatePolicyResponse:
        return await self._policy.update(request)
