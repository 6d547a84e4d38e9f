"""Which event may come in which state, and where may it lead? The protocol of both roles as data; an absent pair is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from migration import events as ev
from migration import messages as msg


class SourceState(Enum):
    """Where the source stands. It owns the request until `CLOSING` with outcome COMMITTED."""

    IDLE = "idle"
    DESCRIBING = "describing"
    RESERVING = "reserving"
    PREPARING = "preparing"
    PROBING = "probing"
    """Looking at the request: how far has it got?"""
    GROWING = "growing"
    COPYING = "copying"
    STOPPING = "stopping"
    GROWING_TAIL = "growing_tail"
    """Stopped; more was decoded than there was slack for."""
    COPYING_TAIL = "copying_tail"
    COMMITTING = "committing"
    """`Commit` was sent: the destination may own the request, so only its answer or its end leads on."""
    CLOSING = "closing"
    """The outcome is known; what is held is being put right at both ends."""
    DONE = "done"


class DestinationState(Enum):
    """Where the destination stands. It owns the request from `COMMITTED` on."""

    IDLE = "idle"
    HOLDING = "holding"
    HELD = "held"
    GROWING = "growing"
    PREPARING = "preparing"
    COMMITTING = "committing"
    COMMITTED = "committed"
    WITHDRAWING = "withdrawing"
    """It is over, but the engine still works on a reservation: wait for it, then give back."""
    RELEASING = "releasing"
    CLOSED = "closed"
    """Nothing is held. Every message is answered with the same no."""


S = SourceState
D = DestinationState

SourceTable = Mapping[tuple[SourceState, type], frozenset[SourceState]]
DestinationTable = Mapping[tuple[DestinationState, type], frozenset[DestinationState]]

_State = TypeVar("_State", SourceState, DestinationState)
_Row = tuple[tuple[_State, ...], tuple[type, ...], tuple[_State, ...]]
"""These states, these events, and where they may lead; no target: they stay where they are."""


def _table(*rows: _Row[_State]) -> Mapping[tuple[_State, type], frozenset[_State]]:
    table: dict[tuple[_State, type], frozenset[_State]] = {}
    for states, events, targets in rows:
        for state in states:
            for event in events:
                assert (state, event) not in table, f"two rows for {state}, {event.__name__}"
                table[state, event] = frozenset(targets or (state,))
    return table


_END = (S.CLOSING, S.DONE)
_LOOKING = (S.PROBING, S.GROWING, S.COPYING, S.STOPPING)
_TAIL = (S.GROWING_TAIL, S.COPYING_TAIL)
_RESERVED = (S.PREPARING, *_LOOKING, *_TAIL)
_ASKED = (S.RESERVING, *_RESERVED)

SOURCE_TABLE: SourceTable = _table(
    # The straight way.
    ((S.IDLE,), (ev.Started,), (S.DESCRIBING,)),
    ((S.DESCRIBING,), (ev.RequestDescribed,), (S.RESERVING,)),
    ((S.RESERVING,), (msg.Reserved,), (S.PREPARING,)),
    ((S.PREPARING,), (msg.Prepared,), (S.PROBING,)),
    ((S.PROBING,), (ev.ProgressRead,), (S.GROWING, S.COPYING, S.STOPPING, *_END)),
    ((S.GROWING,), (msg.Grown,), (S.GROWING, S.COPYING, S.STOPPING)),
    ((S.COPYING,), (ev.BlocksCopied,), (S.PROBING, *_END)),
    ((S.STOPPING,), (ev.StopGranted,), (*_TAIL, S.COMMITTING, *_END)),
    ((S.GROWING_TAIL,), (msg.Grown,), _TAIL),
    ((S.COPYING_TAIL,), (ev.BlocksCopied,), (S.COMMITTING, *_END)),
    ((S.COMMITTING,), (msg.Committed, msg.Refused, ev.DestinationLost), _END),
    # Ends before the commit.
    ((S.DESCRIBING,), (ev.RequestUnmovable,), _END),
    ((S.DESCRIBING, S.PROBING), (ev.RequestGone,), _END),
    ((S.DESCRIBING, S.PROBING, S.STOPPING), (ev.EngineFailed,), _END),
    ((S.STOPPING,), (ev.StopDeclined,), _END),
    ((S.COPYING, S.COPYING_TAIL), (ev.CopyBroken,), _END),
    ((S.DESCRIBING, *_ASKED), (ev.ClientAborted, ev.Withdrawn, ev.DestinationLost), _END),
    (_ASKED, (msg.Refused, ev.SendFailed), _END),
    # A timer says something again, or ends it, or is of another phase.
    ((S.DESCRIBING,), (ev.TimerFired,), (S.DESCRIBING, *_END)),
    *(((state,), (ev.TimerFired,), (state, *_END)) for state in _ASKED),
    # Once `Commit` may have been seen nothing of our own decides.
    ((S.COMMITTING,), (ev.ClientAborted, ev.Withdrawn, ev.SendFailed, ev.TimerFired), ()),
    # Repeated answers, and answers to what only kept the lease alive.
    ((*_RESERVED, S.COMMITTING, S.CLOSING), (msg.Reserved,), ()),
    ((*_LOOKING, *_TAIL, S.COMMITTING, S.CLOSING), (msg.Prepared,), ()),
    ((S.PROBING, S.COPYING, S.STOPPING, S.COPYING_TAIL, S.COMMITTING, S.CLOSING), (msg.Grown,), ()),
    # Putting right what is held.
    (
        (S.CLOSING,),
        (msg.Cancelled, msg.Refused, ev.DestinationLost, ev.Withdrawn, ev.TimerFired, ev.EngineFailed),
        _END,
    ),
    ((S.CLOSING,), (ev.StopGranted, ev.StopDeclined, ev.RequestResumed, ev.RequestReleased), _END),
    # What was under way when the end came.
    ((S.CLOSING,), (msg.Committed, ev.ClientAborted, ev.SendFailed, ev.BlocksCopied, ev.CopyBroken), ()),
    ((S.CLOSING,), (ev.RequestDescribed, ev.RequestUnmovable, ev.RequestGone, ev.ProgressRead), ()),
)

_LIVE = (D.HOLDING, D.HELD, D.GROWING, D.PREPARING)
_OVER = (D.WITHDRAWING, D.RELEASING, D.CLOSED)
_OURS = (D.COMMITTING, D.COMMITTED)
_TOLD = (ev.SourceLost, ev.ClientAborted, ev.Withdrawn)
_ASKING = (msg.Reserve, msg.Grow, msg.Prepare, msg.Commit)

DESTINATION_TABLE: DestinationTable = _table(
    # The straight way.
    ((D.IDLE,), (msg.Reserve,), (D.HOLDING,)),
    ((D.HOLDING,), (ev.BlocksHeld,), (D.HELD,)),
    ((D.HELD,), (msg.Grow,), (D.HELD, D.GROWING)),
    ((D.GROWING,), (ev.BlocksGrown,), (D.HELD,)),
    ((D.HELD,), (msg.Prepare,), (D.HELD, D.PREPARING)),
    ((D.PREPARING,), (ev.RequestReady,), (D.HELD,)),
    ((D.HELD,), (msg.Commit,), (D.COMMITTING,)),
    ((D.COMMITTING,), (ev.RequestCommitted,), (D.COMMITTED,)),
    # Ends before the commit.
    ((D.IDLE,), (msg.Cancel, ev.ClientAborted, ev.Withdrawn), (D.CLOSED,)),
    ((D.HOLDING, D.GROWING), (msg.Cancel, *_TOLD), (D.WITHDRAWING,)),
    ((D.HELD, D.PREPARING), (msg.Cancel, *_TOLD), (D.RELEASING,)),
    *(((state,), (ev.TimerFired,), (D.WITHDRAWING,)) for state in (D.HOLDING, D.GROWING)),
    *(((state,), (ev.TimerFired,), (D.RELEASING,)) for state in (D.HELD, D.PREPARING)),
    ((D.HOLDING,), (ev.EngineRefused,), (D.CLOSED,)),
    ((D.GROWING, D.PREPARING, D.COMMITTING), (ev.EngineRefused,), (D.RELEASING,)),
    ((D.HOLDING, D.GROWING), (ev.EngineFailed,), (D.RELEASING,)),
    ((D.WITHDRAWING,), (ev.BlocksHeld, ev.BlocksGrown, ev.EngineRefused, ev.EngineFailed), (D.RELEASING,)),
    ((D.RELEASING,), (ev.BlocksGivenBack, ev.EngineFailed), (D.CLOSED,)),
    # Repetitions, and what comes too late.
    (_LIVE, (msg.Reserve, ev.SendFailed), ()),
    ((D.GROWING, D.PREPARING), (msg.Grow, msg.Prepare), ()),
    # The source took an older `Grown` for enough; it asks again.
    ((D.GROWING,), (msg.Commit,), ()),
    (_OVER, (*_ASKING, msg.Cancel, *_TOLD, ev.TimerFired, ev.SendFailed), ()),
    ((D.RELEASING, D.CLOSED), (ev.RequestReady, ev.EngineRefused), ()),
    (_OURS, (*_ASKING, *_TOLD, ev.TimerFired, ev.SendFailed), ()),
)
