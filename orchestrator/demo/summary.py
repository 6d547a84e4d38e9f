"""What came out of a demo, and do its bars hold? Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.demo.answers import Answer, HandOver, Move, hand_overs, is_running_move
from orchestrator.demo.check import Comparison, compare
from orchestrator.demo.options import Bars
from orchestrator.demo.result import quantile
from orchestrator.demo.watch import Drain


@dataclass(frozen=True, slots=True)
class Passed:
    """One run over: what its clients got and what moved meanwhile."""

    answers: tuple[Answer, ...]
    moves: tuple[Move, ...]
    drains: tuple[Drain, ...]
    took_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and samples of both runs."""

    num_requests: int
    num_tokens: int
    outcomes: tuple[tuple[str, int], ...]
    """(outcome, migrations that ended so), the most frequent first."""
    num_running_moves: int
    """Committed migrations of requests that had put out a token."""
    hand_overs: tuple[HandOver, ...]
    stopped_s: tuple[float, ...]
    """From the stop at the source to the commit's answer, one a committed migration."""
    num_blocks: int
    num_bytes: int
    errors: tuple[str, ...]
    """One for each failed request of both runs."""
    comparison: Comparison
    drains: tuple[Drain, ...]
    num_replay_moves: int
    """Migrations during the undisturbed run: must be 0, or it was none."""
    moved_s: float
    undisturbed_s: float

    @property
    def drain_s(self) -> float | None:
        """The slowest drain; None when there was none, or one did not end."""
        times = [drain.drain_s for drain in self.drains]
        done = [drain_s for drain_s in times if drain_s is not None]
        return max(done) if done and len(done) == len(times) else None

    def figures(self) -> dict[str, float | int | None]:
        gaps_ms = [hand_over.gap_s * 1e3 for hand_over in self.hand_overs]
        steps = [hand_over.num_steps for hand_over in self.hand_overs]
        return {
            "committed_migrations": self.num_running_moves,
            "mismatched_tokens": self.comparison.mismatched_tokens,
            "client_errors": len(self.errors),
            "drain_s": self.drain_s,
            "downtime_p50_ms": quantile(gaps_ms, 50),
            "downtime_p99_ms": quantile(gaps_ms, 99),
            "downtime_p50_steps": quantile(steps, 50),
            "downtime_p99_steps": quantile(steps, 99),
            "compared_answers": self.comparison.num_answers,
            "compared_tokens": self.comparison.num_tokens,
        }


def summarise(moved: Passed, undisturbed: Passed) -> Summary:
    by_id = {answer.request_id: answer for answer in moved.answers}
    committed = [move for move in moved.moves if move.outcome == "committed"]
    return Summary(
        num_requests=len(moved.answers),
        num_tokens=sum(len(answer.token_ids) for answer in moved.answers),
        outcomes=tuple(Counter(move.outcome for move in moved.moves).most_common()),
        num_running_moves=sum(is_running_move(move, by_id) for move in committed),
        hand_overs=hand_overs(moved.answers, committed),
        stopped_s=tuple(move.stopped_s for move in committed),
        num_blocks=sum(move.num_blocks for move in committed),
        num_bytes=sum(move.num_bytes for move in committed),
        errors=_errors(moved.answers) + _errors(undisturbed.answers),
        comparison=compare(moved.answers, undisturbed.answers),
        drains=moved.drains,
        num_replay_moves=sum(move.outcome == "committed" for move in undisturbed.moves),
        moved_s=moved.took_s,
        undisturbed_s=undisturbed.took_s,
    )


def _errors(answers: Sequence[Answer]) -> tuple[str, ...]:
    return tuple(f"{answer.request_id}: {answer.error}" for answer in answers if answer.error is not None)


def failures(summary: Summary, bars: Bars) -> tuple[str, ...]:
    """Why the demo fails, one line each; empty when every bar holds."""
    found: list[str] = []
    if summary.num_running_moves < bars.min_committed_migrations:
        found.append(
            f"only {summary.num_running_moves} running requests were moved, not {bars.min_committed_migrations}"
        )
    if summary.comparison.mismatched_tokens > bars.max_mismatched_tokens:
        where = ", ".join(
            f"request {difference.index} from output token {difference.first_offset}"
            for difference in summary.comparison.differences[:5]
        )
        found.append(f"{summary.comparison.mismatched_tokens} tokens differ from the undisturbed run: {where}")
    if len(summary.errors) > bars.max_client_errors:
        found.append(f"{len(summary.errors)} requests failed; the first: {summary.errors[0]}")
    if summary.drain_s is None:
        found.append(
            "no instance was drained"
            if not summary.drains
            else "a drained instance was not empty when the demo gave up"
        )
    elif summary.drain_s > bars.max_drain_s:
        found.append(f"the slowest drain took {summary.drain_s:.1f} s, at most {bars.max_drain_s:g} s are allowed")
    if summary.num_replay_moves:
        found.append(f"{summary.num_replay_moves} requests moved during the run that was to be undisturbed")
    if summary.comparison.not_compared and not summary.errors:
        found.append(f"{len(summary.comparison.not_compared)} answers could not be compared")
    return tuple(found)
