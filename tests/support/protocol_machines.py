"""How do the real machines step, as numbers? Each (snapshot, event) is computed once, checked, and remembered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

from migration import effects as ef
from migration import messages as msg
from migration.destination import DestinationMachine
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.messages import Message
from migration.source import SourceMachine
from migration.table import DESTINATION_TABLE, SOURCE_TABLE, DestinationState, SourceState
from tests.support.protocol_scenario import Interner

S = SourceState
D = DestinationState
_KNOWN_EFFECTS = (*get_args(ef.SourceEffect), *get_args(ef.DestinationEffect))

_MEANINGFUL: dict[type, tuple[SourceState, ...]] = {
    msg.Reserved: (S.IDLE, S.DESCRIBING, S.RESERVING),
    msg.Prepared: (S.IDLE, S.DESCRIBING, S.RESERVING, S.PREPARING),
    msg.Grown: tuple(state for state in S if state not in (S.CLOSING, S.DONE)),
    msg.Committed: tuple(state for state in S if state not in (S.CLOSING, S.DONE)),
    msg.Refused: tuple(state for state in S if state is not S.DONE),
    msg.Cancelled: tuple(state for state in S if state is not S.DONE),
}
"""In which states of the source an answer may still change anything, now or later. Checked in every exploration."""

DEAD_AT_SOURCE: dict[SourceState, frozenset[type]] = {
    state: frozenset(kind for kind, states in _MEANINGFUL.items() if state not in states) for state in S
}
_IGNORED_ONCE_OURS: frozenset[type] = frozenset((msg.Grow, msg.Prepare, msg.Cancel))
DEAD_AT_DESTINATION: dict[DestinationState, frozenset[type]] = {
    state: _IGNORED_ONCE_OURS if state is D.COMMITTED else frozenset() for state in D
}


class Machines:
    """Both roles; a machine's snapshot is a small number."""

    def __init__(self, intern: Interner, *, checks_table: bool) -> None:
        """`checks_table` False: for machines broken on purpose, whose steps the table would give away at once."""
        self._intern = intern
        self._checks_table = checks_table
        self._classes: dict[int, type[Any]] = {}
        self._snapshots: dict[int, Any] = {}
        self._steps: dict[tuple[int, int], tuple[int, tuple[Any, ...]]] = {}
        self.covered: defaultdict[tuple[Any, type], set[Any]] = defaultdict(set)
        """(state, event) pairs that were met -> the states they led to."""

    def add(self, machine: SourceMachine | DestinationMachine) -> int:
        role = isinstance(machine, DestinationMachine)
        number = self._intern((role, tuple(getattr(machine, field.name) for field in fields(machine))))
        self._classes[number] = type(machine)
        self._snapshots.setdefault(number, machine)
        return number

    def look(self, number: int) -> Any:
        """The machine, to look at only."""
        return self._snapshots[number]

    def copy(self, number: int) -> Any:
        """A machine of one's own with this snapshot."""
        return self._classes[number](*self._intern.values[number][1])

    def snapshots(self) -> Iterator[int]:
        yield from self._snapshots

    def is_same(self, number: int, machine: Any) -> bool:
        return bool(self._intern.values[number][1] == tuple(getattr(machine, field.name) for field in fields(machine)))

    def step(self, number: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        """The snapshot after it, and the effects. What the protocol does not allow is dropped if it came from the
        peer; from our own shell it is a bug. Raises AssertionError.
        """
        key = (number, self._intern((type(event).__name__, event)))
        if key not in self._steps:
            self._steps[key] = self._compute(number, event)
        return self._steps[key]

    def _compute(self, number: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        machine = self.copy(number)
        before = machine.state
        try:
            effects = tuple(machine.on(event, 0.0))
        except RemoteProtocolError:
            assert self.is_same(number, machine), f"{type(event).__name__} in {before} was turned away, not ignored"
            return number, ()
        except LocalProtocolError as error:
            raise AssertionError(str(error)) from error
        machine.check_integrity()
        table: Any = DESTINATION_TABLE if isinstance(machine, DestinationMachine) else SOURCE_TABLE
        if self._checks_table:
            is_allowed = machine.state in table[before, type(event)]
            assert is_allowed, f"{before} -{type(event).__name__}-> {machine.state}"
            assert all(isinstance(effect, _KNOWN_EFFECTS) for effect in effects)
            self._check_dead(number, machine, event, effects)
            self.covered[before, type(event)].add(machine.state)
        return self.add(machine), effects

    def _check_dead(self, number: int, after: Any, event: Any, effects: tuple[Any, ...]) -> None:
        """A message that is left out of the worlds as meaningless must change nothing, and mean nothing later."""
        dead: Any = DEAD_AT_DESTINATION if isinstance(after, DestinationMachine) else DEAD_AT_SOURCE
        before = self.look(number).state
        assert dead[before] <= dead[after.state], f"{before} -> {after.state} brings a message back to life"
        if type(event) in dead[before]:
            assert self.is_same(number, after) and not effects, f"{type(event).__name__} means something in {before}"

    def check_dead(self, number: int, message: Message) -> None:
        """For a message about to be left out: see that it means nothing."""
        if self._checks_table:
            after, effects = self.step(number, message)
            assert after == number and not effects, f"{message} means something in {self.look(number).state}"
