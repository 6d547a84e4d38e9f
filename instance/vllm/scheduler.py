"""How does a request leave vLLM's scheduler, and how does it enter one? A mix-in over both of vLLM's schedulers.

The one mix-in that shares fields with its host: vLLM takes a scheduler class, and there is no port to implement
instead. It does no I/O, and every method runs between two steps. `compat.py` checks the names of vLLM used here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from typing import Any

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request, RequestStatus

from instance.headroom import Headroom, kept_from
from instance.types import NO_WORK, step_work
from instance.vllm import blocks, images, speculation
from instance.vllm.blocks import NoRoom
from instance.vllm.codec import PREFILL_FIELDS, STATE_VERSION, RequestState
from instance.vllm.in_flight import StepsInFlight

V2_MAX_STOP_TOKEN_IDS = 128
V2_MAX_BIASED_TOKEN_IDS = 1024
"""vLLM's V2 runner dies of a request with min_tokens and more stop token ids than this."""

_STILL_WAITING = (
    RequestStatus.WAITING,
    RequestStatus.PREEMPTED,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
)


class Rest(Enum):
    """Whether a request that was taken out of the batch has come to rest."""

    QUIET = "quiet"
    IN_FLIGHT = "in flight"
    GONE = "gone"
    """It finished meanwhile."""


def is_seeded(request: Request) -> bool:
    params = request.sampling_params
    return params is not None and params.sampling_type == SamplingType.RANDOM_SEED


class FerryMixin:
    """Freeze, export, thaw and release at a source; reserve, grow, commit and cancel at a destination."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ferry_out: dict[str, Request] = {}
        """Taken out of every queue; blocks still held."""
        self.ferry_in: dict[str, Request] = {}
        """Holding blocks, in no queue and not in `requests`."""
        self.ferry_returning: set[str] = set()
        """Of `ferry_out`: resumed while a step of them was in flight; they go back to a queue once it is not."""
        self.ferry_steps = StepsInFlight()
        self.ferry_num_preemptions = 0
        self.ferry_headroom: Headroom = ()
        self.ferry_last_step = (0, 0)
        """(tokens scheduled, requests that decoded) by the last step."""
        self.ferry_last_work = NO_WORK
        """Of the step whose outputs came last."""
        # As for a KV connector's consumer: incoming blocks are written outside the step stream, so a block freed
        # while a step that writes it is in flight must not be handed out yet.
        if self.vllm_config.max_concurrent_batches > 1:
            self.defer_block_free = True
        self.ferry_images_refused = images.why_never_movable(self.vllm_config)
        """Why no request with an image can be moved, or None."""
        self._ferry_whole_seeded_prefills = current_platform.is_cpu() and not self.use_v2_model_runner

    # ---- what vLLM calls
    def schedule(self: Any, throttle_prefills: bool = False) -> Any:
        for request in speculation.next_to_enter(self):
            if not self._ferry_fits_into_running(request):
                break
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        parent: Any = super()
        holding = {request.request_id for request in self.kv_holding_waiting}
        output = parent.schedule(throttle_prefills)
        begun = {request.req_id for request in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        chunks = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            num_before = request.num_computed_tokens - num_tokens
            chunks.append((num_tokens, num_before, num_before >= request.num_prompt_tokens))
        work = step_work(chunks)
        self.ferry_steps.scheduled(output, begun - holding, work)  # what held blocks brought its own KV
        self.ferry_last_step = (output.total_num_scheduled_tokens, work.num_decoding)
        return output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        parent: Any = super()
        outputs = parent.update_from_output(scheduler_output, model_runner_output)
        self.ferry_last_work = self.ferry_steps.processed(scheduler_output)
        for request_id in tuple(self.ferry_returning):
            if self.ferry_rest(request_id) is Rest.QUIET:
                self.ferry_thaw(request_id)
        return outputs

    def _free_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        """It has finished, perhaps by the token that was in flight when it was stopped."""
        parent: Any = super()
        self.ferry_out.pop(request.request_id, None)
        self.ferry_returning.discard(request.request_id)
        return parent._free_request(request, *args, **kwargs)

    def _reserve_prefill_lookahead(self: Any, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM asks this last of all before it takes a request into the step, and leaves the request out at 0.

        One that waits is left out beside urgent ones that would lack headroom; who is behind it is no more urgent.

        A seeded request whose prefill is cut kills vLLM 0.32 on CPU (its V1 runner steps the generator back, which CPU
        generators cannot): leave it, and with it those behind it, for a step in which it fits whole.
        """
        parent: Any = super()
        num_new_tokens = parent._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.status != RequestStatus.RUNNING and self._ferry_is_held_back(request):
            self.encoder_cache_manager.free(request)  # as vLLM does where blocks are missing
            return 0
        is_cut = num_computed_tokens + num_new_tokens < request.num_tokens
        if is_cut and self._ferry_whole_seeded_prefills and is_seeded(request):
            return 0
        return int(num_new_tokens)

    def _ferry_is_held_back(self: Any, request: Request) -> bool:
        if not self.ferry_headroom or self.policy != SchedulingPolicy.PRIORITY or self._holds_kv_blocks(request):
            return False
        kept = kept_from(self.ferry_headroom, request.priority, (running.priority for running in self.running))
        if not kept:
            return False
        needed = blocks.num_needed(self.kv_cache_manager, request.num_tokens)
        return bool(self.kv_cache_manager.block_pool.get_num_free_blocks() - needed < kept)

    def _preempt_request(self: Any, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        parent: Any = super()
        parent._preempt_request(request, timestamp, drop_stale_output)
        self.ferry_num_preemptions += 1

    # ---- admission
    def ferry_why_unservable(self: Any, request: Request) -> str | None:
        """One line that says why this engine could never run this request, or None. Keeps vLLM's fatal faults away."""
        num_prompt = request.num_prompt_tokens
        if num_prompt >= self.max_model_len and request.sampling_params is not None:
            return f"the prompt of {num_prompt} tokens leaves no room in a context of {self.max_model_len}"
        longest = min(num_prompt + request.max_tokens, self.max_model_len)
        total_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        if blocks.num_needed(self.kv_cache_manager, longest) > total_blocks:
            return f"{longest} tokens do not fit into {total_blocks} KV blocks of {self.block_size}"
        params = request.sampling_params
        if params is None:
            return None
        if (reason := images.why_unservable(self, request.mm_features)) is not None:
            return reason
        guessing = speculation.why_unservable(params, self.num_spec_tokens, is_cpu=current_platform.is_cpu())
        if guessing is not None:
            return guessing
        if self.use_v2_model_runner and (reason := _why_too_many(params)) is not None:
            return reason
        if self._ferry_whole_seeded_prefills and is_seeded(request):
            room = self.max_num_scheduled_tokens
            if threshold := self.scheduler_config.long_prefill_token_threshold:  # vLLM cuts beside others only
                room = min(room, threshold)
            if self.need_mamba_block_aligned_split:
                return "seeded requests cannot run on CPU with this model: vLLM cuts its prefills"
            if longest > room:
                return (
                    f"seeded requests of more than {room} tokens (prompt and max_tokens; this one: {longest}) "
                    "cannot run on CPU; raise --max-num-batched-tokens"
                    f"{' and --long-prefill-token-threshold' if threshold else ''}"
                )
        return None

    # ---- source
    def ferry_find(self: Any, request_id: str) -> Request | None:
        request = self.requests.get(request_id)
        return None if request is None or request.is_finished() else request

    def ferry_settled(self: Any, request: Request) -> int:
        """Tokens whose KV is written and can no longer change. What was found in the cache may be on its way still."""
        if self.ferry_steps.admits(request.request_id):
            return 0
        return int(max(0, request.num_computed_tokens - request.num_in_flight_tokens))

    def ferry_freeze(self: Any, request: Request) -> None:
        """Take it out of its queue. The caller has made sure that it is movable."""
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            if self.use_v2_model_runner:
                self.reset_preempted_req_ids.add(
                    request.request_id
                )  # that runner keeps a slot per request: give it back
        else:
            assert request.status in _STILL_WAITING, request.status
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
        self._inflight_prefills.discard(request)
        self.ferry_out[request.request_id] = request

    def ferry_rest(self: Any, request_id: str) -> Rest:
        request = self.ferry_out[request_id]
        if self.ferry_find(request_id) is not request:
            del self.ferry_out[request_id]
            self.ferry_returning.discard(request_id)
            return Rest.GONE
        return Rest.IN_FLIGHT if request.num_in_flight_tokens or request.num_output_placeholders else Rest.QUIET

    def ferry_export(self: Any, request_id: str, without_kv: bool, generator: bytes | None) -> RequestState:
        request = self.ferry_out[request_id]
        stats = request.prefill_stats
        return RequestState(
            version=STATE_VERSION,
            output_token_ids=list(request.output_token_ids),
            computed_tokens=0 if without_kv else request.num_computed_tokens,
            has_run=request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED),
            num_preemptions=request.num_preemptions,
            stop_reason=request.stop_reason,
            prefill_stats=None if stats is None else tuple(getattr(stats, name) for name in PREFILL_FIELDS),
            num_nans_in_logits=request.num_nans_in_logits,
            priority=request.priority,
            generator=generator,
            draft_token_ids=[] if without_kv else list(request.spec_token_ids),
        )

    def ferry_thaw(self: Any, request_id: str) -> None:
        """Put it back. Its slot may have been given away: then it waits for one, keeping its KV; and where a step of it
        is in flight, until that is done, since vLLM has counted its token already."""
        request = self.ferry_out.get(request_id)
        if request is None or self.ferry_rest(request_id) is Rest.GONE:
            return
        if request.status == RequestStatus.RUNNING:
            knows_runner = not self.use_v2_model_runner or request_id in self.reset_preempted_req_ids
            if knows_runner and self._ferry_fits_into_running(request):
                self.reset_preempted_req_ids.discard(request_id)
                self._ferry_leave_out(request_id)
                self.running.append(request)
                if request.is_prefill_chunk:
                    self._inflight_prefills.add(request)  # the rest of its prompt is reserved for again
                return
            if self.ferry_rest(request_id) is Rest.IN_FLIGHT:
                self.ferry_returning.add(request_id)
                return
            request.status = RequestStatus.PREEMPTED
            self.prev_step_scheduled_req_ids.discard(request_id)  # as in `ferry_commit`
        self._ferry_leave_out(request_id)
        (self.kv_holding_waiting if self._holds_kv_blocks(request) else self.waiting).prepend_request(request)

    def _ferry_leave_out(self: Any, request_id: str) -> None:
        self.ferry_out.pop(request_id, None)
        self.ferry_returning.discard(request_id)

    def ferry_release(self: Any, request_id: str) -> None:
        """The destination owns it: free it here; vLLM puts out nothing for a request that is finished from outside."""
        self._ferry_leave_out(request_id)
        self.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    # ---- destination
    def ferry_reserve(self: Any, request: Request, settled_tokens: int, slack_blocks: int) -> int:
        """Hold blocks for `settled_tokens` and some slack; returns the leading tokens that are cached here already.

        Raises `NoRoom`.
        """
        hit = 0
        if settled_tokens:
            self._ferry_check_slots(request)
            kept_free = self._inflight_prefill_reserved_blocks()
            hit = blocks.hold(self.kv_cache_manager, request, settled_tokens, kept_free)
            size = self.block_size
            longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            with_slack = min((-(-settled_tokens // size) + slack_blocks) * size, longest)
            with suppress(NoRoom):  # slack saves a visit later, and no more
                blocks.grow(self.kv_cache_manager, request.request_id, with_slack, kept_free)
        self.ferry_in[request.request_id] = request
        return hit

    def _ferry_check_slots(self: Any, request: Request) -> None:
        """Raises `NoRoom` where a request that brings KV would have to wait with it."""
        others = [other for other in self.ferry_in.values() if other is not request]
        coming = [*self.running, *self.kv_holding_waiting, *others]
        if len(coming) >= self.max_num_active_reqs:
            raise NoRoom(f"all {self.max_num_active_reqs} sequence slots are taken")
        if not self._ferry_has_adapter_slot(request, coming):
            raise NoRoom(f"all {self.lora_config.max_loras} LoRA adapter slots are taken")

    def _ferry_fits_into_running(self: Any, request: Request) -> bool:
        has_slot = len(self.running) < self.max_num_active_reqs
        return bool(has_slot and self._ferry_has_adapter_slot(request, self.running))

    def _ferry_has_adapter_slot(self: Any, request: Request, beside: Iterable[Request]) -> bool:
        """Whether it can run beside these: vLLM's scheduler dies of more adapters in `running` than there are slots."""
        if self.lora_config is None or request.lora_request is None:
            return True
        taken = {other.lora_request.lora_int_id for other in beside if other.lora_request is not None}
        return len(taken | {request.lora_request.lora_int_id}) <= int(self.lora_config.max_loras)

    def ferry_grow(self: Any, request_id: str, num_tokens: int) -> None:
        """Hold blocks for `num_tokens`, or for the whole context if it is less. Raises `NoRoom`, with all as it was."""
        if not blocks.held_by(self.kv_cache_manager, (request_id,)):
            self._ferry_check_slots(self.ferry_in[request_id])  # it had not begun when blocks were reserved for it
        num_tokens = min(num_tokens, self.max_model_len)  # the slack a source asks for may reach beyond its end
        blocks.grow(self.kv_cache_manager, request_id, num_tokens, self._inflight_prefill_reserved_blocks())

    def ferry_commit(self: Any, request_id: str, state: RequestState) -> Request:
        """Its blocks are written, the runner knows it: make it schedulable, before all that wait without blocks."""
        request = self.ferry_in.pop(request_id)
        self._ferry_restore(request, state)
        blocks.settle(self.kv_cache_manager, request)
        # The id may still wait to be flushed to the runner as finished, from its last stay here.
        self.finished_req_ids.discard(request_id)
        # Scheduled in the last step here, if it came back at once: an asynchronous scheduler would take it for known to
        # the runner and leave its tokens out.
        self.prev_step_scheduled_req_ids.discard(request_id)
        self.requests[request_id] = request
        if not state.has_run:
            self._enqueue_waiting_request(request)
            return request
        request.status = RequestStatus.PREEMPTED
        if state.computed_tokens:
            self.kv_holding_waiting.prepend_request(request)
        else:
            self.waiting.prepend_request(request)
        return request

    def _ferry_restore(self: Any, request: Request, state: RequestState) -> None:
        new_tokens = state.output_token_ids[request.num_output_tokens :]
        if new_tokens:
            request.append_output_token_ids(new_tokens)
        request.num_computed_tokens = state.computed_tokens
        request.num_preemptions = state.num_preemptions
        request.stop_reason = state.stop_reason
        request.num_nans_in_logits = state.num_nans_in_logits
        request.priority = state.priority
        request.prefill_stats = None
        if state.prefill_stats is not None:
            request.prefill_stats = PrefillStats(**dict(zip(PREFILL_FIELDS, state.prefill_stats, strict=True)))
        speculation.restore(self, request, state)

    def ferry_cancel(self: Any, request_id: str) -> None:
        request = self.ferry_in.pop(request_id, None)
        if request is not None:
            self.kv_cache_manager.free(request)

    def ferry_block_table(self: Any, request_id: str) -> tuple[tuple[int, ...], ...]:
        return blocks.table_of(self.kv_cache_manager, request_id)

    # ---- accounting
    def ferry_num_reserved_blocks(self: Any) -> int:
        """Blocks held only by reservations."""
        manager = self.kv_cache_manager
        return len(blocks.held_by(manager, self.ferry_in) - blocks.held_by(manager, self.requests))

    def ferry_check_integrity(self: Any) -> None:
        """Raise AssertionError unless free + held + reserved = total, and every live request stands in exactly one
        place."""
        owners = self.requests.keys() | self.ferry_in.keys()
        blocks.check_counts(self.kv_cache_manager, owners, self.deferred_frees)
        images.check_references(self, set(self.requests))
        assert not self.ferry_in.keys() & self.requests.keys()
        assert self.ferry_returning <= self.ferry_out.keys()
        places = Counter(request.request_id for request in self.running)
        places.update(request.request_id for queue in (self.waiting, self.kv_holding_waiting) for request in queue)
        places.update(self.ferry_out.keys())
        live = {request_id for request_id, request in self.requests.items() if not request.is_finished()}
        assert set(places) == live, f"queues {sorted(places)} and requests {sorted(live)} disagree"
        assert all(count == 1 for count in places.values()), f"in two places: {places}"
        assert all(request.status == RequestStatus.RUNNING for request in self.running)
        assert len(self.running) <= self.max_num_running_reqs


def _why_too_many(params: Any) -> str | None:
    """The V2 runner's arrays: more ends the engine."""
    if params.min_tokens and len(params.all_stop_token_ids) > V2_MAX_STOP_TOKEN_IDS:
        return f"min_tokens with more than {V2_MAX_STOP_TOKEN_IDS} stop token ids"
    for name in ("allowed_token_ids", "logit_bias"):
        if len(getattr(params, name) or ()) > V2_MAX_BIASED_TOKEN_IDS:
            return f"{name} with more than {V2_MAX_BIASED_TOKEN_IDS} token ids"
    return None


class FerryScheduler(FerryMixin, Scheduler):
    """vLLM's synchronous scheduler, with the mix-in."""


class FerryAsyncScheduler(FerryMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, with the mix-in."""
