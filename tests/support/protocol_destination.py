"""What can the destination's side do next? Its machine, engine, lease and shell; nothing of the peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.table import DestinationState
from tests.support.protocol_machines import Machines
from tests.support.protocol_scenario import (
    BLOCK_SIZE,
    Disturbance,
    Engine,
    Interner,
    Lapse,
    Life,
    Packet,
    Scenario,
    with_number,
    without_numbers,
)
from tests.support.protocol_side import Did, Move, Needs, SendLost, SideRules

D = DestinationState
_HOLDING = (Engine.HELD, Engine.OPEN)


class DestinationSide(NamedTuple):
    machine: int
    engine: Engine = Engine.NOTHING
    visits: tuple[int, ...] = ()
    timers: tuple[int, ...] = ()
    life: Life = Life.UP
    is_told: bool = False
    """The source's epoch has ended, says the agent."""
    has_heard: bool = False
    """Of the client's leaving."""
    is_closing: bool = False
    room: int = 0
    """Blocks held."""
    landed: int = 0
    """So many blocks, from the first one on, are written in this reservation."""

    @property
    def endpoint(self) -> str:
        return f"memory://b/{2 if self.life is Life.AGAIN else 1}"


class DestinationRules(SideRules[DestinationSide]):
    name = "destination"

    def __init__(self, scenario: Scenario, machines: Machines, intern: Interner, first_machine: int) -> None:
        super().__init__(scenario, machines, intern, first_machine)
        self._landed: dict[tuple[int, Any], int | None] = {}

    def start(self) -> int:
        return self._intern(DestinationSide(self._first_machine))

    def can_receive(self, side: DestinationSide, kind: type) -> bool:
        """The agent's part: nothing of an epoch that has ended, and of what was meant for another epoch only `Reserve`,
        which the table refuses.
        """
        lapse = self._scenario.lapse
        if side.is_told and lapse is not Lapse.HEARS_THE_DEAD:
            return False
        return side.life is not Life.AGAIN or kind is msg.Reserve or lapse is Lapse.SERVES_OTHER_EPOCHS

    def _receive(self, side: DestinationSide, came: Packet) -> Did:
        message = came.message
        if not self.can_receive(side, type(message)):
            return self._intern(side), ()
        posts: tuple[int, ...] = ()
        if isinstance(message, msg.Reserve) and self._machines.look(side.machine).state is D.IDLE:
            refusal = self._refusal(side)
            if refusal is not None:
                number, posts = self._event(side, ev.Withdrawn(refusal))
                side = self.look(number)
        number, more = self._event(side, message)
        return number, posts + more

    def _refusal(self, side: DestinationSide) -> str | None:
        if side.is_closing:
            return "the destination is shutting down"
        if side.life is Life.AGAIN and self._scenario.lapse is not Lapse.SERVES_OTHER_EPOCHS:
            return "epoch 2 here, not 1"
        return "aborted by the client" if side.has_heard else None

    def land(self, side: int, copy: tuple[str, int, int]) -> int | None:
        """The side after these blocks were written; None if they cannot be."""
        key = (side, copy)
        if key not in self._landed:
            now, (endpoint, first, end) = self.look(side), copy
            is_open = now.engine is Engine.OPEN and endpoint == now.endpoint and end <= now.room
            landed = max(now.landed, end) if first <= now.landed else now.landed
            self._landed[key] = self._intern(now._replace(landed=landed)) if is_open else None
        return self._landed[key]

    def _all_moves(self, side: DestinationSide) -> Iterator[Move]:
        may = self._scenario.may
        if side.life is Life.DOWN:
            if may(Disturbance.RESTART):
                fresh = DestinationSide(self._first_machine, life=Life.AGAIN, is_told=side.is_told)
                yield Move("the destination comes back, knowing nothing", self._intern(fresh))
            return
        yield from self._ends(side)
        if not side.is_told:
            told = self._tell(side._replace(is_told=True), ev.SourceLost())
            yield Move("the destination hears that the source's epoch has ended", *told, needs=Needs.SOURCE_ENDED)
        if not side.has_heard:
            is_here = side.engine in (Engine.RUNNING, Engine.GARBLED)
            aborted = side._replace(has_heard=True, engine=Engine.OVER if is_here else side.engine)
            left = self._tell(aborted, ev.ClientAborted())
            yield Move("the destination hears that the client left", *left, needs=Needs.CLIENT_LEFT)
        yield from self._disturbances(side)

    def _disturbances(self, side: DestinationSide) -> Iterator[Move]:
        may = self._scenario.may
        if not side.is_closing and may(Disturbance.DRAIN):
            told = self._tell(side._replace(is_closing=True), ev.Withdrawn("the destination is shutting down"))
            yield Move("the destination shuts down", *told)
        if side.life is Life.UP and may(Disturbance.DESTINATION_CRASH):
            gone = DestinationSide(self._first_machine, Engine.OVER, life=Life.DOWN, is_told=side.is_told)
            yield Move("the destination crashes", self._intern(gone))
        if side.life is Life.UP and may(Disturbance.DESTINATION_FENCED):
            yield Move("the destination is declared dead", self._intern(side._replace(life=Life.FENCED)))
        if self._scenario.lapse is Lapse.FORGETS_COMMITTED and self._machines.look(side.machine).state is D.COMMITTED:
            yield Move("the destination forgets it", self._intern(side._replace(machine=self._first_machine)))

    def _tell(self, side: DestinationSide, event: Any) -> Did:
        """The table tells the migrations under way, and forgets those that ended with the source's epoch."""
        machine = self._machines.look(side.machine)
        if machine.is_over and isinstance(event, ev.SourceLost):
            # What still comes goes to the forgotten machine, and means nothing; an abort under way goes on.
            last = tuple(n for n in side.visits if isinstance(self._intern.values[n], ef.AbortRequest))
            return self._intern(side._replace(machine=self._first_machine, visits=last)), ()
        if machine.is_over or machine.state is D.IDLE:
            return self._intern(side), ()
        return self._event(side, event)

    def _answers(self, side: DestinationSide, effect: Any) -> Iterator[Move]:
        match effect:
            case SendLost():
                yield Move("destination: an answer cannot be sent", *self._event(side, ev.SendFailed("no way")))
            case ef.HoldBlocks():
                yield from self._holds(side)
            case ef.GrowBlocks(num_tokens):
                yield from self._grows(side, num_tokens)
            case ef.AwaitReady():
                yield Move("destination: ready", *self._event(side, ev.RequestReady()))
                yield Move("destination: it will not get ready", *self._event(side, ev.EngineRefused("no")), cost=1)
            case ef.CommitRequest():
                yield from self._commits(side)
            case ef.GiveBack():
                freed = self._event(self._free(side), ev.BlocksGivenBack())
                yield Move("destination: gave back", *freed)
                if side.engine in _HOLDING:
                    stuck = self._event(side._replace(engine=Engine.STUCK), ev.EngineFailed("fault"))
                    yield Move("destination: giving back fails", *stuck, cost=1)
            case ef.AbortRequest():
                is_here = side.engine in (Engine.RUNNING, Engine.GARBLED)
                after = side._replace(engine=Engine.OVER) if is_here else side
                yield Move("destination: aborted", self._intern(after))
            case _:
                raise AssertionError(f"the destination's side does not know {effect}")

    def _holds(self, side: DestinationSide) -> Iterator[Move]:
        if side.engine is not Engine.NOTHING:
            here = self._event(side, ev.EngineRefused("the request is here already"))
            yield Move("destination: refuses, it is here already", *here)
            return
        reserved = self._scenario.reserved
        cached = reserved.num_cached_tokens // BLOCK_SIZE
        held = side._replace(engine=Engine.OPEN, room=reserved.num_blocks, landed=cached)
        yield Move("destination: held", *self._event(held, ev.BlocksHeld(reserved, (side.endpoint,))))
        yield Move("destination: full, it refuses", *self._event(side, ev.EngineRefused("no")), cost=1)
        yield Move("destination: holding fails", *self._event(side, ev.EngineFailed("fault")), cost=1)
        shut = self._event(held._replace(engine=Engine.HELD), ev.EngineFailed("fault"))
        yield Move("destination: held, but the ticket cannot be opened", *shut, cost=1)

    def _grows(self, side: DestinationSide, num_tokens: int) -> Iterator[Move]:
        num_blocks = max(side.room, -(-num_tokens // BLOCK_SIZE))
        grown = self._event(
            side._replace(room=num_blocks), ev.BlocksGrown(replace(self._scenario.reserved, num_blocks=num_blocks))
        )
        yield Move("destination: grown", *grown)
        yield Move("destination: full, it cannot grow", *self._event(side, ev.EngineRefused("no")), cost=1)
        yield Move("destination: growing fails", *self._event(side, ev.EngineFailed("fault")), cost=1)

    def _commits(self, side: DestinationSide) -> Iterator[Move]:
        if side.engine not in _HOLDING:
            gone = self._event(side, ev.EngineRefused("no such reservation"))
            yield Move("destination: refuses the commit of nothing", *gone)
            return
        is_whole = side.landed >= self._scenario.num_needed_blocks
        ours = side._replace(engine=Engine.RUNNING if is_whole else Engine.GARBLED, room=0, landed=0)
        yield Move("destination: committed", *self._event(ours, ev.RequestCommitted()))
        refused = self._event(self._free(side), ev.EngineRefused("no"))
        yield Move("destination: the engine refuses the commit", *refused, cost=1)
        shut = self._event(side, ev.EngineRefused("the ticket could not be closed"))
        yield Move("destination: the ticket cannot be closed", *shut, cost=1)

    def _free(self, side: DestinationSide) -> DestinationSide:
        return side._replace(engine=Engine.NOTHING, room=0, landed=0) if side.engine in _HOLDING else side

    def _event(self, side: DestinationSide, event: Any) -> Did:
        number, effects = self._machines.step(side.machine, event)
        side, posts = side._replace(machine=number), []
        epoch = 2 if side.life is Life.AGAIN else 1
        for effect in effects:
            match effect:
                case ef.Send(message):
                    posts.append(self._intern(Packet(False, epoch, message)))
                case ef.SetTimer(timer):
                    side = side._replace(timers=with_number(side.timers, self._intern(timer)))
                case ef.ClearTimer(timer):
                    side = side._replace(timers=without_numbers(side.timers, self._intern(timer)))
                case _:  # a wait for readiness goes on after `GiveBack`: it may have ended before it was called off
                    side = side._replace(visits=with_number(side.visits, self._intern(effect)))
        if self._machines.look(number).is_over:
            side = side._replace(timers=())
        return self._intern(side), tuple(posts)
