"""Which state may follow which?"""

from __future__ import annotations

import itertools

import pytest

from instance.lifecycle import FOLLOWS, IllegalTransition, State, follow


@pytest.mark.parametrize(("state", "to"), list(itertools.product(State, State)))
def test_every_pair_of_states_is_allowed_or_raises(state: State, to: State) -> None:
    if to is state or to in FOLLOWS[state]:
        assert follow(state, to) is to
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            follow(state, to)


def test_a_drain_can_be_called_off_and_a_stop_cannot() -> None:
    assert follow(State.DRAINING, State.SERVING) is State.SERVING
    assert FOLLOWS[State.STOPPED] == frozenset()
