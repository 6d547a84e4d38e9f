"""Is a migrated run the same as an undisturbed one? Runs both, and tells everything a client could see of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from instance.messages import OutputEntry
from instance.types import EngineOutput, Submission
from instance.vllm.codec import decode_output
from instance.vllm.host import VllmEngine
from migration.types import RequestId
from tests.support.pair import EnginePair, Ferried, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, submission_of


@dataclass(frozen=True, slots=True)
class Seen:
    """What one request put out, as far as a client can tell."""

    tokens: tuple[int, ...]
    finish_reason: int | None
    stop_reason: int | str | None
    logprobs: tuple[bytes, ...]
    """Of each token: ids and logprobs of the alternatives, byte for byte."""
    prompt_logprobs: tuple[bytes, ...]
    num_prefill_reports: int


def seen(outputs: Sequence[EngineOutput]) -> Seen:
    logprobs: list[bytes] = []
    prompt_logprobs: list[bytes] = []
    num_prefill_reports = 0
    for output in outputs:
        entry = OutputEntry(
            output.request_id, 0, output.token_ids, output.finish_reason, output.stop_reason, output.extra
        )
        whole = decode_output(entry)
        assert tuple(whole.new_token_ids) == output.token_ids
        num_prefill_reports += whole.prefill_stats is not None
        if whole.new_logprobs is not None:
            ids, values = whole.new_logprobs.logprob_token_ids, whole.new_logprobs.logprobs
            logprobs += [
                np.asarray(row).tobytes() + np.asarray(value).tobytes() for row, value in zip(ids, values, strict=True)
            ]
        if whole.new_prompt_logprobs_tensors is not None:
            tensors = whole.new_prompt_logprobs_tensors
            prompt_logprobs += [tensors.logprob_token_ids.numpy().tobytes(), tensors.logprobs.numpy().tobytes()]
    tokens = tuple(token for output in outputs for token in output.token_ids)
    last = outputs[-1]
    return Seen(
        tokens, last.finish_reason, last.stop_reason, tuple(logprobs), tuple(prompt_logprobs), num_prefill_reports
    )


class Comparison:
    """One kind of request on a pair of engines, with and without migrations; caches are emptied before each run."""

    def __init__(
        self,
        kit: VllmKit,
        prompt_key: int,
        num_prompt_tokens: int,
        params: Callable[[], SamplingParams],
        adapter: LoRARequest | None = None,
    ) -> None:
        self.pair = EnginePair(kit)
        self.first: VllmEngine = kit.first
        self.second: VllmEngine = kit.second
        self._prompt = prompt_of(prompt_key, num_prompt_tokens)
        self._params = params
        self._adapter = adapter

    def close(self) -> None:
        self.pair.drain()
        self.pair.close()

    def start(self) -> RequestId:
        for engine in (self.first, self.second):
            self.pair.step_until(engine, lambda: not engine.has_work())  # noqa: B023 - called here and now
        assert self.first.reset_prefix_cache() and self.second.reset_prefix_cache()
        request_id = self.pair.new_id()
        refusal = self.first.add(self._submission(request_id))
        assert refusal is None, refusal
        return request_id

    def _submission(self, request_id: RequestId) -> Submission:
        return submission_of(request_id, self._prompt, self._params(), lora_request=self._adapter)

    def seen(self, request_id: RequestId) -> Seen:
        return seen(self.pair.outputs[request_id])

    def undisturbed(self) -> Seen:
        request_id = self.start()
        self.pair.finish(self.first, request_id)
        return self.seen(request_id)

    def migrated(self, hops: Sequence[int], sabotage: Sabotage | None = None, without_kv: bool = False) -> Seen:
        """Move it there and back, each time when it has put out so many tokens."""
        request_id = self.start()
        here, there = self.first, self.second
        for at in hops:
            self.pair.decode_until(here, request_id, at)
            assert not self.pair.is_finished(request_id), f"it finished before token {at}"
            self.pair.ferry(request_id, here, there, sabotage=sabotage, without_kv=without_kv)
            here, there = there, here
        self.pair.finish(here, request_id)
        return self.seen(request_id)

    def move_at_once(self) -> tuple[RequestId, Ferried]:
        """Move it before it has run at all; it is left to the caller to finish it at the second engine."""
        request_id = self.start()
        return request_id, self.pair.ferry(request_id, self.first, self.second, num_stages=0)
