"""Is a migrated run the same as an undisturbed one? Runs both, and tells everything a client could see of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from instance.messages import OutputEntry
from instance.revival import Revival
from instance.types import EngineOutput, EngineRefusal, Rescue, Submission
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


def _tokens(outputs: Sequence[EngineOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def _first(outputs: Sequence[EngineOutput], num_tokens: int) -> list[EngineOutput]:
    """Of outputs of one token each."""
    assert all(len(output.token_ids) == 1 for output in outputs)
    return list(outputs[:num_tokens])


class _Altered:
    """An engine whose rescues are altered on their way."""

    def __init__(self, engine: VllmEngine, alter: Callable[[Rescue], Rescue]) -> None:
        self._engine = engine
        self._alter = alter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def rescue(self, submission: Submission, output_token_ids: tuple[int, ...]) -> Rescue | EngineRefusal:
        rescue = self._engine.rescue(submission, output_token_ids)
        return rescue if isinstance(rescue, EngineRefusal) else self._alter(rescue)


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

    def revived(
        self, deaths: Sequence[int], num_lost: int = 0, alter: Callable[[Rescue], Rescue] = lambda rescue: rescue
    ) -> Seen:
        """Each time it has put out so many tokens its engine forgets it, the last `num_lost` of them having reached
        nobody, and it goes on at the other one. `alter`: what a negative control leaves out."""
        request_id, here, there = self.start(), self.first, self.second
        outputs: list[EngineOutput] = []
        for at in deaths:
            self.pair.decode_until(here, request_id, at - len(_tokens(outputs)))
            assert not self.pair.is_finished(request_id), f"it finished before token {at}"
            here.abort((request_id,))
            outputs += _first(self.pair.outputs[request_id], at - num_lost - len(_tokens(outputs)))
            request_id = self.pair.new_id()
            revival = Revival(self._submission(request_id), _tokens(outputs))
            while (decided := revival(_Altered(there, alter))) is None:
                time.sleep(0.001)  # a grammar compiles on another thread; nothing to step for it
            assert decided.refusal is None, decided.refusal
            there.check_integrity()
            here, there = there, here
        self.pair.finish(here, request_id)
        return seen(outputs + self.pair.outputs[request_id])

    def prompted_anew(self, at: int) -> Seen:
        """After so many tokens it is sent to the other engine as a new request, whose prompt ends with them."""
        request_id = self.start()
        self.pair.decode_until(self.first, request_id, at)
        self.first.abort((request_id,))
        outputs = _first(self.pair.outputs[request_id], at)
        request_id, prompt = self.pair.new_id(), [*self._prompt, *_tokens(outputs)]
        refusal = self.second.add(submission_of(request_id, prompt, self._params(), lora_request=self._adapter))
        assert refusal is None, refusal
        self.pair.finish(self.second, request_id)
        return seen(outputs + self.pair.outputs[request_id])

    def move_at_once(self) -> tuple[RequestId, Ferried]:
        """Move it before it has run at all; it is left to the caller to finish it at the second engine."""
        request_id = self.start()
        return request_id, self.pair.ferry(request_id, self.first, self.second, num_stages=0)
