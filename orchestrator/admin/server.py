"""Where is the admin API served, and to whom? A gRPC server beside the loop, with health checks and reflection."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from orchestrator.access import ServerAccess, is_loopback
from orchestrator.admin.commands import Brain
from orchestrator.admin.guard import Guard
from orchestrator.admin.idempotency import RepetitionParams, Repetitions
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.pb.kvferry.admin.v1.priorities_pb2_grpc import add_PriorityServiceServicer_to_server
from orchestrator.admin.pb.kvferry.admin.v1.scaling_pb2_grpc import add_ScalingServiceServicer_to_server
from orchestrator.admin.priorities import SERVICE as PRIORITY_SERVICE
from orchestrator.admin.priorities import PriorityService
from orchestrator.admin.scaling import SERVICE as SCALING_SERVICE
from orchestrator.admin.scaling import ScalingService
from orchestrator.admin.service import AdminService
from orchestrator.admin.watching import WatchParams, Watchtower
from orchestrator.errors import StartUpError

SERVICE = "kvferry.admin.v1.AdminService"
SERVICES = (SERVICE, SCALING_SERVICE, PRIORITY_SERVICE)
"""Of our own."""
MAX_MESSAGE_BYTES = 4 << 20
MAX_METADATA_BYTES = 16 << 10
MAX_CONCURRENT_RPCS = 128
MAX_CONCURRENT_STREAMS = 64
"""Calls at once on one connection."""
KEEPALIVE_S = 30
"""A peer that does not answer a ping after so long is gone, and its calls with it."""


class AdminServer:
    """Our services, grpc.health.v1 and reflection on one port. Without a token on loopback only."""

    def __init__(
        self,
        brain: Brain,
        access: ServerAccess | None = None,
        repetitions: RepetitionParams | None = None,
        watching: WatchParams | None = None,
    ) -> None:
        self._brain = brain
        self._access = access or ServerAccess()
        self._repetitions = Repetitions(repetitions)
        self.watchtower = Watchtower(brain.snapshot, watching)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._is_serving = False

    async def start(self, host: str, port: int) -> str:
        """`bind` and `serve`."""
        address = self.bind(host, port)
        await self.serve()
        return address

    def bind(self, host: str, port: int) -> str:
        """Take the port, and answer nobody yet; returns `host:port`. Raises StartUpError: the port is taken, no token
        elsewhere than on loopback, or the certificate and key are none."""
        if not self._access.token and not is_loopback(host):
            raise StartUpError(
                f"the admin API on {host} could be reached from other machines: give it a token (KVFERRY_ADMIN_TOKEN,"
                " or --admin-token-file), or serve it on 127.0.0.1"
            )
        server = grpc.aio.server(
            interceptors=[Guard(self._access.token, self._repetitions)],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000),
            ],
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        service = AdminService(self._brain, self._repetitions, self.watchtower)
        pb_grpc.add_AdminServiceServicer_to_server(service, server)
        add_ScalingServiceServicer_to_server(ScalingService(self._brain), server)
        add_PriorityServiceServicer_to_server(PriorityService(self._brain), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            credentials = self._credentials()
            bound = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        except RuntimeError as error:
            raise StartUpError(f"the admin port {port} on {host} is taken: choose another with --admin-port") from error
        self._server = server
        return f"{where.rpartition(':')[0]}:{bound}"

    async def serve(self) -> None:
        """Answer. Raises RuntimeError before `bind`."""
        if self._server is None:
            raise RuntimeError("the admin API has no port yet")
        await self._server.start()
        self._is_serving = True
        for service_name in ("", *SERVICES):
            await self._health.set(service_name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Watch streams end at once, other calls have so long to end. Twice is fine."""
        self.watchtower.close()
        server, self._server = self._server, None
        if server is not None:
            await self._health.enter_graceful_shutdown()
            if not self._is_serving:
                await server.start()  # or gRPC would hold the port for as long as the process lives
                grace_s = 0.0
            await server.stop(grace_s)
        self._repetitions.close()

    def _credentials(self) -> grpc.ServerCredentials | None:
        access = self._access
        if not access.certificate:
            return None
        return grpc.ssl_server_credentials(
            [(access.key, access.certificate)],
            root_certificates=access.client_ca or None,
            require_client_auth=bool(access.client_ca),
        )
