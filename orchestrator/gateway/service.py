"""What is a gateway as a process? vLLM's OpenAI app over our engine client, served by uvicorn; plain asyncio, no Ray.

It runs in any thread's event loop (Ray's async actors have theirs beside the main thread): it sets no signal handler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import uvicorn
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer, validate_api_server_args
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from instance.mailbox import Mailbox
from instance.vllm.codec import encode_request
from instance.vllm.flags import FlagError, engine_config, parse_serve_argv
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.gateway.async_llm import FleetLLM
from orchestrator.gateway.core_client import Encode, FleetCoreClient
from orchestrator.gateway.errors import Failure, FailureKind, GatewayError
from orchestrator.gateway.http import MIDDLEWARE, RULES, add_routes, bind
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.prefixes import PrefixHashes, prefix_hashes
from orchestrator.gateway.priorities import PriorityRules
from orchestrator.gateway.spec import GatewayConfig, GatewayStarted, Member
from orchestrator.gateway.types import RouterParams
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.levels import parse_levels
from orchestrator.policy.targets import Targets, parse_classes

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""An idle connection is kept open for so long, where VLLM_HTTP_TIMEOUT_KEEP_ALIVE says nothing. Its default of 5 s is
also that of httpx, and so of OpenAI's client: a request sent as the server closes is lost. Proxies keep theirs 60 s."""
CLOSE_STREAMS_S = 1
"""uvicorn gives open connections so long once their streams were ended, then cuts them."""
STOP_S = 2.0
START_S = 30.0

CANCELLED = Failure(FailureKind.CANCELLED, "the operator of this service ended the request")
STOPPING = Failure(FailureKind.STOPPING, "this gateway is being stopped; please retry")


class GatewayService:
    """start, set_members as often as needed, stop. Every method is called on one event loop."""

    def __init__(self, params: RouterParams | None = None, encode: Encode = encode_request) -> None:
        self._params = params
        self._encode = encode
        self._mailbox: Mailbox | None = None
        self._loop: GatewayLoop | None = None
        self._llm: FleetLLM | None = None
        self._app: FastAPI | None = None
        self._server: uvicorn.Server | None = None
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    async def start(self, config: GatewayConfig) -> GatewayStarted:
        """Serve. Raises GatewayError (one line): port in use, unknown flag, no such model, not a generation model, no
        token."""
        self._listener = bind(config.host, config.port, config.reuse_port)
        try:
            configured = await asyncio.to_thread(_configure, config)
            namespace = configured[0]
            self._mailbox = _mailbox(config.token)
            await self._mailbox.open(config.inbox_host)
            await self._serve(self._mailbox, config, *configured)
        except BaseException:
            await self.stop()
            raise
        port = self._listener.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        scheme = "https" if namespace.ssl_keyfile and namespace.ssl_certfile else "http"
        return GatewayStarted(config.gateway, self._mailbox.address, f"{scheme}://{host}:{port}")

    @property
    def loop(self) -> GatewayLoop:
        """Raises RuntimeError before `start`."""
        if self._loop is None:
            raise RuntimeError("the gateway has not started")
        return self._loop

    def set_members(self, members: Iterable[Member], num_gateways: int = 1) -> None:
        """These are the instances now; one that is not among them any more has ended. So many gateways use them."""
        known = [Incarnation(InstanceId(one.instance), Epoch(one.epoch), one.address) for one in members]
        self.loop.set_members(known, num_gateways)

    def set_dispatch(self, params: DispatchParams) -> None:
        """Choose instances by these from now on."""
        self.loop.set_dispatch(params)

    def set_priorities(self, rules: PriorityRules) -> None:
        """Requests that come from now on are as urgent as these say; their headroom comes with `set_dispatch`."""
        if self._app is not None:
            setattr(self._app.state, RULES, rules)

    def member_lost(self, instance: str, epoch: int) -> None:
        """This incarnation is known to be dead."""
        self.loop.member_lost(InstanceId(instance), Epoch(epoch))

    def cancel_request(self, request_id: str) -> bool:
        """End this request (by its id at the instances) and its siblings; False: its stream is not here."""
        return self.loop.cancel(request_id, CANCELLED)

    def on_reset_prefix_cache(self, reset: Callable[[], Awaitable[bool]]) -> None:
        """How the prefix caches of all instances are reset (vLLM's development endpoint)."""
        if self._llm is not None:
            self._llm.engine_core.reset_prefix_caches = reset

    async def lifetime(self) -> None:
        """Returns when the gateway has stopped."""
        await self._ended.wait()

    async def stop(self) -> None:
        """End the open streams with an error that can be retried, then the server: 3 s at most. Twice is fine."""
        if self._llm is not None:
            self._llm.stop_admitting(STOPPING)
        if self._loop is not None:
            self._loop.fail_all(STOPPING)
        server, self._server = self._server, None
        if server is not None:
            server.should_exit = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._ended.wait()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        if self._mailbox is not None:
            self._mailbox.close()
        if self._listener is not None:
            self._listener.close()
        self._ended.set()

    async def _serve(
        self,
        mailbox: Mailbox,
        config: GatewayConfig,
        namespace: argparse.Namespace,
        vllm_config: Any,
        hashes: PrefixHashes,
    ) -> None:
        levels = parse_levels(config.priority_levels)
        params = self._params or RouterParams(
            dispatch=DispatchParams(load=levels.load_params), dispatch_timeout_s=config.dispatch_timeout_s
        )
        self._loop = GatewayLoop(mailbox, params)
        client = FleetCoreClient(self._loop, self._encode, hashes)
        self._llm = FleetLLM(vllm_config, client, self._loop, log_stats=not namespace.disable_log_stats)
        tasks = await self._llm.get_supported_tasks()
        app = self._app = build_app(namespace, tasks, self._llm.model_config)
        setattr(app.state, RULES, PriorityRules(levels, dict(config.key_priorities)))
        add_routes(app)
        await init_app_state(self._llm, app.state, namespace, tasks)
        self._server = NoSignalServer(_uvicorn_config(app, namespace))
        app.state.server = self._server
        app.state.slo_classes = _slo_classes(config.slo_classes)
        self._tasks = [asyncio.create_task(self._loop.run()), asyncio.create_task(self._run_server(self._server))]
        self._tasks[0].add_done_callback(self._loop_ended)
        async with asyncio.timeout(START_S):
            while not self._server.started:
                if self._ended.is_set():
                    raise GatewayError("the HTTP server did not start: see the gateway's log")
                await asyncio.sleep(0.01)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the gateway's loop failed: it stops serving", exc_info=error)
            if self._server is not None:
                self._server.should_exit = True

    async def _run_server(self, server: uvicorn.Server) -> None:
        try:
            await server.serve(sockets=[self._listener] if self._listener else None)
        finally:
            self._ended.set()


def _slo_classes(text: str) -> dict[str, Targets]:
    try:
        return parse_classes(text)
    except ValueError as error:
        raise GatewayError(f"--slo-classes: {error}") from error


def _mailbox(token: str) -> Mailbox:
    try:
        return Mailbox(token)
    except ValueError as error:
        raise GatewayError(str(error)) from error


def _configure(config: GatewayConfig) -> tuple[argparse.Namespace, Any, PrefixHashes]:
    """What `vllm serve` would make of the arguments, without an engine; and how its engines know a prefix."""
    try:
        namespace = parse_serve_argv(config.argv)
        namespace.host, namespace.port = config.host, config.port
        namespace.enable_request_id_headers = False  # ours does it always
        namespace.middleware = [*namespace.middleware, MIDDLEWARE]
        if namespace.uds:
            raise GatewayError("--uds is not supported: gateways listen on a TCP port")
        for plugin, load in (
            (namespace.tool_parser_plugin, ToolParserManager.import_tool_parser),
            (namespace.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
        ):
            if plugin and len(plugin) > 3:
                load(plugin)
        validate_api_server_args(namespace)
        vllm_config = engine_config(namespace)
    except FlagError as error:
        raise GatewayError(str(error)) from error
    except KeyError as error:
        raise GatewayError(str(error.args[0])) from error
    hashes = prefix_hashes(vllm_config.cache_config)
    # Nothing is cached here, but with it vLLM names images by their content. Without, it counts them, each gateway for
    # itself, and an instance would take one gateway's first image for another's.
    vllm_config.cache_config.enable_prefix_caching = True
    if vllm_config.model_config.runner_type != "generate":
        raise GatewayError(f"{namespace.model} is not a model that generates text")
    return namespace, vllm_config, hashes


def keep_alive_s() -> int:
    """For which an idle connection is kept open."""
    chosen = envs.is_set("VLLM_HTTP_TIMEOUT_KEEP_ALIVE")
    return envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE if chosen else KEEP_ALIVE_S


def _uvicorn_config(app: Any, namespace: argparse.Namespace) -> uvicorn.Config:
    """As vLLM's launcher makes it, without its signal handlers."""
    more: dict[str, Any] = {}
    log_config = get_uvicorn_log_config(namespace)
    if log_config is not None:
        more["log_config"] = log_config
    config = uvicorn.Config(
        app,
        log_level=namespace.uvicorn_log_level,
        access_log=not namespace.disable_uvicorn_access_log,
        timeout_keep_alive=keep_alive_s(),
        timeout_graceful_shutdown=CLOSE_STREAMS_S,
        ssl_keyfile=namespace.ssl_keyfile,
        ssl_certfile=namespace.ssl_certfile,
        ssl_ca_certs=namespace.ssl_ca_certs,
        ssl_cert_reqs=namespace.ssl_cert_reqs,
        ssl_ciphers=namespace.ssl_ciphers,
        h11_max_incomplete_event_size=namespace.h11_max_incomplete_event_size,
        **more,
    )
    config.load()
    return config
