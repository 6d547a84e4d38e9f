"""Which first uses are slow in vLLM, and can be had before the first request? One short request for each feature."""

from __future__ import annotations

import time
from typing import Any

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from instance.vllm import speculation

NUM_TOKENS = 4
PROMPT_TOKENS = 8
DEADLINE_S = 60.0
"""The warm-up is given up after this long (a grammar that does not compile), and the engine serves as it is."""


def warm_up(core: Any) -> None:
    """Run a few short requests through an idle engine and leave no trace of them, cached prefixes included."""
    model = core.vllm_config.model_config
    prompt = [1 + i % max(1, min(model.get_vocab_size() - 2, 64)) for i in range(PROMPT_TOKENS)]
    names = []
    for name, params in _features(core).items():
        names.append(f"warm-up-{name}")
        request = EngineCoreRequest(
            request_id=names[-1],
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        core.add_request(*core.preprocess_add_request(request))
    deadline_s = time.monotonic() + DEADLINE_S
    while core.scheduler.has_requests() or core.batch_queue:
        _, executed = core.step_fn()
        core.post_step(executed)
        if not executed:
            time.sleep(0.001)  # a grammar compiles on another thread
        if time.monotonic() > deadline_s:
            core.abort_requests(names)
    core.reset_prefix_cache()


def _features(core: Any) -> dict[str, SamplingParams]:
    """Each of these compiles or loads something at its first use."""
    every: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    features = {
        "greedy": SamplingParams(temperature=0.0, **every),
        "seeded": SamplingParams(temperature=1.0, seed=1, top_k=8, top_p=0.9, **every),
        "logprobs": SamplingParams(temperature=0.0, logprobs=2, **every),
        "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.1, **every),
    }
    config = core.vllm_config
    if not config.model_config.skip_tokenizer_init:
        grammar = StructuredOutputsParams(regex="[a-z ]{1,64}")
        backend = config.structured_outputs_config.backend
        grammar._backend = "xgrammar" if backend == "auto" else backend
        features["grammar"] = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, structured_outputs=grammar)
    num_guesses = config.num_speculative_tokens
    return {
        name: params
        for name, params in features.items()
        if speculation.why_unservable(params, num_guesses, is_cpu=current_platform.is_cpu()) is None
    }
