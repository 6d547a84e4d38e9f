"""How does a program here speak to the admin API? A blocking client whose errors are one clear line."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from orchestrator.access import ClientAccess
from orchestrator.admin.errors import Declined, NotAdmitted
from orchestrator.admin.failures import DOMAIN
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.pb.kvferry.admin.v1 import priorities_pb2, scaling_pb2
from orchestrator.admin.pb.kvferry.admin.v1.priorities_pb2_grpc import PriorityServiceStub
from orchestrator.admin.pb.kvferry.admin.v1.scaling_pb2_grpc import ScalingServiceStub
from orchestrator.errors import OrchestratorError, Unreachable

MAX_MESSAGE_BYTES = 4 << 20
CONNECT_S = 10.0
COMMAND_S = 15.0
"""Longer than the orchestrator waits for an instance or a gateway."""
MIGRATE_S = 90.0
PRIORITY_S = 30.0
"""A change waits for the step that runs, and for the end of a migration that has stopped the request."""

Answer = TypeVar("Answer")


class AdminClient:
    """One connection. Every method raises Unreachable when nothing answers, Declined when the answer is no, NotAdmitted
    when the token or the certificates do not fit. Commands carry a request_id of their own."""

    def __init__(self, address: str, access: ClientAccess | None = None) -> None:
        self._address = address
        self._access = access or ClientAccess()
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        if self._access.ca:
            credentials = grpc.ssl_channel_credentials(
                self._access.ca, self._access.key or None, self._access.certificate or None
            )
            self._channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._metadata = (("authorization", f"Bearer {self._access.token}"),) if self._access.token else ()
        self._stub = pb_grpc.AdminServiceStub(self._channel)
        self._scaling_stub = ScalingServiceStub(self._channel)
        self._priority_stub = PriorityServiceStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    # ------------------------------------------------------------------ what is there
    def instances(self) -> pb.ListInstancesResponse:
        """All of them, the pages put together."""
        found = self._call(self._stub.ListInstances, pb.ListInstancesRequest())
        while found.next_page_token:
            ask = pb.ListInstancesRequest(page_token=found.next_page_token)
            found.next_page_token = ""
            found.MergeFrom(self._call(self._stub.ListInstances, ask))
        return found

    def requests(self, instance: str = "") -> list[pb.Request]:
        """All of them, page by page."""
        found: list[pb.Request] = []
        page_token = ""
        while True:
            ask = pb.ListRequestsRequest(parent=instance, page_token=page_token)
            page = self._call(self._stub.ListRequests, ask)
            found.extend(page.requests)
            page_token = page.next_page_token
            if not page_token:
                return found

    def migrations(self, num: int = 0) -> list[pb.Migration]:
        """The latest first; 0: as many as the service gives by default."""
        return list(self._call(self._stub.ListMigrations, pb.ListMigrationsRequest(page_size=num)).migrations)

    def watch(self, topics: tuple[pb.WatchTopic.ValueType, ...] = ()) -> Iterator[pb.WatchResponse]:
        """The state, then its changes, until the orchestrator stops."""
        yield from self._stream(self._stub.Watch, pb.WatchRequest(topics=topics), None)

    def policy(self) -> pb.Policy:
        return self._call(self._stub.GetPolicy, pb.GetPolicyRequest()).policy

    def scaling(self) -> scaling_pb2.Scaling:
        return self._call(self._scaling_stub.GetScaling, scaling_pb2.GetScalingRequest()).scaling

    # ------------------------------------------------------------------ commands
    def migrate(
        self, request: str, destination: str, mode: pb.MigrationMode.ValueType = pb.MIGRATION_MODE_LIVE
    ) -> pb.Migration:
        """Returns when the migration has ended, whatever its outcome."""
        ask = pb.MigrateRequestRequest(
            name=f"requests/{request}", destination=f"instances/{destination}", mode=mode, request_id=_new_id()
        )
        return self._call(self._stub.MigrateRequest, ask, MIGRATE_S).migration

    def cancel_request(self, request: str, validate_only: bool = False) -> pb.Request:
        """The request as it was last reported."""
        ask = pb.CancelRequestRequest(
            name=f"requests/{request}", validate_only=validate_only, request_id="" if validate_only else _new_id()
        )
        return self._call(self._stub.CancelRequest, ask, COMMAND_S).request

    def cancel_migration(self, migration: str) -> pb.Migration:
        """Returns when it has ended."""
        ask = pb.CancelMigrationRequest(name=f"migrations/{migration}", request_id=_new_id())
        return self._call(self._stub.CancelMigration, ask, MIGRATE_S).migration

    def set_priority(self, request: str, level: str) -> pb.SetRequestPriorityResponse:
        """`level`: a level's name, or a number."""
        ask = pb.SetRequestPriorityRequest(name=f"requests/{request}", level=level, request_id=_new_id())
        return self._call(self._stub.SetRequestPriority, ask, PRIORITY_S)

    def drain(self, instance: str, wait: bool, deadline_s: float | None = None) -> Iterator[pb.DrainInstanceResponse]:
        """Progress; the last one says `done` when `wait`."""
        ask = pb.DrainInstanceRequest(name=f"instances/{instance}", wait=wait)
        yield from self._stream(self._stub.DrainInstance, ask, deadline_s)

    def undrain(self, instance: str) -> pb.Instance:
        ask = pb.UndrainInstanceRequest(name=f"instances/{instance}", request_id=_new_id())
        return self._call(self._stub.UndrainInstance, ask).instance

    def update_policy(
        self, policy: pb.Policy, paths: tuple[str, ...] = (), validate_only: bool = False
    ) -> pb.UpdatePolicyResponse:
        """`paths` as in the .proto; none: the fields that have a value."""
        ask = pb.UpdatePolicyRequest(policy=policy, validate_only=validate_only, request_id=_new_id())
        ask.update_mask.paths.extend(paths)
        return self._call(self._stub.UpdatePolicy, ask)

    def priorities(self) -> priorities_pb2.GetPrioritiesResponse:
        return self._call(self._priority_stub.GetPriorities, priorities_pb2.GetPrioritiesRequest())

    def set_key_priority(
        self, key_sha256: str, level: str, validate_only: bool = False
    ) -> priorities_pb2.SetKeyPriorityResponse:
        """`level`: a level's name, or a number."""
        ask = priorities_pb2.SetKeyPriorityRequest(
            key_sha256=key_sha256, level=level, validate_only=validate_only, request_id=_new_id()
        )
        return self._call(self._priority_stub.SetKeyPriority, ask, COMMAND_S)

    def delete_key_priority(
        self, key_sha256: str, validate_only: bool = False
    ) -> priorities_pb2.DeleteKeyPriorityResponse:
        ask = priorities_pb2.DeleteKeyPriorityRequest(
            key_sha256=key_sha256, validate_only=validate_only, request_id=_new_id()
        )
        return self._call(self._priority_stub.DeleteKeyPriority, ask, COMMAND_S)

    def update_level(
        self, name: str, rank: int | None, headroom_blocks: int | None, validate_only: bool = False
    ) -> priorities_pb2.UpdatePriorityLevelResponse:
        """None: as it is."""
        ask = priorities_pb2.UpdatePriorityLevelRequest(
            name=name,
            rank=rank,
            headroom_blocks=headroom_blocks,
            validate_only=validate_only,
            request_id=_new_id(),
        )
        return self._call(self._priority_stub.UpdatePriorityLevel, ask, COMMAND_S)

    def scale(
        self,
        target: int | None = None,
        fewest: int | None = None,
        most: int | None = None,
        is_automatic: bool | None = None,
    ) -> scaling_pb2.Scaling:
        """Change what is given; returns at once with what holds now."""
        ask = scaling_pb2.ScaleInstancesRequest(
            target_instances=target,
            min_instances=fewest,
            max_instances=most,
            automatic=is_automatic,
            request_id=_new_id(),
        )
        return self._call(self._scaling_stub.ScaleInstances, ask).scaling

    # ------------------------------------------------------------------ parts
    def _call(self, method: Callable[..., Answer], ask: Any, timeout_s: float = CONNECT_S) -> Answer:
        try:
            return method(ask, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def _stream(self, method: Callable[..., Iterator[Answer]], ask: Any, timeout_s: float | None) -> Iterator[Answer]:
        try:
            yield from method(ask, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def _meaning(self, error: grpc.RpcError) -> OrchestratorError:
        call = cast(grpc.Call, error)  # every error of a stub is one; the stubs' types do not say so
        code, details = call.code(), call.details() or "no details"
        reason = reason_of(call)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return NotAdmitted(
                f"the admin API at {self._address} wants its token: set KVFERRY_ADMIN_TOKEN, or name its file with"
                " --admin-token-file"
            )
        if code is grpc.StatusCode.UNAVAILABLE and not reason:
            if self._access.ca:
                return NotAdmitted(
                    f"no secure connection to the admin address {self._address}: is `kvferry serve` running there, and"
                    " do --admin-ca, --admin-cert and --admin-key fit it?"
                )
            return Unreachable(
                f"nothing answers at the admin address {self._address}: is `kvferry serve` running there?"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Declined("not done within the deadline; what was begun goes on", reason)
        return Declined(details, reason)


def reason_of(call: grpc.Call) -> str:
    """The orchestrator's own reason in an error's details; empty when it did not make the error."""
    status = rpc_status.from_call(call)
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def _new_id() -> str:
    return uuid.uuid4().hex
