"""Which requests of an engine that guesses tokens ahead (speculative decoding) may move, and how do they go on?

The guesses that the source would verify next travel with the request: the destination runs the very step the source
would have run, so that even the last bits of a logprob are equal. Only guesses by ngrams, and only where nothing is
drawn: see README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.request import Request, RequestStatus

from instance.vllm.codec import RequestState

NGRAM = "ngram"


def describe(config: Any) -> str:
    """How an engine of this `VllmConfig` guesses; empty where it does not. Part of the hand-shake: guesses decide which
    tokens share a step, and so the last bits of a logprob."""
    speculation = config.speculative_config
    if speculation is None:
        return ""
    window = f"{speculation.prompt_lookup_min} to {speculation.prompt_lookup_max}"
    return f"{speculation.num_speculative_tokens} tokens by {speculation.method} of {window}"


def why_engine_unmovable(config: Any) -> str | None:
    """One line that says why an engine that guesses like this can move no request at all, or None."""
    speculation = config.speculative_config
    if speculation is None:
        return None
    facts = (
        (speculation.method != NGRAM, f"speculative decoding by {speculation.method} is on"),
        (bool(speculation.num_speculative_tokens_per_batch_size), "the number of guesses depends on the batch"),
        (bool(config.scheduler_config.async_scheduling), "speculative decoding is on with asynchronous scheduling"),
        (bool(config.use_v2_model_runner), "speculative decoding is on with the V2 model runner"),
        (config.lora_config is not None, "speculative decoding is on with LoRA"),
        (
            config.observability_config.per_request_spec_decode_metrics != "none",
            "the speculative decoding of each request is measured",
        ),
    )
    return next((reason for is_so, reason in facts if is_so), None)


def why_unservable(params: SamplingParams, num_guesses: int, *, is_cpu: bool) -> str | None:
    """One line that says why an engine that guesses at most `num_guesses` tokens ahead must not run such a request, or
    None.

    Where a CPU verifies guesses, vLLM 0.32 spreads temperature, top_k and top_p over them into a copy that it then
    drops, and reads memory that nothing has written: one sampled request spoils the whole batch, or ends the engine.
    """
    if num_guesses and is_cpu and params.sampling_type != SamplingType.GREEDY:
        return "sampled requests cannot run on a CPU with speculative decoding (a fault of vLLM): set temperature to 0"
    return None


def why_unmovable(request: Request, num_guesses: int) -> str | None:
    """One line that says why a request of an engine that guesses at most `num_guesses` tokens ahead cannot be moved, or
    None."""
    if not num_guesses:
        return None
    params = request.sampling_params
    if params is not None and params.sampling_type != SamplingType.GREEDY:
        return "it is sampled, and what speculative decoding draws cannot be repeated"
    return None


def why_uncommittable(scheduler: Any, request: Request, state: RequestState) -> str | None:
    """One line that says why the guesses that came with a request cannot be verified here, or None."""
    num_guesses, most = len(state.draft_token_ids), int(scheduler.num_spec_tokens)
    if num_guesses > most:
        return f"it comes with {num_guesses} guessed tokens, and at most {most} are verified here"
    num_tokens = request.num_prompt_tokens + len(state.output_token_ids)
    if num_guesses and state.computed_tokens != num_tokens - 1:
        return "it comes with guessed tokens, and has not computed its own"
    return None


def restore(scheduler: Any, request: Request, state: RequestState) -> None:
    """After its output is. What its grammar does not take is left out, as vLLM does: it would end with such a guess."""
    guesses = list(state.draft_token_ids)
    request.spec_token_ids = scheduler.structured_output_manager.validate_tokens(request, guesses) if guesses else []


def next_to_enter(scheduler: Any) -> Iterator[Request]:
    """Requests that wait with their KV and decode: each is to be put into `running`, for as long as there is room.

    vLLM would do that in its next step, but pads a decoding request that it takes from a queue with guesses of -1: the
    step would be another than the source's, and a request with a grammar may end by it.
    """
    if scheduler.num_spec_tokens:
        for request in list(scheduler.kv_holding_waiting):
            is_decoding = request.num_tokens - request.num_computed_tokens == 1
            if is_decoding and request.status == RequestStatus.PREEMPTED:
                yield request
