"""What may happen in one exploration of the protocol? The request, the shells' rules, and how much may go wrong."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from migration.params import MigrationParams, Mode
from migration.types import (
    Description,
    Epoch,
    Incarnation,
    InstanceId,
    Migration,
    MigrationId,
    Progress,
    RequestId,
    Reservation,
    StoppedRequest,
)

BLOCK_SIZE = 2
MIGRATION_ID = MigrationId("m")
SOURCE = Incarnation(InstanceId("a"), Epoch(1), "tcp://a")
DESTINATION = Incarnation(InstanceId("b"), Epoch(1), "tcp://b")
MIGRATION = Migration(MIGRATION_ID, RequestId("r"), SOURCE, DESTINATION)


class Engine(IntEnum):
    """What an engine has of the request. Integers, because worlds are hashed millions of times."""

    NOTHING = 0
    RUNNING = 1
    STOPPED = 2
    HELD = 3
    """Blocks only, and no carrier can write them."""
    OPEN = 4
    """Blocks only, with an open ticket."""
    OVER = 5
    """Finished, aborted, released or dead: it will never run here again."""
    GARBLED = 6
    """It runs, but not all of its blocks had landed."""
    STUCK = 7
    """Giving the blocks back failed: they stay held, and the report says FAULT."""


class Life(IntEnum):
    UP = 0
    FENCED = 1
    """Declared dead, and still at work: nobody listens to its tokens."""
    DOWN = 2
    AGAIN = 3
    """Restarted: the next epoch, with nothing in its memory."""


class Disturbance(Enum):
    """What may come from outside, once each."""

    SOURCE_CRASH = "the source crashes"
    DESTINATION_CRASH = "the destination crashes"
    RESTART = "who crashed comes back"
    SOURCE_FENCED = "the source is declared dead, though it lives"
    DESTINATION_FENCED = "the destination is declared dead, though it lives"
    ABORT = "the client leaves"
    FINISH = "the request finishes at the source"
    WITHDRAWAL = "the source's agent calls it off"
    DRAIN = "the destination shuts down"


class Lapse(Enum):
    """What a broken shell leaves out."""

    NONE = "none"
    SERVES_OTHER_EPOCHS = "both sides take messages that were meant for, or come from, another epoch"
    """At one side alone it does no harm in the explored worlds: the other's look is enough."""
    HEARS_THE_DEAD = "takes messages of an epoch that has ended"
    FORGETS_COMMITTED = "forgets a committed migration while its source still asks"


@dataclass(frozen=True, slots=True)
class Scenario:
    """The request, the mode, and how much may go wrong in one run."""

    params: MigrationParams
    looks: tuple[Progress, ...]
    """What the source's engine says at each look; the last one is repeated."""
    stopped: StoppedRequest
    reserved: Reservation
    disturbances: frozenset[Disturbance] = frozenset()
    num_faults: int = 0
    """Refusals, failures, failed sends and preemptions, in all."""
    max_in_flight: int = 3
    is_death_told: bool = True
    """The agents are told (some time) that an epoch has ended."""
    lapse: Lapse = Lapse.NONE

    @property
    def description(self) -> Description:
        look = self.looks[0]
        without_kv = self.params.mode is Mode.RECOMPUTE
        settled = 0 if without_kv else look.settled_tokens
        return Description(RequestId("r"), b"payload", settled, "print", BLOCK_SIZE, look.num_preemptions)

    @property
    def num_needed_blocks(self) -> int:
        """Blocks without which the committed request would decode nonsense."""
        return -(-self.stopped.settled_tokens // BLOCK_SIZE)

    def may(self, disturbance: Disturbance) -> bool:
        return disturbance in self.disturbances


class Packet(NamedTuple):
    """A message on its way. What is sent to the destination is addressed to its first epoch."""

    to_destination: bool
    from_epoch: int
    message: Any


class Interner:
    """Values as small numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self.values: list[Any] = []

    def __call__(self, value: Hashable) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def with_number(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(sorted({*numbers, number}))


def without_numbers(numbers: tuple[int, ...], *gone: int) -> tuple[int, ...]:
    return tuple(number for number in numbers if number not in gone)
