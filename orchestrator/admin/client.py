"""How does a program here speak to the admin API? A blocking client whose errors are one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import cast

import grpc

from orchestrator.admin.errors import Declined
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2
from orchestrator.admin.pb.kvferry.admin.v1.scaling_pb2_grpc import ScalingServiceStub
from orchestrator.errors import OrchestratorError, Unreachable

MAX_MESSAGE_BYTES = 4 << 20
CONNECT_S = 3.0
MIGRATE_S = 90.0


class AdminClient:
    """One connection. Every method raises Unreachable when nothing answers, Declined when the answer is no."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = pb_grpc.AdminServiceStub(self._channel)
        self._scaling_stub = ScalingServiceStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def instances(self) -> pb.ListInstancesResponse:
        try:
            return self._stub.ListInstances(pb.ListInstancesRequest(), timeout=CONNECT_S)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def requests(self, instance: str = "") -> list[pb.Request]:
        """All of them, page by page."""
        found: list[pb.Request] = []
        page_token = ""
        while True:
            try:
                ask = pb.ListRequestsRequest(parent=instance, page_token=page_token)
                page = self._stub.ListRequests(ask, timeout=CONNECT_S)
            except grpc.RpcError as error:
                raise self._meaning(error) from error
            found.extend(page.requests)
            page_token = page.next_page_token
            if not page_token:
                return found

    def migrations(self, num: int = 0) -> list[pb.Migration]:
        """The latest first; 0: as many as the service gives by default."""
        try:
            ask = pb.ListMigrationsRequest(page_size=num)
            return list(self._stub.ListMigrations(ask, timeout=CONNECT_S).migrations)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def migrate(
        self, request: str, destination: str, mode: pb.MigrationMode.ValueType = pb.MIGRATION_MODE_LIVE
    ) -> pb.Migration:
        """Returns when the migration has ended, whatever its outcome."""
        try:
            ask = pb.MigrateRequestRequest(
                name=f"requests/{request}", destination=f"instances/{destination}", mode=mode
            )
            return self._stub.MigrateRequest(ask, timeout=MIGRATE_S).migration
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def drain(self, instance: str, wait: bool, deadline_s: float | None = None) -> Iterator[pb.DrainInstanceResponse]:
        """Progress; the last one says `done` when `wait`."""
        try:
            ask = pb.DrainInstanceRequest(name=f"instances/{instance}", wait=wait)
            yield from self._stub.DrainInstance(ask, timeout=deadline_s)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def undrain(self, instance: str) -> pb.Instance:
        try:
            ask = pb.UndrainInstanceRequest(name=f"instances/{instance}")
            return self._stub.UndrainInstance(ask, timeout=CONNECT_S).instance
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def scaling(self) -> scaling_pb2.Scaling:
        try:
            return self._scaling_stub.GetScaling(scaling_pb2.GetScalingRequest(), timeout=CONNECT_S).scaling
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def scale(
        self,
        target: int | None = None,
        fewest: int | None = None,
        most: int | None = None,
        is_automatic: bool | None = None,
    ) -> scaling_pb2.Scaling:
        """Change what is given; returns at once with what holds now."""
        try:
            ask = scaling_pb2.ScaleInstancesRequest(
                target_instances=target, min_instances=fewest, max_instances=most, automatic=is_automatic
            )
            return self._scaling_stub.ScaleInstances(ask, timeout=CONNECT_S).scaling
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def _meaning(self, error: grpc.RpcError) -> OrchestratorError:
        call = cast(grpc.Call, error)  # every error of a stub is one; the stubs' types do not say so
        code, details = call.code(), call.details() or "no details"
        if code is grpc.StatusCode.UNAVAILABLE and "did not start draining" not in details:
            return Unreachable(
                f"nothing answers at the admin address {self._address}: is `kvferry serve` running there?"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Declined("not done within the deadline; what was begun goes on")
        return Declined(details)
