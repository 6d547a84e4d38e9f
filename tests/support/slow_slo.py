"""When would a request get its first token on one instance? The formula of orchestrator/policy/slo.py, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from instance.messages import WIDE_STEP_TOKENS, LoadReport


def step_s(per: Sequence[float], prefill: float, decoding: float, context: float) -> float:
    base, per_token, per_wide, per_decode, per_context, _ = per
    seconds = base + per_token * (prefill + decoding) + per_decode * decoding + per_context * context
    if prefill + decoding > WIDE_STEP_TOKENS:
        seconds += per_wide * (prefill + decoding - WIDE_STEP_TOKENS)
    return seconds


def predicted_ttft_s(
    report: LoadReport,
    per: Sequence[float],
    num_unseen: int,
    unseen_blocks: int,
    num_prompt_tokens: int,
    *,
    expected_output_tokens: float,
    saved_tokens: int = 0,
) -> float:
    size, running = report.block_size, report.num_running
    held_blocks = report.total_blocks - report.free_blocks - report.reserved_blocks
    waiting_blocks = max(report.waiting_blocks, report.head_of_line_blocks)
    total_s = 0.0

    # Until there is room: requests that run end one after the other.
    if running:
        blocks_short = waiting_blocks + unseen_blocks + (num_prompt_tokens + 1) / size - report.free_blocks
        ends = 0.0
        if blocks_short > 0:
            each_holds = max(1.0, held_blocks * size) / running
            ends = blocks_short * size / each_holds
        if report.max_running:
            places_short = running + report.num_waiting + num_unseen + 1 - report.max_running
            ends = max(ends, float(places_short))
        total_s += ends * expected_output_tokens * step_s(per, 0, running, held_blocks * size) / running

    # Then prompts, those before it first, beside what decodes.
    before = (waiting_blocks + unseen_blocks) * size
    computed = range(saved_tokens, num_prompt_tokens)
    left = before + max(1, len(computed))
    num_steps = 1
    if report.max_step_tokens:
        num_steps = math.ceil(left / max(1, report.max_step_tokens - running))
    for _ in range(num_steps):
        total_s += step_s(per, left / num_steps, running, held_blocks * size)
    num_before = report.num_waiting + num_unseen
    each = before / max(1, num_before)
    total_s += per[5] * (max(1, num_before) * each * each / 2 + sum(before_it + 0.5 for before_it in computed))
    return total_s


def predicted_tpot_s(
    report: LoadReport, per: Sequence[float], num_unseen: int, unseen_blocks: int, num_prompt_tokens: int
) -> float:
    held_blocks = report.total_blocks - report.free_blocks - report.reserved_blocks
    waiting_blocks = max(report.waiting_blocks, report.head_of_line_blocks)
    batch = report.num_running + report.num_waiting + num_unseen + 1
    if report.max_running:
        batch = min(batch, report.max_running)
    context = (held_blocks + waiting_blocks + unseen_blocks) * report.block_size + num_prompt_tokens
    return step_s(per, 0, batch, context)
