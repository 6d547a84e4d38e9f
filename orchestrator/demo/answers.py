"""What did a client see of one request, and how long did it wait where the request changed hands? Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished or failed request, as its client saw it; times are `time.monotonic()` of the client's process."""

    index: int
    request_id: str
    """The x-request-id that was sent; the engine's own id contains it."""
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    received_s: tuple[float, ...]
    """One a token; tokens of one chunk share theirs."""
    finish_reason: str | None
    error: str | None
    sent_s: float


@dataclass(frozen=True, slots=True)
class Move:
    """One migration that is over, as the orchestrator tells it."""

    migration_id: str
    request_id: str
    """The engine's id of the request."""
    source: str
    destination: str
    outcome: str
    reason: str
    moved_tokens: int
    """Settled tokens at the stop: prompt and output, all but the newest token."""
    num_blocks: int
    num_bytes: int
    stopped_s: float
    ended_s: float
    """`time.monotonic()` of the client's process when the move was first seen to be over."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """The gap a client saw between the last token of the source and the first of the destination."""

    index: int
    migration_id: str
    gap_s: float
    decode_step_s: float
    """Median gap between tokens of the same request around the hand-over."""

    @property
    def num_steps(self) -> float:
        return self.gap_s / self.decode_step_s if self.decode_step_s > 0 else 1.0


NEIGHBOURS = 16
"""Gaps on each side of a hand-over that say what a decode step took there."""


def hand_overs(answers: Sequence[Answer], moves: Sequence[Move]) -> tuple[HandOver, ...]:
    """One for each committed move of a request that was decoding, with tokens on both sides of the hand-over."""
    by_id = {answer.request_id: answer for answer in answers}
    found = (_hand_over(answer, move) for move in moves if (answer := _answer_of(move, by_id)) is not None)
    return tuple(hand_over for hand_over in found if hand_over is not None)


def is_running_move(move: Move, by_id: Mapping[str, Answer]) -> bool:
    """True when the request had put out a token before it was moved (it was running, not waiting)."""
    answer = _answer_of(move, by_id)
    return answer is not None and move.moved_tokens + 1 > answer.num_prompt_tokens


def _answer_of(move: Move, by_id: Mapping[str, Answer]) -> Answer | None:
    """The engine's id is the client's with a prefix and a suffix, so it is looked for piece by piece."""
    if move.outcome != "committed":
        return None
    pieces = move.request_id.split("-")
    for first in range(len(pieces)):
        for end in range(len(pieces), first, -1):
            answer = by_id.get("-".join(pieces[first:end]))
            if answer is not None:
                return answer
    return None


def _hand_over(answer: Answer, move: Move) -> HandOver | None:
    # The newest token at the stop is not settled yet, hence the 1; the next output token is the destination's first.
    offset = move.moved_tokens + 1 - answer.num_prompt_tokens
    if not 1 <= offset < len(answer.received_s):
        return None
    gaps = [later - sooner for sooner, later in zip(answer.received_s, answer.received_s[1:], strict=False)]
    around = gaps[max(0, offset - 1 - NEIGHBOURS) : offset - 1] + gaps[offset : offset + NEIGHBOURS]
    step_s = statistics.median(around) if around else 0.0
    return HandOver(answer.index, move.migration_id, gaps[offset - 1], step_s)
