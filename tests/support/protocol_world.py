"""What can happen to the two migration machines? A world around the real ones: engines, a bad network, crashes, timers.

A world is a flat tuple of small values; snapshots and events are interned, each machine step is computed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, NamedTuple, get_args

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.destination import DestinationMachine
from migration.messages import Message
from migration.params import MigrationParams, Mode
from migration.source import SourceMachine
from migration.table import DESTINATION_TABLE, SOURCE_TABLE, DestinationState, SourceState
from migration.types import (
    CopyReceipt,
    Description,
    Epoch,
    Incarnation,
    InstanceId,
    Migration,
    MigrationId,
    NotStopped,
    Outcome,
    Progress,
    RequestId,
    Reservation,
    StoppedRequest,
)

MAX_IN_FLIGHT = 3


class Engine(Enum):
    """What an engine has of the request."""

    NOTHING = "nothing"
    RUNNING = "running"
    STOPPED = "stopped"
    HELD = "held"
    """Blocks only."""
    OVER = "over"
    """Finished, aborted, released or dead: it will never run here again."""


class Disturbance(Enum):
    """What may come from outside, once each."""

    CRASH = "crash"
    ABORT = "abort"
    FINISH = "finish"
    WITHDRAWAL = "withdrawal"


@dataclass(frozen=True, slots=True)
class Scenario:
    """The request, the mode, and how much may go wrong in one run."""

    params: MigrationParams
    looks: tuple[Progress, ...]
    """What the source's engine says at each look; the last one is repeated."""
    stopped: StoppedRequest
    reserved: Reservation
    num_faults: int
    """Refusals, failures and preemptions, in all."""
    disturbances: frozenset[Disturbance] = frozenset(Disturbance)
    max_in_flight: int = MAX_IN_FLIGHT

    @property
    def description(self) -> Description:
        look = self.looks[0]
        without_kv = self.params.mode is Mode.RECOMPUTE
        settled = 0 if without_kv else look.settled_tokens
        return Description(RequestId("r"), b"payload", settled, "print", 2, look.num_preemptions)


class World(NamedTuple):
    source: int
    destination: int
    source_engine: Engine
    destination_engine: Engine
    source_visits: tuple[int, ...]
    """Effects under way, interned."""
    destination_visits: tuple[int, ...]
    source_timers: tuple[int, ...]
    destination_timers: tuple[int, ...]
    network: tuple[tuple[bool, int], ...]
    """(goes to the destination, message), sorted: order is not kept. One that is never delivered counts as lost."""
    faults_left: int
    crashed: str
    """"", "source" or "destination"."""
    abort: str
    """"", or which sides have not heard yet: "both", "source", "destination", "heard"."""
    has_finished: bool
    can_withdraw: bool


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


ANSWERED_LATER = (
    *(ef.DescribeRequest, ef.ReadProgress, ef.CopyBlocks, ef.StopRequest, ef.ResumeRequest, ef.ReleaseRequest),
    *(ef.HoldBlocks, ef.GrowBlocks, ef.AwaitReady, ef.CommitRequest, ef.GiveBack, ef.AbortRequest),
)


S = SourceState
MEANINGFUL: dict[type, tuple[SourceState, ...]] = {
    msg.Reserved: (S.IDLE, S.DESCRIBING, S.RESERVING),
    msg.Prepared: (S.IDLE, S.DESCRIBING, S.RESERVING, S.PREPARING),
    msg.Grown: tuple(state for state in S if state not in (S.COPYING_TAIL, S.COMMITTING, S.CLOSING)),
    msg.Committed: tuple(state for state in S if state is not S.CLOSING),
}
"""In which states a message may still change anything, now or later; in the others the source stays as it is."""


class ProtocolWorld:
    """The rules of the world; `start`, `successors`, `find_fault` and `is_rest` are what an explorer needs."""

    def __init__(
        self,
        scenario: Scenario,
        source_class: type[SourceMachine] = SourceMachine,
        destination_class: type[DestinationMachine] = DestinationMachine,
        *,
        checks_table: bool = True,
    ) -> None:
        """`checks_table` False: for machines broken on purpose, whose steps the table would give away at once."""
        self._checks_table = checks_table
        self._scenario = scenario
        self._classes = (source_class, destination_class)
        self._intern = Interner()
        self._steps: dict[tuple[int, int], tuple[int, tuple[Any, ...]]] = {}
        self._states: dict[int, Any] = {}
        a = Incarnation(InstanceId("a"), Epoch(1), "tcp://a")
        b = Incarnation(InstanceId("b"), Epoch(1), "tcp://b")
        migration = Migration(MigrationId("m"), RequestId("r"), a, b)
        source = source_class(migration, scenario.params)
        destination = destination_class(MigrationId("m"), scenario.params.lease_s)
        world = World(
            source=self._freeze(source),
            destination=self._freeze(destination),
            source_engine=Engine.RUNNING,
            destination_engine=Engine.NOTHING,
            source_visits=(),
            destination_visits=(),
            source_timers=(),
            destination_timers=(),
            network=(),
            faults_left=scenario.num_faults,
            crashed="",
            abort="",
            has_finished=False,
            can_withdraw=True,
        )
        self.start = self._source_event(world, ev.Started())

    # ---- what must hold

    def find_fault(self, world: World) -> str | None:
        if world.source_engine is Engine.RUNNING and world.destination_engine is Engine.RUNNING:
            return "two owners"
        if not self.is_rest(world):
            return None
        if world.destination_engine is Engine.HELD:
            return "at rest, blocks are still reserved"
        if world.source_engine is Engine.STOPPED and world.crashed != "source":
            return "at rest, the request is still stopped"
        num_owners = (world.source_engine is Engine.RUNNING) + (world.destination_engine is Engine.RUNNING)
        if world.abort and num_owners:
            return "at rest, an aborted request still runs"
        is_lossy = bool(world.crashed or world.abort or world.has_finished)
        if not is_lossy and num_owners != 1:
            return f"at rest, {num_owners} owners"
        source = self._machine(world.source)
        was_taken = source.ending is not None and source.ending.outcome is Outcome.COMMITTED
        is_source_left = world.crashed == "destination" and not was_taken
        if is_source_left and not (world.abort or world.has_finished) and num_owners != 1:
            return "the destination died before it had it, and nobody runs it"
        return None

    def is_rest(self, world: World) -> bool:
        source_rests = world.crashed == "source" or self._machine(world.source).is_done
        destination = self._machine(world.destination)
        destination_rests = (
            world.crashed == "destination" or destination.is_over or destination.state is DestinationState.IDLE
        )
        nothing_moves = not (world.source_visits or world.destination_visits)
        return source_rests and destination_rests and nothing_moves and world.abort in ("", "heard")

    # ---- what may happen

    def successors(self, world: World) -> Iterator[tuple[str, World]]:
        for steps in (self._network_steps, self._source_steps, self._destination_steps, self._outside_steps):
            for step, following in steps(world):
                yield step, self._without_dead(following)

    def _network_steps(self, world: World) -> Iterator[tuple[str, World]]:
        for index, (to_destination, number) in enumerate(world.network):
            message: Message = self._intern.values[number]
            name = type(message).__name__
            rest = world._replace(network=world.network[:index] + world.network[index + 1 :])
            arrive = self._destination_event if to_destination else self._source_event
            yield f"{name} arrives", arrive(rest, message)
            yield f"{name} arrives, and will again", arrive(world, message)
            if len(world.network) == self._scenario.max_in_flight:
                yield f"{name} is lost", rest

    def _without_dead(self, world: World) -> World:
        """Without the messages that can never mean anything to the source any more: fewer worlds that are the same."""
        state = self._machine(world.source).state
        if world.crashed == "source" or state is SourceState.DONE:
            dead: tuple[type, ...] = get_args(Message)
        else:
            dead = tuple(kind for kind, meaning in MEANINGFUL.items() if state not in meaning)
        packets = tuple(
            packet for packet in world.network if packet[0] or not isinstance(self._intern.values[packet[1]], dead)
        )
        return world if len(packets) == len(world.network) else world._replace(network=packets)

    def _source_steps(self, world: World) -> Iterator[tuple[str, World]]:
        if world.crashed == "source":
            return
        for number in world.source_visits:
            effect = self._intern.values[number]
            visits = tuple(other for other in world.source_visits if other != number)
            for name, after, event in self._answers(world._replace(source_visits=visits), effect):
                yield name, self._source_event(after, event)
        for number in world.source_timers:
            timer = self._intern.values[number]
            timers = tuple(other for other in world.source_timers if other != number)
            after = self._source_event(world._replace(source_timers=timers), ev.TimerFired(timer))
            yield f"source: timer {timer.value}", after

    def _destination_steps(self, world: World) -> Iterator[tuple[str, World]]:
        if world.crashed == "destination":
            return
        for number in world.destination_visits:
            effect = self._intern.values[number]
            visits = tuple(other for other in world.destination_visits if other != number)
            for name, after, event in self._answers(world._replace(destination_visits=visits), effect):
                yield name, after if event is None else self._destination_event(after, event)
        for number in world.destination_timers:
            timer = self._intern.values[number]
            timers = tuple(other for other in world.destination_timers if other != number)
            after = self._destination_event(world._replace(destination_timers=timers), ev.TimerFired(timer))
            yield f"destination: timer {timer.value}", after

    def _outside_steps(self, world: World) -> Iterator[tuple[str, World]]:
        allowed = self._scenario.disturbances
        if not world.crashed and Disturbance.CRASH in allowed:
            yield (
                "the source crashes",
                world._replace(crashed="source", source_engine=Engine.OVER, source_visits=(), source_timers=()),
            )
            yield (
                "the destination crashes",
                world._replace(
                    crashed="destination",
                    destination_engine=Engine.OVER,
                    destination_visits=(),
                    destination_timers=(),
                ),
            )
        if world.crashed == "source":
            yield "the destination hears of it", self._destination_event(world, ev.SourceLost())
        if world.crashed == "destination":
            yield "the source hears of it", self._source_event(world, ev.DestinationLost())
        if world.can_withdraw and Disturbance.WITHDRAWAL in allowed and world.crashed != "source":
            after = self._source_event(world._replace(can_withdraw=False), ev.Withdrawn("called off"))
            yield "the agent calls it off", after
        can_finish = Disturbance.FINISH in allowed and not world.has_finished and not world.abort
        if can_finish and world.source_engine is Engine.RUNNING:
            yield "it finishes at the source", world._replace(source_engine=Engine.OVER, has_finished=True)
        if not world.abort and Disturbance.ABORT in allowed:
            yield "the client leaves", world._replace(abort="both")
        if world.abort in ("both", "source"):
            after = world._replace(abort="heard" if world.abort == "source" else "destination")
            if after.source_engine in (Engine.RUNNING, Engine.STOPPED):
                after = after._replace(source_engine=Engine.OVER)
            yield "the source hears of the abort", self._source_event(after, ev.ClientAborted())
        if world.abort in ("both", "destination"):
            after = world._replace(abort="heard" if world.abort == "destination" else "source")
            if after.destination_engine is Engine.RUNNING:
                after = after._replace(destination_engine=Engine.OVER)
            yield "the destination hears of the abort", self._destination_event(after, ev.ClientAborted())

    def _answers(self, world: World, effect: Any) -> Iterator[tuple[str, World, Any]]:
        """How an effect may end: (what happened, the world after, the event; None if it has no answer)."""
        faulty = world._replace(faults_left=world.faults_left - 1)
        has_faults = world.faults_left > 0
        is_gone = world.source_engine is Engine.OVER
        scenario = self._scenario
        match effect:
            case ef.DescribeRequest() if not is_gone:
                yield "source: described", world, ev.RequestDescribed(scenario.description)
            case ef.ReadProgress() if not is_gone:
                stages = len(self._machine(world.source).stages)
                look = scenario.looks[min(stages, len(scenario.looks) - 1)]
                yield "source: looked", world, ev.ProgressRead(look)
                if has_faults:
                    preempted = replace(look, num_preemptions=look.num_preemptions + 1)
                    yield "source: looked, it was preempted", faulty, ev.ProgressRead(preempted)
            case ef.DescribeRequest() | ef.ReadProgress():
                yield "source: it is gone", world, ev.RequestGone()
            case ef.CopyBlocks(blocks=blocks):
                if world.destination_engine is Engine.HELD:
                    yield "source: copied", world, ev.BlocksCopied(CopyReceipt(len(blocks), 8 * len(blocks)))
                if has_faults or world.destination_engine is not Engine.HELD:
                    after = world if world.destination_engine is not Engine.HELD else faulty
                    yield "source: the copy breaks", after, ev.CopyBroken("cut")
            case ef.StopRequest() if not is_gone:
                stopped = world._replace(source_engine=Engine.STOPPED)
                yield "source: stopped", stopped, ev.StopGranted(scenario.stopped)
                if has_faults:
                    yield "source: the stop fails", faulty, ev.EngineFailed("fault")
                    half = faulty._replace(source_engine=Engine.STOPPED)
                    yield "source: stopped, but the stop fails", half, ev.EngineFailed("fault")
            case ef.StopRequest():
                yield "source: finished before the stop", world, ev.StopDeclined(NotStopped.FINISHED)
            case ef.ResumeRequest():
                back = world.source_engine is Engine.STOPPED
                after = world._replace(source_engine=Engine.RUNNING) if back else world
                yield "source: resumed", after, ev.RequestResumed()
            case ef.ReleaseRequest():
                back = world.source_engine is Engine.STOPPED
                after = world._replace(source_engine=Engine.OVER) if back else world
                yield "source: released", after, ev.RequestReleased()
            case _:
                yield from self._destination_answers(world, faulty if has_faults else None, effect)

    def _destination_answers(self, world: World, faulty: World | None, effect: Any) -> Iterator[tuple[str, World, Any]]:
        reserved = self._scenario.reserved
        match effect:
            case ef.HoldBlocks():
                held = world._replace(destination_engine=Engine.HELD)
                yield "destination: held", held, ev.BlocksHeld(reserved, ("memory://b",))
            case ef.GrowBlocks(num_tokens):
                grown = replace(reserved, num_blocks=-(-num_tokens // 2))
                yield "destination: grown", world, ev.BlocksGrown(grown)
            case ef.AwaitReady():
                yield "destination: ready", world, ev.RequestReady()
            case ef.CommitRequest():
                ours = world._replace(destination_engine=Engine.RUNNING)
                yield "destination: committed", ours, ev.RequestCommitted()
                if faulty is not None:
                    freed = faulty._replace(destination_engine=Engine.NOTHING)
                    yield "destination: the engine refuses the commit", freed, ev.EngineRefused("no")
                return
            case ef.GiveBack():
                freed = world._replace(destination_engine=Engine.NOTHING)
                yield "destination: gave back", freed, ev.BlocksGivenBack()
                return
            case ef.AbortRequest():
                is_running = world.destination_engine is Engine.RUNNING
                after = world._replace(destination_engine=Engine.OVER) if is_running else world
                yield "destination: aborted", after, None
                return
            case _:
                raise AssertionError(f"the world does not know {effect}")
        if faulty is not None:
            yield f"destination: refuses {type(effect).__name__}", faulty, ev.EngineRefused("no")
            if not isinstance(effect, ef.AwaitReady):
                yield f"destination: {type(effect).__name__} fails", faulty, ev.EngineFailed("fault")

    # ---- machines

    def _source_event(self, world: World, event: Any) -> World:
        state = self._machine(world.source).state
        if world.crashed == "source" or state is SourceState.DONE:
            return world
        number, effects = self._step(0, world.source, event)
        world = world._replace(source=number)
        for effect in effects:
            world = self._source_effect(world, effect)
        if self._machine(number).is_done:
            assert not any(
                isinstance(self._intern.values[visit], ef.StopRequest | ef.ResumeRequest | ef.ReleaseRequest)
                for visit in world.source_visits
            ), "done while its engine is being asked"
            world = world._replace(source_visits=(), source_timers=())
        return world

    def _source_effect(self, world: World, effect: Any) -> World:
        match effect:
            case ef.Send(message):
                return self._post(world, True, message)
            case ef.SetTimer(timer):
                return world._replace(source_timers=_with(world.source_timers, self._intern(timer)))
            case ef.ClearTimer(timer):
                return world._replace(source_timers=_without(world.source_timers, self._intern(timer)))
            case ef.ForgetCopy():
                copies = [n for n in world.source_visits if isinstance(self._intern.values[n], ef.CopyBlocks)]
                return world._replace(source_visits=_without(world.source_visits, *copies))
            case _:
                return world._replace(source_visits=_with(world.source_visits, self._intern(effect)))

    def _destination_event(self, world: World, event: Any) -> World:
        machine = self._machine(world.destination)
        if world.crashed == "destination":
            return world
        is_told = isinstance(event, ev.SourceLost | ev.ClientAborted)
        if is_told and (
            machine.is_over or (machine.state is DestinationState.IDLE and isinstance(event, ev.SourceLost))
        ):
            return world  # the shell tells only the migrations under way (and remembers aborts of unknown requests)
        number, effects = self._step(1, world.destination, event)
        world = world._replace(destination=number)
        for effect in effects:
            world = self._destination_effect(world, effect)
        if self._machine(number).is_over:
            world = world._replace(destination_timers=())
        return world

    def _destination_effect(self, world: World, effect: Any) -> World:
        match effect:
            case ef.Send(message):
                return self._post(world, False, message)
            case ef.SetTimer(timer):
                return world._replace(destination_timers=_with(world.destination_timers, self._intern(timer)))
            case ef.ClearTimer(timer):
                return world._replace(destination_timers=_without(world.destination_timers, self._intern(timer)))
            case ef.GiveBack():
                waits = [n for n in world.destination_visits if isinstance(self._intern.values[n], ef.AwaitReady)]
                world = world._replace(destination_visits=_without(world.destination_visits, *waits))
                return world._replace(destination_visits=_with(world.destination_visits, self._intern(effect)))
            case _:
                return world._replace(destination_visits=_with(world.destination_visits, self._intern(effect)))

    def _post(self, world: World, to_destination: bool, message: Message) -> World:
        lost = world.crashed == ("destination" if to_destination else "source")
        packet = (to_destination, self._intern(message))
        if lost or packet in world.network or len(world.network) >= self._scenario.max_in_flight:
            return world  # a full network loses what comes next
        return world._replace(network=tuple(sorted((*world.network, packet))))

    def _step(self, role: int, number: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        key = (number, self._intern((role, event)))
        if key not in self._steps:
            machine = self._classes[role](*self._intern.values[number][1])
            before = machine.state
            effects = tuple(machine.on(event, 0.0))
            machine.check_integrity()
            table: Any = (SOURCE_TABLE, DESTINATION_TABLE)[role]
            is_allowed = machine.state in table[before, type(event)]
            assert is_allowed or not self._checks_table, f"{before} -{type(event).__name__}-> {machine.state}"
            known = (ef.Send, ef.SetTimer, ef.ClearTimer, ef.ForgetCopy, *ANSWERED_LATER)
            assert all(isinstance(effect, known) for effect in effects)
            self._steps[key] = (self._freeze(machine), effects)
        return self._steps[key]

    def _freeze(self, machine: SourceMachine | DestinationMachine) -> int:
        role = 0 if isinstance(machine, SourceMachine) else 1
        number = self._intern((role, tuple(getattr(machine, field.name) for field in fields(machine))))
        self._states.setdefault(number, machine)
        return number

    def _machine(self, number: int) -> Any:
        """To look at only."""
        return self._states[number]


def _with(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(sorted({*numbers, number}))


def _without(numbers: tuple[int, ...], *gone: int) -> tuple[int, ...]:
    return tuple(number for number in numbers if number not in gone)
