"""What does the source of a migration do at each event? A pure machine over `SOURCE_TABLE`: events in, effects out.

It owns the request until the destination answers `Commit`. Before `Commit` is sent every failure ends in a `Cancel`,
and a stopped request is resumed; afterwards only `Committed`, `Refused` or the agent's `DestinationLost` decide, never
a time-out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.effects import SourceEffect
from migration.ending import DECLINED, Ending, Pending
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.events import SourceEvent, Timer
from migration.params import MigrationParams, Mode
from migration.stages import Landing, StopReason, next_push, num_blocks_for, num_full_blocks, tail_blocks
from migration.table import SOURCE_TABLE, SourceState
from migration.types import (
    BlockRange,
    CopyReceipt,
    Description,
    Migration,
    MigrationReport,
    Outcome,
    Progress,
    StageReport,
    StoppedRequest,
)

S = SourceState
_MESSAGES = (msg.Reserved, msg.Refused, msg.Grown, msg.Prepared, msg.Committed, msg.Cancelled)


@dataclass(slots=True)
class SourceMachine:
    """One migration at its source. Every field is an immutable value, so a copy of the machine is a snapshot of it."""

    migration: Migration
    params: MigrationParams
    state: SourceState = S.IDLE
    description: Description | None = None
    endpoints: tuple[str, ...] = ()
    num_cached_tokens: int = 0
    num_held_blocks: int = 0
    """Blocks the destination has said it holds."""
    landing: Landing = field(default_factory=Landing)
    progress: Progress | None = None
    copying: BlockRange | None = None
    copy_started_s: float = 0.0
    tail: StageReport | None = None
    stopped: StoppedRequest | None = None
    ending: Ending | None = None
    is_commit_sent: bool = False
    is_client_gone: bool = False
    started_s: float = 0.0
    stopped_s: float | None = None
    answered_s: float | None = None
    ended_s: float | None = None

    @property
    def is_done(self) -> bool:
        return self.state is S.DONE

    @property
    def stages(self) -> tuple[StageReport, ...]:
        return self.landing.stages

    def on(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        """Take one event. Raises `RemoteProtocolError` / `LocalProtocolError`, changing nothing, if the table has no
        entry.
        """
        if (self.state, type(event)) not in SOURCE_TABLE:
            error = RemoteProtocolError if isinstance(event, _MESSAGES) else LocalProtocolError
            raise error(f"source: {type(event).__name__} in state {self.state.name}")
        if self.ending is not None:
            self.is_client_gone |= isinstance(event, ev.ClientAborted)
            self.ending, effects = self.ending.on(event)
            return self._end_if_over(effects, now_s)
        match event:
            case ev.ClientAborted() | ev.Withdrawn() | ev.DestinationLost() | ev.SendFailed() | ev.EngineFailed():
                return self._on_interruption(event, now_s)
            case msg.Refused(reason=reason):
                return self._close(Outcome.REFUSED, reason, now_s, tell=False)
            case ev.TimerFired(timer):
                return self._on_timer(timer, now_s)
            case ev.RequestGone():
                return self._close(Outcome.FINISHED_AT_SOURCE, "it ended before it was stopped", now_s)
            case ev.RequestUnmovable(reason):
                return self._close(Outcome.REFUSED, reason, now_s)
            case ev.CopyBroken(reason):
                return self._close(Outcome.FAULT, f"copy: {reason}", now_s)
            case _:
                return self._on_progress(event, now_s)

    def _on_progress(self, event: SourceEvent, now_s: float) -> list[SourceEffect]:
        """The straight way from the start to the commit."""
        match event:
            case ev.Started():
                self.state, self.started_s = S.DESCRIBING, now_s
                return [ef.SetTimer(Timer.DEADLINE, self.params.deadline_s), ef.DescribeRequest()]
            case ev.RequestDescribed(description):
                return self._reserve(description)
            case msg.Reserved():
                return self._on_reserved(event)
            case msg.Prepared() if self.state is S.PREPARING:
                self.state = S.PROBING
                return [ef.SetTimer(Timer.RESEND, self.params.keepalive_s), ef.ReadProgress()]
            case ev.ProgressRead(progress):
                return self._on_look(progress, now_s)
            case msg.Grown(num_blocks=num_blocks):
                return self._on_grown(num_blocks, now_s)
            case ev.BlocksCopied(receipt):
                return self._on_copied(receipt, now_s)
            case ev.StopGranted(stopped):
                return self._on_stopped(stopped, now_s)
            case ev.StopDeclined():
                return self._on_stop_declined(event, now_s)
            case msg.Committed():
                self.answered_s = now_s
                return self._close(Outcome.COMMITTED, "", now_s, tell=False)
            case msg.Prepared():
                return []  # a repetition
            case _:
                raise AssertionError(
                    f"the table allows {type(event).__name__} in {self.state.name}, the machine does not"
                )

    def _on_interruption(
        self,
        event: ev.ClientAborted | ev.Withdrawn | ev.DestinationLost | ev.SendFailed | ev.EngineFailed,
        now_s: float,
    ) -> list[SourceEffect]:
        if isinstance(event, ev.ClientAborted):
            self.is_client_gone = True
        if isinstance(event, ev.DestinationLost):
            outcome = Outcome.ABORTED_BY_CLIENT if self.is_client_gone else Outcome.DESTINATION_LOST
            return self._close(outcome, "the destination's epoch ended", now_s, tell=False)
        if self.state is S.COMMITTING:
            return []  # the destination may own the request: only it can tell
        match event:
            case ev.ClientAborted():
                return self._close(Outcome.ABORTED_BY_CLIENT, "aborted by the client", now_s)
            case ev.Withdrawn(reason):
                return self._close(Outcome.REFUSED, f"withdrawn by the source: {reason}", now_s)
            case ev.SendFailed(reason):
                return self._close(Outcome.DESTINATION_LOST, f"unreachable: {reason}", now_s)
            case ev.EngineFailed(reason):
                return self._close(Outcome.FAULT, f"engine: {reason}", now_s, stop_end=event)
            case _:
                assert_never(event)

    def _reserve(self, description: Description) -> list[SourceEffect]:
        self.state, self.description = S.RESERVING, description
        return [
            ef.Send(self._reserve_message()),
            ef.SetTimer(Timer.RESEND, self.params.resend_s),
            ef.SetTimer(Timer.PHASE, self.params.reserve_timeout_s),
        ]

    def _reserve_message(self) -> msg.Reserve:
        assert self.description is not None
        without_kv = self.params.mode is Mode.RECOMPUTE
        return msg.Reserve(
            migration_id=self.migration.migration_id,
            request_id=self.description.request_id,
            source_instance=self.migration.source.instance,
            source_epoch=self.migration.source.epoch,
            source_address=self.migration.source.address,
            destination_epoch=self.migration.destination.epoch,
            payload=self.description.payload,
            settled_tokens=0 if without_kv else self.description.settled_tokens,
            kv_fingerprint=self.description.kv_fingerprint,
            block_size=self.description.block_size,
            num_preemptions=self.description.num_preemptions,
            lease_s=self.params.lease_s,
        )

    def _on_reserved(self, reserved: msg.Reserved) -> list[SourceEffect]:
        if self.state is not S.RESERVING:
            return []  # a repetition
        assert self.description is not None
        self.state = S.PREPARING
        self.endpoints = reserved.endpoints
        self.num_held_blocks = reserved.num_blocks
        self.num_cached_tokens = reserved.num_cached_tokens
        self.landing = Landing(num_full_blocks(reserved.num_cached_tokens, self.description.block_size))
        return [
            ef.ClearTimer(Timer.PHASE),
            ef.Send(msg.Prepare(migration_id=self.migration.migration_id)),
            ef.SetTimer(Timer.RESEND, self.params.resend_s),
        ]

    def _on_look(self, progress: Progress, now_s: float) -> list[SourceEffect]:
        if self._is_preempted(progress.num_preemptions, progress.settled_tokens):
            return self._close(Outcome.PREEMPTED, "preempted at the source during the copy", now_s)
        self.progress = progress
        return self._advance(now_s, has_grown=False)

    def _is_preempted(self, num_preemptions: int, settled_tokens: int) -> bool:
        assert self.description is not None
        if self.params.mode is Mode.RECOMPUTE:
            return False  # no block moves, so none can have gone stale
        settled_before = self.description.settled_tokens if self.progress is None else self.progress.settled_tokens
        return num_preemptions != self.description.num_preemptions or settled_tokens < settled_before

    def _advance(self, now_s: float, *, has_grown: bool) -> list[SourceEffect]:
        """Copy the next stage or stop, at the last look's numbers; first let the destination hold enough."""
        assert self.description is not None and self.progress is not None
        block_size = self.description.block_size
        step = next_push(self.landing, num_full_blocks(self.progress.settled_tokens, block_size), self.params)
        has_kv = self.progress.settled_tokens > 0 and self.params.mode is not Mode.RECOMPUTE
        with_slack = num_blocks_for(self.progress.num_tokens, block_size) + self.params.slack_blocks
        wanted = with_slack if isinstance(step, StopReason) and not has_grown else 0
        if isinstance(step, BlockRange):
            wanted = step.end
        if has_kv and wanted > self.num_held_blocks:
            self.state = S.GROWING
            return [self._grow(max(wanted, with_slack) * block_size), ef.SetTimer(Timer.RESEND, self.params.resend_s)]
        if isinstance(step, BlockRange):
            return self._copy(step, self.progress.block_table, now_s)
        self.state = S.STOPPING
        return [ef.StopRequest(without_kv=self.params.mode is Mode.RECOMPUTE)]

    def _grow(self, num_tokens: int) -> ef.Send:
        return ef.Send(msg.Grow(migration_id=self.migration.migration_id, num_tokens=num_tokens))

    def _on_grown(self, num_blocks: int, now_s: float) -> list[SourceEffect]:
        self.num_held_blocks = max(self.num_held_blocks, num_blocks)
        keepalive = ef.SetTimer(Timer.RESEND, self.params.keepalive_s)
        assert self.description is not None
        match self.state:
            case S.GROWING:
                assert self.progress is not None
                # Slack is a wish (the destination may hold less at the longest length), the blocks themselves are not.
                if self.num_held_blocks < num_blocks_for(self.progress.settled_tokens, self.description.block_size):
                    return []
                return [keepalive, *self._advance(now_s, has_grown=True)]
            case S.GROWING_TAIL:
                assert self.stopped is not None
                if self.num_held_blocks < num_blocks_for(self.stopped.settled_tokens, self.description.block_size):
                    return []
                return [keepalive, *self._copy_tail(now_s)]
            case _:
                return []  # the answer to a keep-alive, or a repetition

    def _copy(self, blocks: BlockRange, block_table: tuple[tuple[int, ...], ...], now_s: float) -> list[SourceEffect]:
        is_tail = self.stopped is not None
        self.state = S.COPYING_TAIL if is_tail else S.COPYING
        self.copying, self.copy_started_s = blocks, now_s
        return [
            ef.CopyBlocks(self.endpoints, block_table, blocks, urgent=is_tail),
            ef.SetTimer(Timer.PHASE, self.params.copy_timeout_s),
        ]

    def _on_copied(self, receipt: CopyReceipt, now_s: float) -> list[SourceEffect]:
        assert self.copying is not None
        if receipt.num_blocks != len(self.copying):
            return self._close(Outcome.FAULT, f"copy: {receipt.num_blocks} of {len(self.copying)} blocks landed", now_s)
        report = StageReport(receipt.num_blocks, receipt.num_bytes, now_s - self.copy_started_s)
        self.copying = None
        if self.state is S.COPYING_TAIL:
            self.tail = report
            return self._commit()
        assert self.description is not None and self.progress is not None
        full_blocks = num_full_blocks(self.progress.settled_tokens, self.description.block_size)
        self.landing, self.state = self.landing.after(report, full_blocks), S.PROBING
        deadline = ef.SetTimer(Timer.DEADLINE, self.params.deadline_s)  # it bounds the time without progress
        return [ef.ClearTimer(Timer.PHASE), deadline, ef.ReadProgress()]

    def _on_stopped(self, stopped: StoppedRequest, now_s: float) -> list[SourceEffect]:
        assert self.description is not None
        self.stopped, self.stopped_s = stopped, now_s
        if self._is_preempted(stopped.num_preemptions, stopped.settled_tokens):
            return self._close(Outcome.PREEMPTED, "preempted at the source before the stop", now_s)
        tail = tail_blocks(self.landing.num_landed, stopped.settled_tokens, self.description.block_size)
        if tail.end > self.num_held_blocks:
            self.state = S.GROWING_TAIL
            return [self._grow(stopped.settled_tokens), ef.SetTimer(Timer.RESEND, self.params.resend_s)]
        return self._copy_tail(now_s) if len(tail) else self._commit()

    def _copy_tail(self, now_s: float) -> list[SourceEffect]:
        assert self.description is not None and self.stopped is not None
        tail = tail_blocks(self.landing.num_landed, self.stopped.settled_tokens, self.description.block_size)
        return self._copy(tail, self.stopped.block_table, now_s)

    def _on_stop_declined(self, event: ev.StopDeclined, now_s: float) -> list[SourceEffect]:
        outcome, reason = DECLINED[event.why]
        return self._close(outcome, reason, now_s, stop_end=event)

    def _commit(self) -> list[SourceEffect]:
        self.state, self.is_commit_sent = S.COMMITTING, True
        return [ef.ClearTimer(Timer.PHASE), ef.ClearTimer(Timer.DEADLINE), *self._ask_commit()]

    def _ask_commit(self) -> list[SourceEffect]:
        assert self.stopped is not None
        commit = msg.Commit(migration_id=self.migration.migration_id, state=self.stopped.state)
        return [ef.Send(commit), ef.SetTimer(Timer.RESEND, self.params.commit_retry_s)]

    def _on_timer(self, timer: Timer, now_s: float) -> list[SourceEffect]:
        match timer:
            case Timer.RESEND:
                return self._resend()
            case Timer.PHASE if self.state in (S.RESERVING, S.COPYING, S.COPYING_TAIL):
                return self._close(Outcome.TIMED_OUT, f"no answer while {self.state.value}", now_s)
            case Timer.DEADLINE if self.state is not S.COMMITTING:
                return self._close(Outcome.TIMED_OUT, f"the deadline passed while {self.state.value}", now_s)
            case _:
                return []

    def _resend(self) -> list[SourceEffect]:
        """Say the unanswered thing again; while nothing is asked, say something, so that the lease lives on."""
        assert self.description is not None
        again = ef.SetTimer(Timer.RESEND, self.params.resend_s)
        block_size = self.description.block_size
        match self.state:
            case S.RESERVING:
                return [ef.Send(self._reserve_message()), again]
            case S.PREPARING:
                return [ef.Send(msg.Prepare(migration_id=self.migration.migration_id)), again]
            case S.GROWING:
                assert self.progress is not None
                blocks = num_blocks_for(self.progress.num_tokens, block_size) + self.params.slack_blocks
                return [self._grow(blocks * block_size), again]
            case S.GROWING_TAIL:
                assert self.stopped is not None
                return [self._grow(self.stopped.settled_tokens), again]
            case S.COMMITTING:
                return self._ask_commit()
            case _:
                keepalive = self._grow(self.num_held_blocks * block_size)
                return [keepalive, ef.SetTimer(Timer.RESEND, self.params.keepalive_s)]

    def _close(
        self, outcome: Outcome, reason: str, now_s: float, *, tell: bool = True, stop_end: SourceEvent | None = None
    ) -> list[SourceEffect]:
        """The outcome is known. `tell` the destination, unless it knows or is gone. `stop_end`: how a stop ended."""
        if self.is_client_gone and outcome is not Outcome.COMMITTED:
            outcome, reason = Outcome.ABORTED_BY_CLIENT, "aborted by the client"
        ending = Ending(self.migration.migration_id, self.params, outcome, reason)
        self.ending, effects = ending.begin(
            is_stopping=self.state is S.STOPPING and self.stopped is None,
            is_stopped=self.stopped is not None,
            tell=tell and self.state is not S.DESCRIBING,
        )
        if self.state is S.STOPPING and stop_end is not None:
            self.ending, more = self.ending.on(stop_end)
            effects += more
        self.state = S.CLOSING
        return self._end_if_over(effects, now_s)

    def _end_if_over(self, effects: list[SourceEffect], now_s: float) -> list[SourceEffect]:
        assert self.ending is not None
        if self.ending.is_over:
            self.state, self.ended_s = S.DONE, now_s
        return effects

    def report(self) -> MigrationReport:
        """Only when done."""
        assert self.ending is not None and self.ended_s is not None
        return self.report_as(self.ending.outcome, self.ending.reason, self.ended_s)

    def report_as(self, outcome: Outcome, reason: str, ended_s: float) -> MigrationReport:
        """In any state: for a shell that had to end it without the machine."""
        stood_still_s = 0.0
        if self.stopped_s is not None and self.answered_s is not None:
            stood_still_s = self.answered_s - self.stopped_s
        return MigrationReport(
            migration_id=self.migration.migration_id,
            request_id=self.migration.request_id,
            source=self.migration.source.instance,
            destination=self.migration.destination.instance,
            outcome=outcome,
            reason=reason,
            cached_tokens=self.num_cached_tokens,
            moved_tokens=self.stopped.settled_tokens if self.stopped else 0,
            stages=self.stages,
            tail=self.tail,
            duration_s=ended_s - self.started_s,
            stopped_s=stood_still_s,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the fields agree with the state."""
        assert (self.ending is not None) == (self.state in (S.CLOSING, S.DONE))
        assert (self.ended_s is not None) == self.is_done
        assert self.is_commit_sent or self.state is not S.COMMITTING
        assert not (self.ending and self.ending.outcome is Outcome.COMMITTED) or self.is_commit_sent
        assert self.stopped is not None or self.state not in (S.GROWING_TAIL, S.COPYING_TAIL, S.COMMITTING)
        if self.ending is not None:
            assert self.is_done == self.ending.is_over
            assert not (self.is_commit_sent and Pending.CANCELLED in self.ending.pending), "a commit may have been seen"
            assert self.ending.num_cancels_sent <= self.params.max_cancel_sends
        assert (self.copying is not None) <= (self.state in (S.COPYING, S.COPYING_TAIL, S.CLOSING, S.DONE))
        assert len(self.stages) <= self.params.max_stages
