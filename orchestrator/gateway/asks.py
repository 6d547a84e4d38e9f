"""What does a client ask for in its headers, and what does its answer say about it? Past vLLM's handlers, which pass on
neither: in context variables, since uvicorn runs each HTTP request in a task of its own.

    x-kvferry-slo-ttft-ms, x-llm-d-slo-ttft-ms            time to the first token
    x-kvferry-slo-tpot-ms                                 mean time of each further token
    x-kvferry-slo-class, x-llm-d-inference-objective      targets of a class (`--slo-classes`) where no header gives one
    x-kvferry-on-overload: queue | reject                 what to do when they cannot be met
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus

from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from orchestrator.gateway.errors import Failure
from orchestrator.policy.admission import NO_ASKS, Asks, OnOverload
from orchestrator.policy.targets import DEFAULT_CLASS, NO_TARGETS, Targets, target_of_ms

TTFT, TPOT = "x-kvferry-slo-ttft-ms", "x-kvferry-slo-tpot-ms"
TTFT_ALIAS, CLASS_ALIAS = "x-llm-d-slo-ttft-ms", "x-llm-d-inference-objective"
CLASS, ON_OVERLOAD, REASON = "x-kvferry-slo-class", "x-kvferry-on-overload", "x-kvferry-reason"


@dataclass(slots=True, eq=False)
class AnswerNotes:
    """What the headers of an answer must say; filled while it is worked on."""

    failure: Failure | None = None


request_asks: ContextVar[Asks] = ContextVar("request_asks", default=NO_ASKS)
answer_notes: ContextVar[AnswerNotes | None] = ContextVar("answer_notes", default=None)


class BadHeader(ValueError):
    """One line that says what the header must be."""

    def __init__(self, header: str, message: str) -> None:
        super().__init__(message)
        self.header = header


def asks_of(headers: Mapping[str, str], classes: Mapping[str, Targets]) -> Asks:
    """Raises BadHeader. An objective of llm-d that is no class here is passed over: it may mean something to others."""
    named = headers.get(CLASS)
    if named is not None and named not in classes:
        known = ", ".join(sorted(classes)) or "none: see --slo-classes"
        raise BadHeader(CLASS, f"{CLASS} names no class of this server (there are: {known})")
    of_class = classes.get(DEFAULT_CLASS, NO_TARGETS)
    of_class = classes.get(named if named is not None else headers.get(CLASS_ALIAS, DEFAULT_CLASS), of_class)
    ttft_s, tpot_s = _target(headers, TTFT), _target(headers, TPOT)
    if ttft_s is None:
        ttft_s = _target(headers, TTFT_ALIAS)
    text = headers.get(ON_OVERLOAD, OnOverload.QUEUE.value).strip().lower()
    if text not in {one.value for one in OnOverload}:
        raise BadHeader(ON_OVERLOAD, f"{ON_OVERLOAD} must be queue or reject")
    targets = Targets(
        of_class.ttft_s if ttft_s is None else ttft_s,
        of_class.tpot_s if tpot_s is None else tpot_s,
    )
    return Asks(targets, OnOverload(text)) if targets or text != OnOverload.QUEUE.value else NO_ASKS


def _target(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    target_s = target_of_ms(text)
    if target_s is None:
        raise BadHeader(name, f"{name} must be a number of milliseconds above 0, such as 500")
    return target_s


def bad_header(error: BadHeader) -> JSONResponse:
    body = {"message": str(error), "type": "BadRequestError", "param": error.header, "code": 400}
    return JSONResponse({"error": body}, status_code=400)


class StatusWithFirstEvent:
    """Holds a stream's status back until its first event, so that a request that asked to be rejected gets its 429.

    vLLM sends 200 before it has asked the engine. Only for those who asked: everybody else's headers go at once.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, notes: AnswerNotes) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._notes = notes
        self._start: Message | None = None
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        start, self._start = self._start, None
        failure = self._notes.failure
        if start is not None and start["status"] == 200 and failure is not None:
            self._is_replaced = True
            status = failure.kind.http_status
            body = {"message": failure.message, "type": HTTPStatus(status).phrase, "param": None, "code": status}
            await JSONResponse({"error": body}, status_code=status)(self._scope, self._receive, self._send)
        if self._is_replaced:
            return
        if start is not None:
            await self._send(start)
        await self._send(message)
