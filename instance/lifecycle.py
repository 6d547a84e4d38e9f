"""In which state is an instance, and what may follow?"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """Takes no new request and no migration in; what it has runs on until it is moved or done."""
    STOPPED = "stopped"


FOLLOWS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.SERVING, State.STOPPED}),
    State.SERVING: frozenset({State.DRAINING, State.STOPPED}),
    State.DRAINING: frozenset({State.SERVING, State.STOPPED}),
    State.STOPPED: frozenset(),
}


class IllegalTransition(ValueError):
    """The instance's state does not allow that."""


def follow(state: State, to: State) -> State:
    """Return `to`, or raise IllegalTransition. Staying where it is, is always legal."""
    if to is not state and to not in FOLLOWS[state]:
        raise IllegalTransition(f"an instance that is {state.value} cannot become {to.value}")
    return to
