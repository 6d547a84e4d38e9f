"""What is predicted of one instance as it stands, and with one request more or fewer? The formulas of `slo.py`.

Gateways ask about one newcomer on every instance, and have columns for that. A move asks about a few instances, before
and after it, also about those that are there already: so here an instance is a value, of which others are made.
Three things are taken more carefully than for a newcomer: what is reserved counts as context, since it is for requests
on their way; the attention of the prompts in a queue is that of each, where they are known; and of what waits, only as
much joins the batch as there is room for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from instance.messages import WIDE_STEP_TOKENS, LoadReport
from migration.types import InstanceId
from orchestrator.policy.slo import SloParams

Speed = tuple[float, ...]
"""Coefficients of a step-time model (`steptime.py`): seconds a unit of each term."""
Speeds = Mapping[InstanceId, Speed | npt.NDArray[np.float64]]
"""As they were learned: most are only ever looked at as columns."""
EXPECTED_OUTPUT_TOKENS = SloParams().expected_output_tokens


class Ahead(NamedTuple):
    """What is computed before the first token of a request, beside the request itself."""

    num_requests: int = 0
    num_tokens: float = 0.0
    num_pairs: float = 0.0
    """Of the attention over their prompts: half the square of each."""

    def and_one(self, num_tokens: int) -> Ahead:
        return Ahead(self.num_requests + 1, self.num_tokens + num_tokens, self.num_pairs + num_tokens**2 / 2.0)


NOBODY = Ahead()


class Standing(NamedTuple):
    """An instance: how fast it is, and what is on it."""

    speed: Speed
    num_running: float
    num_context_tokens: float
    """Of those that run, and of those that are on their way and will."""
    num_free_tokens: float
    """Room in its memory; what waits there has none of it yet."""
    num_waiting: float
    num_waiting_tokens: float
    max_running: float
    max_step_tokens: float

    def queue(self) -> Ahead:
        """All that waits there, as far as a load report tells: prompts of equal length."""
        tokens = self.num_waiting_tokens
        return Ahead(int(self.num_waiting), tokens, tokens * tokens / max(2.0, 2.0 * self.num_waiting))

    def tpot_s(self) -> float:
        """Time of a decode step of everything that runs there, and waits and has room: of each, from token to token."""
        waiting, fits = self.num_waiting_tokens, 1.0
        if waiting > max(0.0, self.num_free_tokens):
            fits = max(0.0, self.num_free_tokens) / waiting
        batch = min(self.num_running + fits * self.num_waiting, self.max_running)
        return self._step_s(batch, self.num_context_tokens + fits * waiting)

    def first_token_s(self, ahead: Ahead, num_prompt_tokens: int) -> float:
        """Until the first token of a request that waits there behind `ahead`."""
        base, per_token, per_wide, per_decode, per_context, per_pair = self.speed
        running = self.num_running
        tokens = ahead.num_tokens + max(1, num_prompt_tokens)
        num_steps = max(1.0, math.ceil(tokens / max(1.0, self.max_step_tokens - running)))
        wide = max(0.0, tokens - num_steps * (WIDE_STEP_TOKENS - running))
        decode_s = base + (per_token + per_decode) * running + per_context * self.num_context_tokens
        seconds = num_steps * decode_s + per_token * tokens + per_wide * wide
        seconds += per_pair * (ahead.num_pairs + num_prompt_tokens**2 / 2.0)
        return seconds + self._until_room_s(ahead, num_prompt_tokens)

    def _until_room_s(self, ahead: Ahead, num_prompt_tokens: int) -> float:
        """Until enough of those that run have ended, each after `EXPECTED_OUTPUT_TOKENS` on average."""
        running = self.num_running
        if running <= 0:
            return 0.0
        short = ahead.num_tokens + num_prompt_tokens + 1.0 - self.num_free_tokens
        ends = max(
            short * running / max(1.0, self.num_context_tokens), running + ahead.num_requests + 1.0 - self.max_running
        )
        step_s = self._step_s(running, self.num_context_tokens)
        return max(0.0, ends) * EXPECTED_OUTPUT_TOKENS * step_s / running

    def _step_s(self, batch: float, num_context_tokens: float) -> float:
        base, per_token, per_wide, per_decode, per_context, _ = self.speed
        seconds = base + (per_token + per_decode) * batch + per_context * num_context_tokens
        return seconds + per_wide * max(0.0, batch - WIDE_STEP_TOKENS)

    def least_tokens(self, seconds: float) -> float:
        """Of one that runs, for a decode step to become so much shorter without it; fewer are certainly not enough."""
        _, per_token, per_wide, per_decode, per_context, _ = self.speed
        others_s = 0.999 * seconds - per_token - per_wide - per_decode
        return others_s / per_context if per_context > 0.0 else 0.0

    # ---- one more, or one fewer
    def with_running(self, num_tokens: int, change: int = 1) -> Standing:
        """`change`: -1 for one fewer."""
        speed, running, context, free, *others = self
        tokens = change * num_tokens
        return Standing(speed, max(0.0, running + change), max(0.0, context + tokens), free - tokens, *others)

    def without_running(self, num_tokens: int) -> Standing:
        return self.with_running(num_tokens, -1)

    def with_waiting(self, num_tokens: int, change: int = 1) -> Standing:
        speed, running, context, free, waiting, tokens, *limits = self
        tokens = max(0.0, tokens + change * num_tokens)
        return Standing(speed, running, context, free, max(0.0, waiting + change), tokens, *limits)

    def without_waiting(self, num_tokens: int) -> Standing:
        return self.with_waiting(num_tokens, -1)


def standing_of(load: LoadReport, speed: Speed) -> Standing:
    size, waiting_blocks = load.block_size, max(load.waiting_blocks, load.head_of_line_blocks)
    return Standing(
        speed,
        load.num_running,
        (load.total_blocks - load.free_blocks) * size,
        load.free_blocks * size,
        load.num_waiting,
        waiting_blocks * size,
        load.max_running or math.inf,
        load.max_step_tokens or math.inf,
    )
