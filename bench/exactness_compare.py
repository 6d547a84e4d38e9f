"""What did a run of a request put out, as far as a client can tell, and do two runs of it differ?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.serial_utils import MsgpackDecoder

from bench.exactness_kinds import Compared, Found, Plan
from bench.fleet import Stream
from instance.spec import MigrationSummary

FORBIDDEN = -1


class Row(NamedTuple):
    """Logprobs of one token: of itself first, then of the best ones."""

    ids: tuple[int, ...]
    values: tuple[float, ...]
    """float32, compared to the last bit."""
    rank: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one sequence put out, as far as a client can tell."""

    tokens: tuple[int, ...]
    finish: int | str | None
    stop: int | str | None
    text: str = ""
    logprobs: tuple[Row, ...] = ()
    """Of each token, of as many alternatives as were asked for."""
    prompt_logprobs: tuple[bytes, ...] = ()
    num_prefill_reports: int = 1


@dataclass(frozen=True, slots=True)
class Leg:
    """One hop of one sequence, as it is ordered."""

    sequence: int
    source: int
    mode: str
    status: str
    """In its engine just before, where the kind is about that."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A leg that committed."""

    leg: Leg
    tokens: int
    """Of output that the client had when the move was ordered."""
    summary: MigrationSummary


@dataclass(slots=True)
class Ran:
    """One run of a request."""

    seen: tuple[Seen, ...] = ()
    streams: list[Stream] = field(default_factory=list)
    moves: list[Moved] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    """Reasons for which a move did not take place (it is tried again)."""
    faults: list[str] = field(default_factory=list)
    """Reasons for which a move was broken off, by a copy that failed, say (it is tried again, and the request compared
    all the same)."""
    num_cached_here: int = 0
    lost: int = 0
    doubled: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Compound:
    """The runs of one request."""

    plan: Plan
    moved: Ran
    unmoved: Ran
    """In the same traffic as `moved`, but left where it was."""
    alone: Ran | None
    """With nothing else in its instance."""

    @property
    def difference(self) -> str | None:
        """Of the moved run from an undisturbed one; from the one alone, if there is one."""
        return difference(self.alone or self.unmoved, self.moved, self.plan.kind.compared)

    @property
    def unmoved_difference(self) -> str | None:
        """Of the unmoved run from the one alone: what vLLM's own batching does."""
        return None if self.alone is None else difference(self.alone, self.unmoved, self.plan.kind.compared)


def read(plan: Plan, ran: Ran, streams: Sequence[Stream]) -> None:
    """Decode what came for a run: outside of the traffic, which it would hold up."""
    ran.doubled = sum(stream.repeated for stream in streams)
    outputs = [_outputs(stream) for stream in streams]
    if plan.kind.compared is not Compared.TEXT and not ran.error:
        num_logprobs = plan.sampling.get("logprobs", 0)
        ran.seen = tuple(_seen(stream, found, num_logprobs) for stream, found in zip(streams, outputs, strict=True))
    stats = [output.prefill_stats for found in outputs for output in found if output.prefill_stats is not None]
    ran.num_cached_here = max((found.num_cached_tokens for found in stats), default=0)


def _outputs(stream: Stream) -> list[EngineCoreOutput]:
    decoder = MsgpackDecoder(EngineCoreOutput, share_mem=False)
    return [decoder.decode(bytearray(entry.extra[0])) for _, entry in sorted(stream.extras.items())]


def _seen(stream: Stream, outputs: Sequence[EngineCoreOutput], num_logprobs: int) -> Seen:
    logprobs: list[Row] = []
    prompt_logprobs: list[bytes] = []
    for output in outputs:
        if output.new_logprobs is not None:
            # vLLM sends as many alternatives as the neediest request of the batch asked for; a client sees its own.
            ids, values, ranks, _ = output.new_logprobs
            end = num_logprobs + 1
            rows = zip(ids[:, :end].tolist(), values[:, :end].tolist(), ranks.tolist(), strict=True)
            logprobs += [_row(of_ids, of_values, rank) for of_ids, of_values, rank in rows]
        if output.new_prompt_logprobs_tensors is not None:
            tensors = output.new_prompt_logprobs_tensors
            prompt_logprobs += [tensors.logprob_token_ids.numpy().tobytes(), tensors.logprobs.numpy().tobytes()]
    tokens = tuple(token.token_id for token in stream.tokens)
    last = stream.last
    finish, stop = (None, None) if last is None else (last.finish_reason, last.stop_reason)
    num_prefill_reports = sum(output.prefill_stats is not None for output in outputs)
    return Seen(tokens, finish, stop, "", tuple(logprobs), tuple(prompt_logprobs), num_prefill_reports)


def _row(ids: Sequence[int], values: Sequence[float], rank: int) -> Row:
    """Alternatives of logprob -inf are forbidden tokens (by a grammar, say): which of them vLLM names depends on how
    many alternatives the others in the batch ask for."""
    named = (token if math.isfinite(value) else FORBIDDEN for token, value in zip(ids[1:], values[1:], strict=True))
    return Row((ids[0], *named), tuple(values), rank)


def difference(expected: Ran, got: Ran, compared: Compared) -> str | None:
    """The first thing in which two runs differ, or None."""
    if expected.error or got.error:
        return got.error or f"undisturbed: {expected.error}"
    if len(expected.seen) != len(got.seen):
        return f"{len(got.seen)} sequences, expected {len(expected.seen)}"
    for number, (right, here) in enumerate(zip(expected.seen, got.seen, strict=True)):
        told = _difference(right, here, compared)
        if told is not None:
            return told if len(got.seen) == 1 else f"sequence {number}: {told}"
    return None


def _difference(right: Seen, here: Seen, compared: Compared) -> str | None:
    for at, (wanted, token) in enumerate(itertools.zip_longest(right.tokens, here.tokens)):
        if wanted != token:
            return f"token {at} of {len(right.tokens)} is {token}, not {wanted}"
    for name in ("finish", "stop", "text"):
        if getattr(right, name) != getattr(here, name):
            return f"{name} is {getattr(here, name)!r}, not {getattr(right, name)!r}"
    if compared is not Compared.EVERYTHING:
        return None
    for at, (row, other) in enumerate(itertools.zip_longest(right.logprobs, here.logprobs)):
        if row != other:
            return f"logprobs of token {at} of {len(right.tokens)} differ: {other}, not {row}"
    if right.prompt_logprobs != here.prompt_logprobs:
        return "prompt logprobs differ"
    if right.num_prefill_reports != here.num_prefill_reports:
        return f"{here.num_prefill_reports} prefill reports, not {right.num_prefill_reports}"
    return None


def was_found(plan: Plan, ran: Ran) -> bool:
    """Whether the first move of a sequence found the request in the state its kind is about."""
    for moved in ran.moves:
        settled, has_output = moved.summary.moved_tokens, moved.tokens > 0
        match plan.kind.found:
            case Found.ANY:
                is_so = True
            case Found.HALF_COMPUTED:
                is_so = 0 < settled < len(plan.prompt)
            case Found.WAITING:
                is_so = settled == 0 and not has_output
            case Found.UNCOMPILED:
                is_so = moved.leg.status == "waiting" and not has_output
            case Found.PREEMPTED:
                is_so = settled == 0 and has_output
            case Found.CACHED_THERE:
                is_so = moved.summary.cached_tokens > 0
            case Found.CACHED_HERE:
                is_so = ran.num_cached_here > 0
        if is_so:
            return True
    return False
