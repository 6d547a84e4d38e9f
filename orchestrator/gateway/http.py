"""What does the gateway add to vLLM's HTTP surface? Headers, `/live`, and the socket it listens on."""

from __future__ import annotations

import errno
import socket
import uuid

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.gateway.asks import (
    REASON,
    AnswerNotes,
    BadHeader,
    StatusWithFirstEvent,
    answer_notes,
    asks_of,
    bad_header,
    request_asks,
)
from orchestrator.gateway.async_llm import asked_priority
from orchestrator.gateway.errors import GatewayError
from orchestrator.gateway.priorities import BadPriority, PriorityRules
from orchestrator.policy.admission import OnOverload
from orchestrator.policy.targets import Targets

MAX_REQUEST_ID_CHARS = 128
RETRY_AFTER_S = 1


RULES = "kvferry_priority_rules"
"""Of the app's state: PriorityRules. vLLM makes the middleware, without arguments."""
_DEFAULT_RULES = PriorityRules()

MIDDLEWARE = f"{__name__}.KvferryHeaders"
"""For vLLM's own `--middleware`: an app that vLLM has built takes no further one."""


class KvferryHeaders:
    """`x-request-id` is made where it is missing, given to vLLM and echoed; what says its priority is read; 429 and 503
    say when to come back. Plain ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_headers = Headers(scope=scope)
        request_id = _usable(request_headers.get("x-request-id")) or uuid.uuid4().hex
        notes = AnswerNotes()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                if message["status"] in (429, 503):
                    failure = notes.failure
                    headers["retry-after"] = str(RETRY_AFTER_S if failure is None else round(failure.retry_after_s))
                    if failure is not None:
                        headers[REASON] = failure.reason or failure.kind.value
            await send(message)

        raw = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        scope = {**scope, "headers": [*raw, (b"x-request-id", request_id.encode())]}
        rules: PriorityRules = getattr(scope["app"].state, RULES, _DEFAULT_RULES)
        classes: dict[str, Targets] = getattr(scope["app"].state, "slo_classes", {})
        try:
            # A context of its own: uvicorn runs each request in its own task.
            asked_priority.set(rules.asked(request_headers))
            asks = asks_of(request_headers, classes)
        except BadPriority as error:
            await _bad_priority(error)(scope, receive, send_with_headers)
            return
        except BadHeader as error:
            await bad_header(error)(scope, receive, send_with_headers)
            return
        request_asks.set(asks)
        answer_notes.set(notes)
        is_rejecting = asks.on_overload is OnOverload.REJECT
        answer = StatusWithFirstEvent(scope, receive, send_with_headers, notes) if is_rejecting else send_with_headers
        await self.app(scope, receive, answer)


def add_routes(app: FastAPI) -> None:
    """`/live`: the process answers, whatever the fleet does (`/health` is vLLM's: 503 while no instance serves)."""

    async def live() -> Response:
        return Response(status_code=200)

    app.add_api_route("/live", live, methods=["GET"], include_in_schema=False)


def _usable(request_id: str | None) -> str | None:
    if not request_id or len(request_id) > MAX_REQUEST_ID_CHARS:
        return None
    return request_id if request_id.isascii() and request_id.isprintable() and " " not in request_id else None


def _bad_priority(bad: BadPriority) -> JSONResponse:
    error = {"message": str(bad), "type": "BadRequestError", "param": bad.header, "code": 400}
    return JSONResponse({"error": error}, status_code=400)


def bind(host: str, port: int, reuse_port: bool) -> socket.socket:
    """A bound TCP socket; port 0 takes any free one. Raises GatewayError (one line) when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        # Bound is not enough to know: two may bind with SO_REUSEADDR until one of them listens.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise GatewayError(f"port {port} is in use on {host}: choose another with --port") from error
        raise GatewayError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    except OverflowError as error:
        listener.close()
        raise GatewayError(f"{port} is no port: choose one from 1 to 65535 with --port") from error
    return listener


def check_port_free(host: str, port: int) -> None:
    """Raises GatewayError when anybody listens there. Gateways that share a port cannot see a stranger by themselves:
    whoever starts them asks this first."""
    bind(host, port, reuse_port=False).close()
