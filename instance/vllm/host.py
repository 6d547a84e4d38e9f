"""How is vLLM an engine of ours? `VllmEngine`: the Engine port over an in-process EngineCore that others step."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from instance.headroom import Headroom
from instance.types import (
    NO_WORK,
    CachedChanges,
    CommittedRequest,
    EngineFacts,
    EngineLoad,
    EngineOutput,
    EngineRefusal,
    PriorityAnswer,
    RequestView,
    Rescue,
    StepResult,
    Submission,
)
from instance.vllm.arrivals import why_uncommittable
from instance.vllm.blocks import NoRoom
from instance.vllm.cached import CacheWatch
from instance.vllm.codec import (
    STATE_VERSION,
    CodecError,
    DescribedRequest,
    decode_described,
    decode_request,
    decode_state,
    encode_described,
    encode_output,
    encode_state,
)
from instance.vllm.kept import Incoming, Submitted
from instance.vllm.lora import Adapters
from instance.vllm.mover import RanksMover
from instance.vllm.priorities import set_priority
from instance.vllm.rank import Carriage, Rank, RemoteRank
from instance.vllm.refusals import is_in_flight, read, why_not_here, why_too_large, why_unmovable
from instance.vllm.rescue import rescue_of
from instance.vllm.scheduler import Rest, is_seeded
from instance.vllm.start import start_core
from instance.vllm.views import load_of, view_of
from migration.types import (
    Description,
    MigrationId,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

MAX_REMEMBERED_ABORTS = 4096
"""Ids of aborted requests that are told from finished ones, the latest."""


class VllmEngine:
    """See `instance.engine.Engine`. One thread calls everything but `mover`."""

    def __init__(self, core: EngineCore, facts: EngineFacts, ranks: tuple[Rank, ...]) -> None:
        """Use `from_argv`. `core`: with our scheduler in it, unless `facts.migration_refused_because` says why not."""
        self._core = core
        self._scheduler: Any = core.scheduler
        self._facts = facts
        self._ranks = ranks
        self._mover = RanksMover(ranks)
        self._adapters = Adapters(core)
        self._cache = CacheWatch(core.scheduler, facts.block_size)
        self._submitted: dict[RequestId, Submitted] = {}
        self._incoming: dict[MigrationId, Incoming] = {}
        self._aborted: OrderedDict[RequestId, None] = OrderedDict()
        self._is_closed = False

    @classmethod
    def from_argv(cls, argv: tuple[str, ...], carriage: Carriage) -> VllmEngine:
        """Start an engine: `argv` as of `vllm serve`.

        Raises `StartError` (one line). Takes seconds; uses the calling thread, which should be the one that will
        step it.
        """
        started = start_core(argv, carriage)
        return cls(started.core, started.facts, started.ranks)

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def mover(self) -> RanksMover:
        return self._mover

    # ---- running requests
    def add(self, submission: Submission) -> EngineRefusal | None:
        if submission.request_id in self._scheduler.requests:
            return None
        if any(incoming.request.request_id == submission.request_id for incoming in self._incoming.values()):
            return EngineRefusal("the request is on its way here from another instance", final=False)
        if is_in_flight(self._scheduler, submission.request_id):
            return EngineRefusal("a step of its last stay here is in flight", final=False)
        core_request = read(submission)
        if isinstance(core_request, EngineRefusal):
            return core_request
        core_request.priority = submission.priority
        refusal = self._why_unservable(core_request) or self._adapters.load(core_request.lora_request)
        if refusal is not None:
            return EngineRefusal(refusal, final=True)
        request, wave = self._core.preprocess_add_request(core_request)
        try:
            self._core.add_request(request, wave)
        except ValueError as error:  # a pooling task this model does not have
            return EngineRefusal(str(error), final=True)
        self._submitted[submission.request_id] = Submitted(submission.external_id, submission.payload)
        return None

    def rescue(self, submission: Submission, output_token_ids: tuple[int, ...]) -> Rescue | EngineRefusal:
        def generator_after(seed: int, num_tokens: int) -> bytes | None:
            state: bytes | None = self._core.collective_rpc("ferry_generator_after", args=(seed, num_tokens))[0]
            return state

        return rescue_of(self._facts, self._adapters, submission, output_token_ids, generator_after)

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._scheduler.requests]
        if known:
            self._core.abort_requests(known)
        for request_id in known:
            self._submitted.pop(RequestId(request_id), None)
            self._aborted[RequestId(request_id)] = None
        while len(self._aborted) > MAX_REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        return set_priority(self._scheduler, request_id, priority)

    def set_headroom(self, headroom: Headroom) -> None:
        self._scheduler.ferry_headroom = headroom

    def has_work(self) -> bool:
        return bool(self._scheduler.has_requests() or self._core.batch_queue)

    def step(self) -> StepResult:
        self._scheduler.ferry_last_work = NO_WORK  # with asynchronous scheduling a call may wait for no step
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        results = tuple(self._output(output) for batch in (outputs or {}).values() for output in batch.outputs)
        num_tokens, num_decoding = getattr(self._scheduler, "ferry_last_step", (0, 0)) if executed else (0, 0)
        return StepResult(results, executed, num_tokens, num_decoding, self._scheduler.ferry_last_work)

    def _output(self, output: Any) -> EngineOutput:
        finish = output.finish_reason
        if finish is not None:
            self._submitted.pop(output.request_id, None)
        return EngineOutput(
            RequestId(output.request_id),
            tuple(output.new_token_ids),
            None if finish is None else int(finish),
            output.stop_reason,
            encode_output(output),
        )

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix. False: blocks are still in use."""
        return bool(self._core.reset_prefix_cache())

    def take_cached_changes(self) -> CachedChanges | None:
        return self._cache.take()

    # ---- what it looks like
    def load(self) -> EngineLoad:
        return load_of(self._scheduler, self._facts.block_size, has_reservations=bool(self._incoming))

    def requests(self) -> tuple[RequestView, ...]:
        is_movable = self._facts.migration_refused_because is None
        views = []
        for request_id, request in self._scheduler.requests.items():
            if not request.is_finished():
                submitted = self._submitted.get(request_id)
                external_id = "" if submitted is None else submitted.external_id
                fits = submitted is not None and why_too_large(submitted.payload) is None
                views.append(view_of(self._scheduler, request, external_id, is_movable and fits))
        return tuple(views)

    # ---- source
    def describe(self, request_id: RequestId) -> Description | Refusal | None:
        request = self._find(request_id)
        if request is None:
            return None
        submitted = self._submitted.get(request_id)
        if submitted is None:
            return Refusal(self._facts.migration_refused_because or "its submission is not known")
        if (reason := self._why_unmovable(request, submitted)) is not None:
            return Refusal(reason)
        adapter = self._adapters.identity(request.lora_request)
        if isinstance(adapter, str):
            return Refusal(adapter)
        output = list(request.output_token_ids)
        described = DescribedRequest(
            STATE_VERSION, submitted.external_id, submitted.payload, output, request.priority, adapter
        )
        return Description(
            request_id,
            encode_described(described),
            self._scheduler.ferry_settled(request),
            self._facts.kv_fingerprint,
            self._facts.block_size,
            request.num_preemptions,
        )

    def progress(self, request_id: RequestId) -> Progress | None:
        request = self._find(request_id)
        if request is None:
            return None
        scheduler = self._scheduler
        table = scheduler.ferry_block_table(request_id)
        return Progress(scheduler.ferry_settled(request), request.num_tokens, request.num_preemptions, table)

    def try_stop(self, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped | None:
        scheduler = self._scheduler
        if self._facts.migration_refused_because is not None:
            return NotStopped.UNMOVABLE
        scheduler.ferry_returning.discard(request_id)
        if request_id not in scheduler.ferry_out:
            request = self._find(request_id)
            if request is None:
                return NotStopped.ABORTED if request_id in self._aborted else NotStopped.FINISHED
            if why_unmovable(request, scheduler.ferry_images_refused, scheduler.num_spec_tokens) is not None:
                return NotStopped.UNMOVABLE
            scheduler.ferry_freeze(request)
        rest = scheduler.ferry_rest(request_id)
        if rest is not Rest.QUIET:
            return None if rest is Rest.IN_FLIGHT else NotStopped.FINISHED
        request = scheduler.ferry_out[request_id]
        generator = None
        if is_seeded(request):
            generator = self._core.collective_rpc("ferry_export_generator", args=(request_id,))[0]
        state = scheduler.ferry_export(request_id, without_kv, generator)
        table = ((),) if without_kv else scheduler.ferry_block_table(request_id)
        return StoppedRequest(
            encode_state(state), state.computed_tokens, request.num_output_tokens, request.num_preemptions, table
        )

    def resume(self, request_id: RequestId) -> None:
        if self._facts.migration_refused_because is None:
            self._scheduler.ferry_thaw(request_id)

    def release(self, request_id: RequestId) -> bool:
        if self._facts.migration_refused_because is not None or request_id not in self._scheduler.ferry_out:
            return False
        self._scheduler.ferry_release(request_id)
        self._submitted.pop(request_id, None)
        return True

    # ---- destination
    def reserve(self, migration_id: MigrationId, description: Description, slack_blocks: int) -> Reservation | Refusal:
        if migration_id in self._incoming:
            return Refusal("this migration has its reservation already")
        if (refusal := why_not_here(self._facts, self._scheduler, description)) is not None:
            return Refusal(refusal)
        try:
            described = decode_described(description.payload)
            core_request = decode_request(described.core)
        except CodecError as error:
            return Refusal(str(error))
        core_request.priority = described.priority
        adapter = core_request.lora_request
        unservable = self._why_unservable(core_request) or self._adapters.why_another(adapter, described.adapter)
        if unservable is not None:
            return Refusal(unservable)
        request, _ = self._core.preprocess_add_request(core_request)  # starts compiling its grammar, if it has one
        if described.output_token_ids:
            request.append_output_token_ids(described.output_token_ids)
        if description.settled_tokens > request.num_tokens:
            return Refusal("more tokens are settled than the description holds")
        try:
            hit = self._scheduler.ferry_reserve(request, description.settled_tokens, slack_blocks)
        except NoRoom as error:
            return Refusal(str(error))
        self._core.collective_rpc("ferry_expect", args=(request.request_id, described.core))
        incoming = Incoming(request, Submitted(described.external_id, described.core), hit)
        self._incoming[migration_id] = incoming
        return self._reservation(incoming)

    def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        incoming = self._incoming.get(migration_id)
        if incoming is None:
            return Refusal("no such reservation")
        try:
            self._scheduler.ferry_grow(incoming.request.request_id, num_tokens)
        except NoRoom as error:
            return Refusal(str(error))
        return self._reservation(incoming)

    def is_ready(self, migration_id: MigrationId) -> bool | Refusal:
        incoming = self._incoming.get(migration_id)
        if incoming is None:
            return Refusal("no such reservation")
        structured = incoming.request.structured_output_request
        if structured is None:
            return True
        grammar = structured.grammar
        if isinstance(grammar, Exception):
            return Refusal(f"its grammar does not compile: {grammar}")
        return grammar is not None

    def commit(self, migration_id: MigrationId, state: bytes) -> CommittedRequest | Refusal:
        incoming = self._incoming.get(migration_id)
        if incoming is None:
            return Refusal("no such reservation")
        request = incoming.request
        try:
            exported = decode_state(state)
        except CodecError as error:
            return self._refuse_commit(migration_id, str(error))
        refusal = why_uncommittable(self._core, self._facts.block_size, request, exported)
        if refusal is not None:
            return self._refuse_commit(migration_id, refusal)
        request_id = RequestId(request.request_id)
        was_here = request_id in self._scheduler.finished_req_ids
        del self._incoming[migration_id]
        self._submitted[request_id] = incoming.submitted
        request = self._scheduler.ferry_commit(request_id, exported)  # gives back blocks: the runner must not know them
        if exported.has_run:
            block_ids = tuple(list(group) for group in self._scheduler.ferry_block_table(request_id))
            arguments = (incoming.submitted.payload, state, request_id, block_ids)
            self._core.collective_rpc("ferry_import", args=arguments)
        elif was_here:
            self._core.collective_rpc("ferry_drop", args=(request_id,))
        return CommittedRequest(
            request_id,
            incoming.submitted.external_id,
            request.num_output_tokens,
            request.priority,
            request.num_prompt_tokens,
            request.max_tokens,
        )

    def cancel(self, migration_id: MigrationId) -> None:
        incoming = self._incoming.pop(migration_id, None)
        if incoming is not None:
            self._scheduler.ferry_cancel(incoming.request.request_id)

    # ---- the end
    def check_integrity(self) -> None:
        if self._facts.migration_refused_because is not None:
            return
        self._scheduler.ferry_check_integrity()
        assert set(self._scheduler.ferry_in) == {incoming.request.request_id for incoming in self._incoming.values()}
        owned = {request_id for request_id, request in self._scheduler.requests.items() if not request.is_finished()}
        assert owned == self._submitted.keys(), "submissions kept and requests owned disagree"

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._mover.shut_down()
        if self._ranks:
            self._core.collective_rpc("ferry_close")
        for rank in self._ranks:
            if isinstance(rank, RemoteRank):
                rank.shut_down()
        self._core.shutdown()

    # ---- pieces
    def _find(self, request_id: RequestId) -> Request | None:
        request = self._scheduler.requests.get(request_id)
        return None if request is None or request.is_finished() else request

    def _why_unservable(self, core_request: Any) -> str | None:
        if self._facts.migration_refused_because is not None and not hasattr(self._scheduler, "ferry_why_unservable"):
            return None
        reason: str | None = self._scheduler.ferry_why_unservable(Request.from_engine_core_request(core_request, None))
        return reason

    def _why_unmovable(self, request: Request, submitted: Submitted) -> str | None:
        scheduler, refused = self._scheduler, self._facts.migration_refused_because
        reason = refused or why_unmovable(request, scheduler.ferry_images_refused, scheduler.num_spec_tokens)
        return reason or why_too_large(submitted.payload)

    def _refuse_commit(self, migration_id: MigrationId, reason: str) -> Refusal:
        self.cancel(migration_id)
        return Refusal(reason)

    def _reservation(self, incoming: Incoming) -> Reservation:
        table = self._scheduler.ferry_block_table(incoming.request.request_id)
        return Reservation(incoming.num_cached_tokens, max((len(group) for group in table), default=0), table)
