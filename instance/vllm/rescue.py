"""What does an engine need to go on with a request whose owner is gone? Its submission and its output; no more.

What a migration exports beside is either made anew (KV, the grammar's position) or a function of these: a seeded
sampler has drawn once for each token.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.sampling_params import SamplingType

from instance.types import EngineFacts, EngineRefusal, Rescue, Submission
from instance.vllm.codec import (
    STATE_VERSION,
    DescribedRequest,
    RequestState,
    encode_described,
    encode_state,
)
from instance.vllm.lora import Adapters
from instance.vllm.refusals import read
from migration.types import Description

GeneratorAfter = Callable[[int, int], bytes | None]
"""(seed, number of tokens) -> state of the sampler's generator; None: this runner keeps none."""


def rescue_of(
    facts: EngineFacts,
    adapters: Adapters,
    submission: Submission,
    output_token_ids: tuple[int, ...],
    generator_after: GeneratorAfter,
) -> Rescue | EngineRefusal:
    """See `Engine.rescue`. What it may not be is found by `reserve` and `commit`, as for one that moves here."""
    request = read(submission)
    if isinstance(request, EngineRefusal):
        return request
    adapter = adapters.load(request.lora_request) or adapters.identity(request.lora_request)
    if isinstance(adapter, str):
        return EngineRefusal(adapter, final=True)
    params = request.sampling_params
    is_seeded = params is not None and params.sampling_type == SamplingType.RANDOM_SEED
    output = list(output_token_ids)
    described = DescribedRequest(
        STATE_VERSION, submission.external_id, submission.payload, output, submission.priority, adapter
    )
    description = Description(
        submission.request_id, encode_described(described), 0, facts.kv_fingerprint, facts.block_size, 0
    )
    state = RequestState(
        version=STATE_VERSION,
        output_token_ids=output,
        computed_tokens=0,
        has_run=True,
        num_preemptions=0,
        stop_reason=None,
        prefill_stats=None,
        num_nans_in_logits=0,
        priority=submission.priority,
        generator=generator_after(params.seed, len(output)) if is_seeded else None,
        draft_token_ids=[],
    )
    return Rescue(description, encode_state(state))
