"""What are the values an instance and its engine exchange?"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migration.types import RequestId


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
class EngineRefusal:
    reason: str
    final: bool
    """True: this engine could never run it."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step gave one request."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    finish_reason: int | None
    stop_reason: int | str | None
    extra: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    outputs: tuple[EngineOutput, ...]
    executed: bool
    """False: nothing was computed (no request could be scheduled)."""
    num_scheduled_tokens: int
    num_decoding: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's load at a step boundary, in blocks."""

    free_blocks: int
    reserved_blocks: int
    num_running: int
    num_waiting: int
    running_by_priority: tuple[tuple[int, int], ...]
    head_of_line_blocks: int
    waiting_blocks: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class RequestView:
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
