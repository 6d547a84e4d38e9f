"""May a request that comes from another instance be taken in? What its state must be, before anything is changed."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from instance.vllm import speculation
from instance.vllm.codec import RequestState, why_malformed


def why_uncommittable(core: EngineCore, block_size: int, request: Request, state: RequestState) -> str | None:
    """Checks the state against the reservation, then appends its output and replays its grammar, which can only be done
    once: whatever is refused is not to be committed again."""
    scheduler: Any = core.scheduler
    known = list(request.output_token_ids)
    if state.output_token_ids[: len(known)] != known:
        return "its output does not continue the described one"
    vocab_size = core.vllm_config.model_config.get_vocab_size()
    if (inconsistent := _why_inconsistent(request, state, scheduler.max_model_len, vocab_size)) is not None:
        return inconsistent
    held = min((len(group) for group in scheduler.ferry_block_table(request.request_id)), default=0)
    if -(-state.computed_tokens // block_size) > held:
        return f"its KV does not fit into the {held} blocks reserved"
    if (unverifiable := speculation.why_uncommittable(scheduler, request, state)) is not None:
        return unverifiable
    malformed = why_malformed(state, core.vllm_config.device_config.device_type)
    if malformed is not None or not request.use_structured_output or not state.output_token_ids:
        return malformed
    # A reasoning parser may look for the end of the reasoning in what the request has put out.
    request.append_output_token_ids(state.output_token_ids[len(known) :])
    structured = request.structured_output_request
    grammar = None if structured is None else structured.grammar
    if grammar is None or isinstance(grammar, Exception):
        return "its grammar is not compiled"
    if not scheduler.structured_output_manager.accept_tokens(request, list(state.output_token_ids)):
        return "its grammar does not accept its output"
    return None


def _why_inconsistent(request: Request, state: RequestState, max_model_len: int, vocab_size: int) -> str | None:
    """What no engine exports, and what would end this one with its next step or change the request's tokens."""
    num_tokens = request.num_prompt_tokens + len(state.output_token_ids)
    has_history = bool(state.output_token_ids or state.computed_tokens or state.draft_token_ids)
    token_ids = (*state.output_token_ids, *state.draft_token_ids)
    facts = (
        (not 0 <= state.computed_tokens <= num_tokens, "it has computed more tokens than it has"),
        (num_tokens >= max_model_len, f"its {num_tokens} tokens do not fit into a context of {max_model_len} here"),
        (not state.has_run and has_history, "it has not run, and comes with tokens"),
        (any(not 0 <= token < vocab_size for token in token_ids), f"it has a token outside the {vocab_size} there are"),
        (
            state.prefill_stats is not None and bool(state.output_token_ids),
            "it comes with output, and its prefill is not reported",
        ),
    )
    return next((reason for is_so, reason in facts if is_so), None)
