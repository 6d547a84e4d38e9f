"""May a request that comes from another instance be taken in? What its state must be, before anything is changed."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from instance.vllm import speculation
from instance.vllm.codec import RequestState, why_malformed


def why_uncommittable(core: EngineCore, block_size: int, request: Request, state: RequestState) -> str | None:
    """Checks the state against the reservation; replays the grammar, which can only be done once."""
    scheduler: Any = core.scheduler
    known = list(request.output_token_ids)
    num_tokens = request.num_prompt_tokens + len(state.output_token_ids)
    if state.output_token_ids[: len(known)] != known:
        return "its output does not continue the described one"
    if not 0 <= state.computed_tokens <= num_tokens:
        return "it has computed more tokens than it has"
    held = min((len(group) for group in scheduler.ferry_block_table(request.request_id)), default=0)
    if -(-state.computed_tokens // block_size) > held:
        return f"its KV does not fit into the {held} blocks reserved"
    if (unverifiable := speculation.why_uncommittable(scheduler, request, state)) is not None:
        return unverifiable
    malformed = why_malformed(state, core.vllm_config.device_config.device_type)
    if malformed is not None or not request.use_structured_output or not state.output_token_ids:
        return malformed
    structured = request.structured_output_request
    grammar = None if structured is None else structured.grammar
    if grammar is None or isinstance(grammar, Exception):
        return "its grammar is not compiled"
    if not scheduler.structured_output_manager.accept_tokens(request, list(state.output_token_ids)):
        return "its grammar does not accept its output"
    return None
