"""What does the destination of a migration do at each event? A pure machine over its table: events in, effects out.

It owns the request from the moment its engine has committed it. Until then it holds leased blocks, which every failure
gives back. Once `Refused` or `Cancelled` was said, no `Commit` is served any more; once committed, every one is.
"""

from __future__ import annotations

from dataclasses import dataclass

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.effects import DestinationEffect
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.events import DestinationEvent, Timer
from migration.messages import ToDestination
from migration.table import DESTINATION_TABLE, DestinationState
from migration.types import Description, MigrationId, Outcome, RequestId, Reservation

D = DestinationState
_MESSAGES = (msg.Reserve, msg.Grow, msg.Prepare, msg.Commit, msg.Cancel)
_LIVE = (D.HOLDING, D.HELD, D.GROWING, D.PREPARING)
_ENGINE_AT_WORK = (D.HOLDING, D.GROWING)


NO_REQUEST = RequestId("")
"""Until `Reserve` has come."""


@dataclass(slots=True)
class DestinationMachine:
    """One migration at its destination. Every field is an immutable value: a copy of the machine is a snapshot."""

    migration_id: MigrationId
    max_lease_s: float
    state: DestinationState = D.IDLE
    request_id: RequestId = NO_REQUEST
    block_size: int = 1
    lease_s: float = 0.0
    reservation: Reservation | None = None
    endpoints: tuple[str, ...] = ()
    is_ready: bool = False
    is_client_gone: bool = False
    is_cancelled: bool = False
    """The source has said `Cancel`: it is answered `Cancelled` rather than `Refused`."""
    outcome: Outcome | None = None
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Nothing is held and nothing is under way; what comes is answered from memory."""
        return self.state in (D.COMMITTED, D.CLOSED)

    def on(self, event: DestinationEvent, now_s: float) -> list[DestinationEffect]:  # noqa: ARG002
        """Take one event. Without an entry in the table: a protocol error (remote: a message), nothing changed."""
        if (self.state, type(event)) not in DESTINATION_TABLE:
            error = RemoteProtocolError if isinstance(event, _MESSAGES) else LocalProtocolError
            raise error(f"destination: {type(event).__name__} in state {self.state.name}")
        match event:
            case msg.Reserve() | msg.Grow() | msg.Prepare() | msg.Commit() | msg.Cancel():
                answer = self._on_message(event)
                renewed = self.state in _LIVE
                return [*answer, ef.SetTimer(Timer.LEASE, self.lease_s)] if renewed else answer
            case ev.BlocksHeld() | ev.BlocksGrown() | ev.RequestReady() | ev.RequestCommitted() | ev.BlocksGivenBack():
                return self._on_done(event)
            case ev.EngineRefused(reason):
                return self._on_engine_refused(reason)
            case ev.EngineFailed(reason):
                return self._on_engine_failed(reason)
            case ev.TimerFired():
                return self._end(Outcome.TIMED_OUT, "the lease expired")
            case ev.SourceLost():
                return self._end(Outcome.SOURCE_LOST, "the source's epoch ended")
            case ev.Withdrawn(reason):
                return self._end(Outcome.REFUSED, reason)
            case ev.ClientAborted():
                self.is_client_gone = True
                return self._end(Outcome.ABORTED_BY_CLIENT, "aborted by the client")
            case ev.SendFailed():
                return []  # the source asks again, or its lease ends

    def _on_message(self, message: ToDestination) -> list[DestinationEffect]:
        match self.state:
            case D.IDLE | D.HOLDING | D.HELD | D.GROWING | D.PREPARING:
                return self._on_live_message(message)
            case D.COMMITTED if isinstance(message, msg.Commit):
                return [ef.Send(msg.Committed(migration_id=self.migration_id))]
            case D.CLOSED:
                self.is_cancelled |= isinstance(message, msg.Cancel)
                return [self._final_word()]
            case D.WITHDRAWING | D.RELEASING:
                self.is_cancelled |= isinstance(message, msg.Cancel)
                return []  # the final word follows when the blocks are back
            case _:
                return []  # a late repetition

    def _on_live_message(self, message: ToDestination) -> list[DestinationEffect]:
        match message:
            case msg.Reserve() if self.state is D.IDLE:
                return self._hold(message)
            case msg.Reserve():
                return [self._reserved()] if self.reservation is not None else []
            case msg.Grow(num_tokens=num_tokens):
                return self._grow(num_tokens)
            case msg.Prepare() if self.state is D.HELD:
                if self.is_ready:
                    return [ef.Send(msg.Prepared(migration_id=self.migration_id))]
                self.state = D.PREPARING
                return [ef.AwaitReady()]
            case msg.Commit(state=state) if self.state is D.HELD:
                self.state = D.COMMITTING
                return [ef.ClearTimer(Timer.LEASE), ef.CommitRequest(state)]
            case msg.Cancel(outcome=outcome):
                self.is_cancelled = True
                known = outcome in {o.value for o in Outcome}
                return self._end(Outcome(outcome) if known else Outcome.FAULT, "cancelled by the source")
            case _:
                return []  # a repetition of what is under way

    def _hold(self, reserve: msg.Reserve) -> list[DestinationEffect]:
        self.state = D.HOLDING
        self.request_id = RequestId(reserve.request_id)
        self.block_size = reserve.block_size
        self.lease_s = min(max(reserve.lease_s, 0.0), self.max_lease_s)
        description = Description(
            request_id=self.request_id,
            payload=reserve.payload,
            settled_tokens=reserve.settled_tokens,
            kv_fingerprint=reserve.kv_fingerprint,
            block_size=reserve.block_size,
            num_preemptions=reserve.num_preemptions,
        )
        return [ef.HoldBlocks(description)]

    def _grow(self, num_tokens: int) -> list[DestinationEffect]:
        assert self.reservation is not None
        if num_tokens <= self.reservation.num_blocks * self.block_size:
            return [self._grown()]
        if self.state is not D.HELD:
            return []  # the source asks again
        self.state = D.GROWING
        return [ef.GrowBlocks(num_tokens)]

    def _on_done(
        self,
        event: ev.BlocksHeld | ev.BlocksGrown | ev.RequestReady | ev.RequestCommitted | ev.BlocksGivenBack,
    ) -> list[DestinationEffect]:
        match event:
            case _ if self.state is D.WITHDRAWING:
                self.state = D.RELEASING
                return [ef.GiveBack()]
            case ev.BlocksHeld(reservation, endpoints):
                self.state, self.reservation, self.endpoints = D.HELD, reservation, endpoints
                return [self._reserved()]
            case ev.BlocksGrown(reservation):
                self.state, self.reservation = D.HELD, reservation
                return [self._grown()]
            case ev.RequestReady() if self.state is D.PREPARING:
                self.state, self.is_ready = D.HELD, True
                return [ef.Send(msg.Prepared(migration_id=self.migration_id))]
            case ev.RequestCommitted():
                self.state, self.outcome, self.reservation = D.COMMITTED, Outcome.COMMITTED, None
                # The client left while the engine was committing: it found nothing to abort then.
                aborts: list[DestinationEffect] = [ef.AbortRequest()] if self.is_client_gone else []
                return [ef.Send(msg.Committed(migration_id=self.migration_id)), *aborts]
            case ev.BlocksGivenBack():
                self.state, self.reservation = D.CLOSED, None
                return [self._final_word()]
            case _:
                return []  # ready too late

    def _on_engine_refused(self, reason: str) -> list[DestinationEffect]:
        match self.state:
            case D.HOLDING:
                self.state, self.outcome, self.reason = D.CLOSED, Outcome.REFUSED, reason
                return [ef.ClearTimer(Timer.LEASE), self._final_word()]
            case D.WITHDRAWING:
                self.state = D.RELEASING
                return [ef.GiveBack()]
            case D.RELEASING | D.CLOSED:
                return []  # a wait for readiness that came too late
            case _:
                return self._give_back(Outcome.REFUSED, reason)

    def _on_engine_failed(self, reason: str) -> list[DestinationEffect]:
        match self.state:
            case D.RELEASING:
                self.state, self.reservation = D.CLOSED, None
                self.outcome, self.reason = Outcome.FAULT, f"giving blocks back failed: {reason}"
                return [self._final_word()]
            case D.WITHDRAWING:
                self.state = D.RELEASING
                return [ef.GiveBack()]
            case _:
                return self._give_back(Outcome.FAULT, f"engine: {reason}")

    def _end(self, outcome: Outcome, reason: str) -> list[DestinationEffect]:
        """Before the commit: give back. During and after it: the source's loss or the lease change nothing any more."""
        if self.state is D.IDLE:
            self.state, self.outcome, self.reason = D.CLOSED, outcome, reason
            return [self._final_word()] if self.is_cancelled else []
        if self.state not in _LIVE:
            return []
        if self.state in _ENGINE_AT_WORK:
            self.state, self.outcome, self.reason = D.WITHDRAWING, outcome, reason
            return [ef.ClearTimer(Timer.LEASE)]
        return self._give_back(outcome, reason)

    def _give_back(self, outcome: Outcome, reason: str) -> list[DestinationEffect]:
        self.state, self.outcome, self.reason = D.RELEASING, outcome, reason
        return [ef.ClearTimer(Timer.LEASE), ef.GiveBack()]

    def _reserved(self) -> ef.Send:
        assert self.reservation is not None
        return ef.Send(
            msg.Reserved(
                migration_id=self.migration_id,
                num_cached_tokens=self.reservation.num_cached_tokens,
                num_blocks=self.reservation.num_blocks,
                endpoints=self.endpoints,
            )
        )

    def _grown(self) -> ef.Send:
        assert self.reservation is not None
        return ef.Send(msg.Grown(migration_id=self.migration_id, num_blocks=self.reservation.num_blocks))

    def _final_word(self) -> ef.Send:
        if self.is_cancelled:
            return ef.Send(msg.Cancelled(migration_id=self.migration_id))
        return ef.Send(msg.Refused(migration_id=self.migration_id, reason=self.reason))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the fields agree with the state."""
        has_blocks = self.state in (D.HELD, D.GROWING, D.PREPARING, D.COMMITTING)
        assert not has_blocks or self.reservation is not None
        assert not self.is_over or self.reservation is None
        ended = (D.COMMITTED, D.WITHDRAWING, D.RELEASING, D.CLOSED)
        assert (self.outcome is not None) == (self.state in ended)
        assert (self.outcome is Outcome.COMMITTED) == (self.state is D.COMMITTED)
