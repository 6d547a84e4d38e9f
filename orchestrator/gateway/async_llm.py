"""How does vLLM's OpenAI server run over a fleet? `AsyncLLM` with the same attributes, but no engine of its own.

`AsyncLLM.__init__` starts an engine, so it is not called; tests/contract/test_front_end_attributes.py compares them.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, assert_never
from weakref import WeakKeyDictionary

from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.tracing import init_tracer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.loggers import StatLoggerManager

from migration.types import RequestId
from orchestrator.gateway.asks import AnswerNotes, answer_notes
from orchestrator.gateway.core_client import FleetCoreClient
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.priorities import Asked

asked_priority: ContextVar[Asked | None] = ContextVar("asked_priority", default=None)
"""What the headers of the HTTP request being handled say of its priority: the way past vLLM's handlers, which pass only
the body's."""


class NotingProcessor(OutputProcessor):
    """Knows what the answers that are being made must say. Every request passes here in the context of its HTTP request
    before it is sent, the siblings of `n` > 1, too, which share one queue."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.notes: WeakKeyDictionary[RequestOutputCollector, AnswerNotes] = WeakKeyDictionary()
        """For as long as somebody waits for them."""

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        notes = answer_notes.get()
        if notes is not None and queue is not None:
            self.notes[queue] = notes
        super().add_request(request, prompt, parent_req, request_index, queue)


class FleetLLM(AsyncLLM):
    """One per gateway; made on the loop that serves."""

    def __init__(self, vllm_config: Any, client: FleetCoreClient, loop: GatewayLoop, log_stats: bool = True) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        tracing_endpoint = self.observability_config.otlp_traces_endpoint
        if tracing_endpoint is not None:
            init_tracer("vllm.llm_engine", tracing_endpoint)
        self.log_requests = False
        self.log_stats = log_stats
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = NotingProcessor(
            self.renderer.tokenizer,
            log_stats=log_stats,
            stream_interval=self.scheduler_config.stream_interval,
            tracing_enabled=tracing_endpoint is not None,
            admission_stats=None,
        )
        self.engine_core = client
        self.logger_manager = None
        if log_stats:
            self.logger_manager = StatLoggerManager(vllm_config, engine_idxs=client.engine_ranks_managed)
            self.logger_manager.log_engine_initialized()
        self._client_count = 1
        self._elastic_ep_lock = asyncio.Lock()
        # Profiling is an engine's business: nothing to profile in a gateway.
        self.profiler = None
        self._frontend_profiler_injected = False
        self._frontend_profiler_worker_name = ""
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False
        self._loop = loop
        self._stopping: Failure | None = None
        client.connect(self._fail, self.output_processor.has_request)
        self.output_handler = None
        self._run_output_handler()

    def stop_admitting(self, failure: Failure) -> None:
        """From now on every request gets this failure."""
        self._stopping = failure

    # ---- where the fleet shows through
    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM calls it before a stream's status is sent: the one place where a stream can still get a 503."""
        if self._stopping is not None:
            raise http_error(_noted(self._stopping, answer_notes.get()))
        reason = self._loop.router.why_nobody_serves(self._loop.now_s())
        if reason is not None:
            failure = Failure(FailureKind.NOBODY, f"{reason}; please retry later")
            raise http_error(_noted(failure, answer_notes.get()))
        super().check_admission(n, request_id)

    async def check_health(self) -> None:
        if self._stopping is not None or self._loop.router.why_nobody_serves(self._loop.now_s()) is not None:
            raise EngineDeadError

    async def add_request(self, request_id: str, prompt: Any, params: Any, **more: Any) -> RequestOutputCollector:
        try:
            more["priority"] = (asked_priority.get() or Asked()).priority(more.get("priority", 0))
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="priority") from error
        return await super().add_request(request_id, prompt, params, **more)

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        try:
            await super()._add_request(request, prompt, parent_req, index, queue)
        except VLLMError:
            # vLLM registers the request for output before it sends it, and would keep it for ever.
            await self.abort(request.request_id, internal=True)
            raise

    def _fail(self, request_id: RequestId, failure: Failure) -> None:
        """End the client's call with this failure, its siblings (n > 1) with it."""
        state = self.output_processor.request_states.get(request_id)
        if state is None:
            return
        whole = state.parent_req.request_id if state.parent_req is not None else request_id
        siblings = self.output_processor.abort_requests((whole,), internal=True)
        self._loop.abort(sibling for sibling in siblings if sibling != request_id)
        if state.queue is not None:
            state.queue.put(http_error(_noted(failure, self.output_processor.notes.get(state.queue))))


def _noted(failure: Failure, notes: AnswerNotes | None) -> Failure:
    if notes is not None:
        notes.failure = failure
    return failure


def http_error(failure: Failure) -> VLLMError:
    """The exception that vLLM's server turns into OpenAI's error JSON with the right status."""
    match failure.kind:
        case FailureKind.IMPOSSIBLE:
            return VLLMValidationError(failure.message)
        case FailureKind.BUSY | FailureKind.SLO:
            return GracefulHTTPError(failure.message, HTTPStatus.TOO_MANY_REQUESTS)
        case FailureKind.CANCELLED:  # clients' libraries try again after 408, 409, 429 and 5xx; this must not come back
            return GracefulHTTPError(failure.message, HTTPStatus.GONE)
        case FailureKind.NOBODY | FailureKind.INSTANCE_LOST | FailureKind.TOKENS_LOST | FailureKind.STOPPING:
            return GracefulHTTPError(failure.message, HTTPStatus.SERVICE_UNAVAILABLE)
        case _:
            assert_never(failure.kind)
