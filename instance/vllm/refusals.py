"""Why may a request not be moved? Every reason that this engine has, asked before anything is changed."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request, RequestStatus

from instance.types import EngineFacts, EngineRefusal, Submission
from instance.vllm import images, speculation
from instance.vllm.codec import CodecError, decode_request
from instance.vllm.handshake import why_refused
from migration.types import Description

MAX_SUBMISSION_BYTES = 32 << 20
"""A larger one (many or very large images) stays where it is: it would cross in one message, of which at most 64 MiB
are read, and both ends copy it between two steps."""


def read(submission: Submission) -> EngineCoreRequest | EngineRefusal:
    """The request that was submitted."""
    try:
        request = decode_request(submission.payload)
    except CodecError as error:
        return EngineRefusal(str(error), final=True)
    if request.request_id != submission.request_id:
        return EngineRefusal("the payload is of another request", final=True)
    return request


def why_unmovable(request: Request, images_refused: str | None = None, num_guesses: int = 0) -> str | None:
    """One line that says why this request cannot be moved (now), or None. `images_refused`: what
    `images.why_never_movable` says of this engine; `num_guesses`: at most so many tokens are guessed ahead."""
    params = request.sampling_params
    if params is None:
        return "it is a pooling request"
    is_prefilling = 0 < request.num_computed_tokens < request.num_prompt_tokens
    # Its logprobs so far are the runner's, which keeps them over a preemption.
    is_prefilling |= request.status == RequestStatus.PREEMPTED and not request.num_output_tokens
    asks_prompt_logprobs = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    facts = (
        (request.resumable, "it is a streaming session"),
        (request.kv_transfer_params is not None, "its KV is moved by a KV connector"),
        (request.ec_transfer_params is not None, "its encoder outputs are moved by a connector"),
        (request.status == RequestStatus.WAITING_FOR_REMOTE_KVS, "its KV is being loaded from elsewhere"),
        (request.prompt_embeds is not None, "its prompt is embeddings"),
        (request.prompt_token_ids is None, "it has no prompt tokens"),
        (_is_loaded_anew(request), "its LoRA adapter is loaded anew with every step"),
        (asks_prompt_logprobs and is_prefilling, "its prompt logprobs are not complete yet"),
        (params.thinking_token_budget is not None, "its thinking is budgeted, which no test has moved yet"),
    )
    reason = next((reason for is_so, reason in facts if is_so), None) or speculation.why_unmovable(request, num_guesses)
    if reason is not None or not request.mm_features:
        return reason
    return images_refused or images.why_unmovable(request.mm_features, request.lora_request is not None)


def why_too_large(payload: bytes) -> str | None:
    """The same for the request as it was submitted."""
    if len(payload) <= MAX_SUBMISSION_BYTES:
        return None
    return f"its submission of {len(payload)} bytes is larger than the {MAX_SUBMISSION_BYTES} that are moved"


def why_not_here(facts: EngineFacts, scheduler: Any, description: Description) -> str | None:
    """One line that says why this engine can take no such request in, or not this one again, or None."""
    request_id = description.request_id
    incompatible = why_refused(description.kv_fingerprint, facts.kv_fingerprint)
    reasons = (
        (facts.migration_refused_because is not None, str(facts.migration_refused_because)),
        (incompatible is not None, str(incompatible)),
        (description.block_size != facts.block_size, "its blocks have another size"),
        (request_id in scheduler.requests, "the request is here already"),
        (request_id in getattr(scheduler, "ferry_in", ()), "the request is on its way here already"),
        (is_in_flight(scheduler, request_id), "a step of its last stay here is in flight"),
    )
    return next((reason for is_so, reason in reasons if is_so), None)


def is_in_flight(scheduler: Any, request_id: str) -> bool:
    """Whether a step of it is in flight though it has gone (aborted): vLLM gives outputs to whoever has the id then."""
    if request_id in scheduler.requests or not hasattr(scheduler, "ferry_steps"):
        return False
    return bool(scheduler.ferry_steps.holds(request_id))


def _is_loaded_anew(request: Request) -> bool:
    return request.lora_request is not None and bool(request.lora_request.load_inplace)
