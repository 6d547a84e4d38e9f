"""What do the two sides of the explored protocol have in common? Sides are numbers; what may follow each is computed
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from migration import events as ev
from tests.support.protocol_machines import Machines
from tests.support.protocol_scenario import Interner, Packet, Scenario, with_number, without_numbers

Did = tuple[int, tuple[int, ...]]
"""The number of a side after a step, and of the packets it posts."""


class Needs(IntEnum):
    """What must be so elsewhere for a move to be possible."""

    NOTHING = 0
    CLIENT_LEFT = 1
    DESTINATION_ENDED = 2
    SOURCE_ENDED = 3
    LANDS = 4
    """The destination can be written."""
    CANNOT_LAND = 5


class Move(NamedTuple):
    """One step of a side: its number after it, the packets it posts."""

    step: str
    side: int
    posts: tuple[int, ...] = ()
    cost: int = 0
    """Of the faults that may happen."""
    needs: Needs = Needs.NOTHING
    copy: tuple[str, int, int] | None = None
    """(endpoint, first block, end)."""


@dataclass(frozen=True, slots=True)
class SendLost:
    """A visit that ends in `SendFailed`."""


SideT = TypeVar("SideT", bound=tuple[Any, ...])
"""A named tuple; `visits` are the effects under way, `timers` those that are set."""


class SideRules(Generic[SideT]):
    """One side of the protocol."""

    name: ClassVar[str]

    def __init__(self, scenario: Scenario, machines: Machines, intern: Interner, first_machine: int) -> None:
        self._scenario = scenario
        self._machines = machines
        self._intern = intern
        self._first_machine = first_machine
        self._moves: dict[int, tuple[Move, ...]] = {}
        self._received: dict[tuple[int, int], Did] = {}
        self._unsent: dict[int, int] = {}

    def look(self, side: int) -> SideT:
        return self._intern.values[side]  # type: ignore[no-any-return]

    def moves(self, side: int) -> tuple[Move, ...]:
        if side not in self._moves:
            self._moves[side] = tuple(self._all_moves(self.look(side)))
        return self._moves[side]

    def receive(self, side: int, packet: int) -> Did:
        """The side after a message has come, and its answers."""
        key = (side, packet)
        if key not in self._received:
            self._received[key] = self._receive(self.look(side), self._intern.values[packet])
        return self._received[key]

    def send_fails(self, side: int) -> int:
        """What it said could not be handed over."""
        if side not in self._unsent:
            now: Any = self.look(side)
            failing = now._replace(visits=with_number(now.visits, self._intern(SendLost())))
            self._unsent[side] = self._intern(failing)
        return self._unsent[side]

    def _ends(self, side: Any) -> Iterator[Move]:
        """Of effects under way, and of timers."""
        for number in side.visits:
            rest = side._replace(visits=without_numbers(side.visits, number))
            yield from self._answers(rest, self._intern.values[number])
        for number in side.timers:
            timer = self._intern.values[number]
            rest = side._replace(timers=without_numbers(side.timers, number))
            yield Move(f"{self.name}: timer {timer.value}", *self._event(rest, ev.TimerFired(timer)))

    def _all_moves(self, side: SideT) -> Iterator[Move]:
        raise NotImplementedError

    def _receive(self, side: SideT, came: Packet) -> Did:
        raise NotImplementedError

    def _answers(self, side: SideT, effect: Any) -> Iterator[Move]:
        """How an effect under way may end."""
        raise NotImplementedError

    def _event(self, side: SideT, event: Any) -> Did:
        """The side after its machine was told, and what it posts."""
        raise NotImplementedError
