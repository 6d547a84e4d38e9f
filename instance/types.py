"""What are the values an instance and its engine exchange?

Those that are made at every step are structs: made several times as fast as frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import msgspec

from migration.types import Description, RequestId


class RequestStatus(Enum):
    """Where a request stands in its engine."""

    RUNNING = "running"
    WAITING = "waiting"
    PREEMPTED = "preempted"
    MIGRATING_OUT = "migrating_out"
    """Stopped: out of the batch, its blocks still held."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What never changes while an engine lives."""

    model: str
    kv_fingerprint: str
    block_size: int
    total_blocks: int
    """Usable KV blocks."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int
    engine_version: str
    migration_refused_because: str | None
    """Why this engine can move no request at all (None: it can), such as an unknown vLLM version."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request on its way into the engine."""

    request_id: RequestId
    external_id: str
    priority: int
    num_prompt_tokens: int
    max_tokens: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a move without KV would have brought of a request whose owner is gone, for `reserve` and `commit`."""

    description: Description
    state: bytes


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request wants of its speed. Kept beside its stream: engines know nothing of it."""

    ttft_s: float | None
    """From its arrival at the gateway to its first token; None: it does not care."""
    tpot_s: float | None
    """Mean time of each further token."""
    waited_s: float
    """Since its arrival at the gateway, when it came here."""

    def after(self, seconds: float) -> Wishes:
        """The same, when it has waited so much longer."""
        return Wishes(self.ttft_s, self.tpot_s, self.waited_s + max(0.0, seconds))


NO_WISHES = Wishes(None, None, 0.0)


@dataclass(frozen=True, slots=True)
class EngineRefusal:
    reason: str
    final: bool
    """True: this engine could never run it."""


class EngineOutput(msgspec.Struct, frozen=True):
    """What one step gave one request."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    finish_reason: int | None
    stop_reason: int | str | None
    extra: tuple[bytes, ...]


class StepWork(msgspec.Struct, frozen=True):
    """What one step computes: all that its time is explained by (orchestrator/policy/steptime.py). A simulated engine
    tells several steps alike at once, as their sums."""

    num_prefill_tokens: int = 0
    """Of prompts, and of what is computed anew after a preemption."""
    num_decode_tokens: int = 0
    """One for each request that decodes; more where guesses are verified."""
    num_decoding: int = 0
    num_context_tokens: int = 0
    """KV tokens that the decoding requests had before this step: what their attention reads."""
    num_attended_pairs: int = 0
    """Over the chunks prefilled: tokens times the context before them, and half the square of the chunk."""
    num_steps: int = 1


NO_WORK = StepWork()


def step_work(chunks: Iterable[tuple[int, int, bool]]) -> StepWork:
    """Of a step that computes these: (tokens, KV tokens computed before, whether the request decodes)."""
    prefill = decode = decoding = context = pairs = 0
    for num_tokens, num_before, is_decoding in chunks:
        if is_decoding:
            decode, decoding, context = decode + num_tokens, decoding + 1, context + num_before
        else:
            prefill, pairs = prefill + num_tokens, pairs + num_tokens * num_before + num_tokens * num_tokens // 2
    return StepWork(prefill, decode, decoding, context, pairs)


class StepResult(msgspec.Struct, frozen=True):
    outputs: tuple[EngineOutput, ...]
    executed: bool
    """False: nothing was computed (no request could be scheduled)."""
    num_scheduled_tokens: int
    num_decoding: int
    work: StepWork = NO_WORK
    """Of the step whose time this call took: with asynchronous scheduling the one before that which it scheduled."""


class EngineLoad(msgspec.Struct, frozen=True):
    """The engine's load at a step boundary, in blocks."""

    free_blocks: int
    reserved_blocks: int
    num_running: int
    num_waiting: int
    running_by_priority: tuple[tuple[int, int], ...]
    head_of_line_blocks: int
    waiting_blocks: int
    num_preemptions: int


class RequestView(msgspec.Struct, frozen=True):
    """One request as its engine sees it."""

    request_id: RequestId
    external_id: str
    status: RequestStatus
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_blocks: int
    movable: bool


@dataclass(frozen=True, slots=True)
class CachedChanges:
    """What has changed in an engine's prefix cache, in order."""

    changes: tuple[tuple[bytes, bool], ...]
    """(hash of a full block, as `messages.CachedBlocks` has it; whether a block can be found by it now)."""
    is_anew: bool = False
    """What was told before is void: `changes` are all that is cached."""


class PriorityOutcome(Enum):
    """What became of a change of priority at one instance."""

    SET = "set"
    NOT_HERE = "not_here"
    """It has ended, has moved away, or was never here."""
    ON_THE_MOVE = "on_the_move"
    """It is stopped for a migration: what was exported can no longer be changed. Its owner can be asked afterwards."""
    UNSUPPORTED = "unsupported"
    """This engine does not schedule by priority."""


@dataclass(frozen=True, slots=True)
class PriorityAnswer:
    outcome: PriorityOutcome
    previous: int = 0
    status: RequestStatus | None = None
    """Where the request stood when its priority was set."""
    reason: str = ""
    """Why it was not."""


@dataclass(frozen=True, slots=True)
class CommittedRequest:
    """A request that has just been taken over, with what the agent must know to go on with its stream."""

    request_id: RequestId
    external_id: str
    num_output_tokens: int
    priority: int
    num_prompt_tokens: int
    max_tokens: int
