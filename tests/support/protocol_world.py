"""What can happen to the two migration machines together? Both sides, a network that loses, doubles and reorders, and
what must hold in every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from migration.destination import DestinationMachine
from migration.source import SourceMachine
from migration.table import DestinationState
from migration.types import Outcome
from tests.support.explorer import Exploration, explore
from tests.support.protocol_destination import DestinationRules, DestinationSide
from tests.support.protocol_machines import DEAD_AT_DESTINATION, DEAD_AT_SOURCE, Machines
from tests.support.protocol_scenario import (
    MIGRATION,
    MIGRATION_ID,
    Disturbance,
    Engine,
    Interner,
    Life,
    Scenario,
)
from tests.support.protocol_side import Did, Move, Needs
from tests.support.protocol_source import SourceRules, SourceSide


class World(NamedTuple):
    """Small numbers only: each side is one, a packet is one."""

    source: int
    destination: int
    network: tuple[int, ...]
    """Sorted: order is not kept. A message that is never delivered counts as lost."""
    faults_left: int
    has_left: bool
    """The client."""


class ProtocolWorld:
    """The rules of the world; `start`, `successors`, `find_fault` and `is_rest` are what an explorer needs."""

    def __init__(
        self,
        scenario: Scenario,
        source_class: type[SourceMachine] = SourceMachine,
        destination_class: type[DestinationMachine] = DestinationMachine,
        *,
        checks_table: bool = True,
        is_tidied: bool = True,
    ) -> None:
        """`checks_table` False: for machines broken on purpose, whose steps the table would give away at once.
        `is_tidied` False: keep messages that can mean nothing any more.
        """
        self._is_tidied = is_tidied
        self._scenario = scenario
        self._intern = Interner()
        self.machines = Machines(self._intern, checks_table=checks_table)
        source = self.machines.add(source_class(MIGRATION, scenario.params))
        destination = self.machines.add(destination_class(MIGRATION_ID, scenario.params.lease_s))
        self._source = SourceRules(scenario, self.machines, self._intern, source)
        self._destination = DestinationRules(scenario, self.machines, self._intern, destination)
        self._posted: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        self._named: dict[int, str] = {}
        self._tidied: dict[tuple[tuple[int, ...], int, int], tuple[int, ...]] = {}
        self._judged: dict[tuple[int, int, bool], tuple[bool, str | None]] = {}
        number, posts = self._source.start()
        self.start = World(number, self._destination.start(), tuple(posts), scenario.num_faults, False)

    def explore(self, max_states: int = 6_000_000) -> Exploration[World]:
        return explore(self.start, self.successors, self.find_fault, is_rest=self.is_rest, max_states=max_states)

    # ---- what must hold

    def find_fault(self, world: World) -> str | None:
        return self._judge(world)[1]

    def is_rest(self, world: World) -> bool:
        return self._judge(world)[0]

    def _judge(self, world: World) -> tuple[bool, str | None]:
        key = (world.source, world.destination, world.has_left)
        if key not in self._judged:
            source, destination = self._source.look(world.source), self._destination.look(world.destination)
            is_rest = self._rests(source, destination, world.has_left)
            why = self._fault_now(source, destination)
            if why is None and is_rest:
                why = self._fault_at_rest(source, destination, world.has_left)
            self._judged[key] = (is_rest, why)
        return self._judged[key]

    def _rests(self, source: SourceSide, destination: DestinationSide, has_left: bool) -> bool:
        """Nothing moves at a side that counts any more, whatever is still in the network."""
        is_source_at_rest = source.life is not Life.UP or (
            self.machines.look(source.machine).is_done and not source.visits and (source.has_heard or not has_left)
        )
        if destination.life in (Life.FENCED, Life.DOWN) or not is_source_at_rest:
            return is_source_at_rest
        machine = self.machines.look(destination.machine)
        has_heard = destination.has_heard or not has_left or destination.life is Life.AGAIN
        return (machine.is_over or machine.state is DestinationState.IDLE) and not destination.visits and has_heard

    def _fault_now(self, source: SourceSide, destination: DestinationSide) -> str | None:
        if destination.engine is Engine.GARBLED:
            return "committed without all of its blocks"
        is_running_there = destination.engine is Engine.RUNNING
        if is_running_there and source.is_preempted and self._scenario.num_needed_blocks:
            return "committed with blocks of before a preemption"
        is_source_counted = source.life is not Life.FENCED
        is_destination_counted = destination.life is not Life.FENCED
        if source.engine is Engine.RUNNING and is_source_counted and is_running_there and is_destination_counted:
            return "two owners"
        return None

    def _fault_at_rest(self, source: SourceSide, destination: DestinationSide, has_left: bool) -> str | None:
        here = self.machines.look(source.machine) if source.life is Life.UP else None
        there = self.machines.look(destination.machine) if destination.life in (Life.UP, Life.AGAIN) else None
        if there is not None:
            if destination.engine in (Engine.HELD, Engine.OPEN):
                return "at rest, blocks are still reserved"
            if destination.timers:
                return "at rest, a lease still runs"
            if destination.engine is Engine.STUCK and not destination.is_told and there.outcome is not Outcome.FAULT:
                return "at rest, blocks are stuck and nobody says so"
        if here is not None and source.engine is Engine.STOPPED:
            return "at rest, the request is still stopped"
        if here is not None and source.engine is Engine.STUCK and "putting it right failed" not in here.ending.reason:
            return "at rest, the request is stuck and nobody says so"
        is_here = here is not None and source.engine is Engine.RUNNING
        is_there = there is not None and destination.engine is Engine.RUNNING
        if has_left and (is_here or is_there):
            return "at rest, an aborted request still runs"
        if has_left or source.has_finished:
            return None
        is_where_it_says = is_here or source.engine is Engine.STUCK
        if here is None or here.ending.outcome is Outcome.COMMITTED:
            # It went to the destination: if that still lives in the same epoch, and knows of it, it runs there.
            is_committed = there is not None and there.state is DestinationState.COMMITTED
            is_expected = destination.life is Life.UP and (is_committed or here is not None)
            is_where_it_says = is_there or not is_expected
        return None if is_where_it_says else "at rest, 0 owners"

    # ---- what may happen

    def successors(self, world: World) -> Iterator[tuple[str, World]]:
        yield from self._network_steps(world)
        for move in self._source.moves(world.source):
            yield from self._source_move(world, move)
        for move in self._destination.moves(world.destination):
            if move.cost <= world.faults_left and self._is_possible(world, move):
                after = world._replace(faults_left=world.faults_left - move.cost)
                yield from self._destination_does(after, move.step, (move.side, move.posts), world.network)
        if not world.has_left and self._scenario.may(Disturbance.ABORT):
            yield "the client leaves", world._replace(has_left=True)

    def _network_steps(self, world: World) -> Iterator[tuple[str, World]]:
        source, destination, network, _, _ = world
        for index, packet in enumerate(network):
            rest = network[:index] + network[index + 1 :]
            name = self._names(packet)
            if self._intern.values[packet].to_destination:
                did = self._destination.receive(destination, packet)
                yield from self._destination_does(world, name, did, rest)
                yield from self._destination_does(world, name + ", and will again", did, network)
            else:
                did = self._source.receive(source, packet)
                yield from self._source_does(world, name, did, rest)
                yield from self._source_does(world, name + ", and will again", did, network)
            if len(network) == self._scenario.max_in_flight:
                yield name.replace("arrives", "is lost"), world._replace(network=rest)

    def _names(self, packet: int) -> str:
        if packet not in self._named:
            self._named[packet] = f"{type(self._intern.values[packet].message).__name__} arrives"
        return self._named[packet]

    def _source_move(self, world: World, move: Move) -> Iterator[tuple[str, World]]:
        if move.cost > world.faults_left or not self._is_possible(world, move):
            return
        after = world._replace(faults_left=world.faults_left - move.cost)
        if move.needs is Needs.LANDS and move.copy is not None:
            landed = self._destination.land(world.destination, move.copy)
            assert landed is not None
            after = after._replace(destination=landed)
        yield from self._source_does(after, move.step, (move.side, move.posts), world.network)

    def _is_possible(self, world: World, move: Move) -> bool:
        match move.needs:
            case Needs.NOTHING:
                return True
            case Needs.CLIENT_LEFT:
                return world.has_left
            case Needs.SOURCE_ENDED:
                return self._scenario.is_death_told and self._source.look(world.source).life is not Life.UP
            case Needs.DESTINATION_ENDED:
                return self._scenario.is_death_told and self._destination.look(world.destination).life is not Life.UP
            case _:
                assert move.copy is not None
                can_land = self._destination.land(world.destination, move.copy) is not None
                return can_land == (move.needs is Needs.LANDS)

    def _source_does(self, world: World, step: str, did: Did, network: tuple[int, ...]) -> Iterator[tuple[str, World]]:
        side, posts = did
        destination, faults, has_left = world.destination, world.faults_left, world.has_left
        sent = self._tidy(self._post(network, posts), side, destination)
        yield step, World(side, destination, sent, faults, has_left)
        if posts and faults:
            side = self._source.send_fails(side)
            unsent = self._tidy(network, side, destination)
            yield step, World(side, destination, unsent, faults - 1, has_left)

    def _destination_does(
        self, world: World, step: str, did: Did, network: tuple[int, ...]
    ) -> Iterator[tuple[str, World]]:
        side, posts = did
        source, faults, has_left = world.source, world.faults_left, world.has_left
        sent = self._tidy(self._post(network, posts), source, side)
        yield step, World(source, side, sent, faults, has_left)
        if posts and faults:
            side = self._destination.send_fails(side)
            yield step, World(source, side, self._tidy(network, source, side), faults - 1, has_left)

    def _post(self, network: tuple[int, ...], posts: tuple[int, ...]) -> tuple[int, ...]:
        """One that is there already is not counted twice; a full network loses what comes next."""
        if not posts:
            return network
        key = (network, posts)
        if key not in self._posted:
            for packet in posts:
                if packet not in network and len(network) < self._scenario.max_in_flight:
                    network = tuple(sorted((*network, packet)))
            self._posted[key] = network
        return self._posted[key]

    def _tidy(self, network: tuple[int, ...], source: int, destination: int) -> tuple[int, ...]:
        """Without the messages that can never mean anything any more: fewer worlds that are the same."""
        if not network or not self._is_tidied:
            return network
        key = (network, source, destination)
        if key not in self._tidied:
            here, there = self._source.look(source), self._destination.look(destination)
            self._tidied[key] = tuple(packet for packet in network if not self._is_dead(packet, here, there))
        return self._tidied[key]

    def _is_dead(self, number: int, here: SourceSide, there: DestinationSide) -> bool:
        packet = self._intern.values[number]
        kind = type(packet.message)
        if packet.to_destination:
            if there.life is Life.DOWN:
                there = there._replace(life=Life.AGAIN)
                if not self._scenario.may(Disturbance.RESTART):
                    return True
            if not self._destination.can_receive(there, kind):
                return True
            is_dead = kind in DEAD_AT_DESTINATION[self.machines.look(there.machine).state]
            machine = there.machine
        else:
            if here.life in (Life.DOWN, Life.AGAIN) or self.machines.look(here.machine).is_done:
                return True
            if here.is_told and packet.from_epoch == 1:
                return True
            is_dead = kind in DEAD_AT_SOURCE[self.machines.look(here.machine).state]
            machine = here.machine
        if is_dead:
            self.machines.check_dead(machine, packet.message)
        return is_dead
