"""What does vLLM's front end call an engine core? Here: a fleet of instances, behind vLLM's own `EngineCoreClient`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from copy import copy
from types import SimpleNamespace

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from instance.messages import MAX_MESSAGE_BYTES
from instance.vllm.codec import CodecError, decode_output, encode_request
from instance.vllm.flags import check_adapter_path
from migration.types import RequestId
from orchestrator.gateway.asks import request_asks
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.prefixes import PrefixHashes, no_hashes
from orchestrator.gateway.relay import Owner
from orchestrator.gateway.types import Deliver, Outgoing

logger = logging.getLogger(__name__)

MAX_STOP_IDS_WITH_MIN_TOKENS = 128
"""vLLM 0.32's V2 runner dies of more (its kernel has a fixed table), so the gateway refuses them."""

MAX_PAYLOAD_BYTES = MAX_MESSAGE_BYTES - (64 << 10)
"""Of one request. An inbox hangs up on a larger message, unread."""

STATS_EVERY_S = 1.0

Encode = Callable[[EngineCoreRequest], bytes]


class FleetCoreClient(EngineCoreClient):
    """What `AsyncLLM` needs from an engine core, and no more; the rest is NotImplementedError (HTTP 501)."""

    def __init__(
        self, loop: GatewayLoop, encode: Encode = encode_request, prefix_hashes: PrefixHashes = no_hashes
    ) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)  # AsyncLLM.errored reads it; a fleet is never dead
        self.reset_prefix_caches: Callable[[], Awaitable[bool]] | None = None
        self._loop = loop
        self._encode = encode
        self._prefix_hashes = prefix_hashes
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._clock_offsets_s: dict[Owner, float] = {}
        self._adapter_ids: set[int] = set()
        self._on_fail: Callable[[RequestId, Failure], None] = lambda *_: None
        self._is_wanted: Callable[[str], bool] = lambda _: True
        loop.connect(self._deliver, lambda fail: self._on_fail(fail.request_id, fail.failure))

    def connect(self, on_fail: Callable[[RequestId, Failure], None], is_wanted: Callable[[str], bool]) -> None:
        """Who tells a client that its request has failed, and whether anybody still waits for a request's output."""
        self._on_fail, self._is_wanted = on_fail, is_wanted

    # ---- what AsyncLLM calls
    async def get_output_async(self) -> EngineCoreOutputs:
        try:
            async with asyncio.timeout(STATS_EVERY_S):
                return await self._outputs.get()
        except TimeoutError:
            return EngineCoreOutputs(scheduler_stats=self._stats())  # gauges go back to zero when nothing runs

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send it to an instance. Returns at once; a failure comes later, by `connect`'s callback.

        Raises VLLMValidationError (HTTP 400) for what no instance is asked to run.
        """
        params = request.sampling_params
        if params is None or request.resumable:
            raise VLLMValidationError("only generation requests with their whole input are served here")
        if params.min_tokens and len(params.all_stop_token_ids) > MAX_STOP_IDS_WITH_MIN_TOKENS:
            limit = MAX_STOP_IDS_WITH_MIN_TOKENS
            raise VLLMValidationError(f"min_tokens takes at most {limit} stop tokens", parameter="stop_token_ids")
        try:
            payload = self._encode(request)
        except CodecError as error:
            raise VLLMValidationError(str(error)) from error
        if len(payload) > MAX_PAYLOAD_BYTES:
            limit = MAX_PAYLOAD_BYTES >> 20
            raise VLLMValidationError(
                f"the request takes {len(payload) >> 20} MiB with its images, at most {limit} are sent"
            )
        if not self._is_wanted(request.request_id):
            return  # a sibling (n > 1) has failed already, and all of them with it
        block_size = self._loop.router.hashed_block_size
        self._loop.submit(
            Outgoing(
                request_id=RequestId(request.request_id),
                external_id=request.external_req_id or request.request_id,
                priority=request.priority,
                num_prompt_tokens=len(request.prompt_token_ids or ()),
                max_tokens=params.max_tokens or 0,
                payload=payload,
                payload_as=lambda request_id: self._encode(_renamed(request, request_id)),
                asks=request_asks.get(),
                prefix=() if block_size is None else self._prefix_hashes(request, block_size),
            )
        )

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._loop.abort(request_ids)

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if reset_running_requests or reset_connector:
            raise NotImplementedError("only the prefix cache itself can be reset")
        return await self.reset_prefix_caches() if self.reset_prefix_caches is not None else False

    async def reset_mm_cache_async(self) -> None:
        """Nothing to do: the gateway's processor cache is off when there are several engines."""

    async def reset_encoder_cache_async(self) -> None:
        """Nothing to do, as above."""

    async def is_sleeping_async(self) -> bool:
        return False

    async def is_scheduler_paused_async(self) -> bool:
        return False

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Instances load an adapter when the first request names it, and before one with it moves to them.

        Raises FlagError (an error when the gateway starts, or of the development endpoint that adds adapters).
        """
        if lora_request.load_inplace:
            raise NotImplementedError("an adapter cannot be replaced while instances serve it: give it another name")
        check_adapter_path(lora_request.lora_name, lora_request.lora_path)
        self._adapter_ids.add(lora_request.lora_int_id)
        return True

    async def list_loras_async(self) -> set[int]:
        """Those that may be asked for; which of them an instance holds at the moment is its own affair."""
        return set(self._adapter_ids)

    def dp_engines_running(self) -> bool:
        return self._loop.router.num_requests > 0

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do: the service that made the loop stops it; instances belong to the orchestrator."""

    # ---- what comes back
    def _deliver(self, delivery: Deliver) -> None:
        # Times are told by the sender's clock. The smallest difference seen is (almost) the offset of the two clocks;
        # with it, gaps between tokens stay true when a request changes machines.
        offset_s = min(time.monotonic() - delivery.sent_s, self._clock_offsets_s.get(delivery.sender, float("inf")))
        if delivery.sender not in self._clock_offsets_s and len(self._clock_offsets_s) >= 1024:
            self._clock_offsets_s.clear()
        self._clock_offsets_s[delivery.sender] = offset_s
        outputs: list[EngineCoreOutput] = []
        for entry in delivery.entries:
            try:
                output = decode_output(entry)
            except CodecError as error:
                logger.error("%s sent output that cannot be read for %s: %s", delivery.sender, entry.request_id, error)
                self._loop.abort([entry.request_id])
                failure = Failure(FailureKind.TOKENS_LOST, "the output could not be read; please retry")
                self._on_fail(RequestId(entry.request_id), failure)
                continue
            output.request_id = entry.request_id  # a second attempt has another id at the instances
            for event in output.events or ():
                event.timestamp += offset_s
            outputs.append(output)
        if outputs:
            self._outputs.put_nowait(
                EngineCoreOutputs(outputs=outputs, timestamp=delivery.sent_s + offset_s, scheduler_stats=self._stats())
            )

    def _stats(self) -> SchedulerStats:
        """The fleet as one engine: sums, and the mean use of KV memory."""
        reports = [seen.report for seen in self._loop.router.view(self._loop.now_s()).instances]
        total = sum(report.total_blocks for report in reports)
        used = total - sum(report.free_blocks for report in reports)
        return SchedulerStats(
            num_running_reqs=sum(report.num_running for report in reports),
            num_waiting_reqs=sum(report.num_waiting for report in reports),
            kv_cache_usage=used / total if total else 0.0,
        )


def _renamed(request: EngineCoreRequest, request_id: RequestId) -> EngineCoreRequest:
    other = copy(request)
    other.request_id = request_id
    return other
