"""Is every pair of state and event either in the table and met, or turned away? In machines that real runs produced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import pytest

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.events import DestinationEvent, SourceEvent, Timer
from migration.messages import Message
from migration.table import DESTINATION_TABLE, SOURCE_TABLE, DestinationState, SourceState
from migration.types import Outcome
from tests.support.message_examples import EXAMPLES
from tests.support.protocol_machines import Machines
from tests.support.protocol_scenarios import LIVE, PAIRS
from tests.support.protocol_world import ProtocolWorld

S = SourceState
D = DestinationState
OURS = (D.COMMITTING, D.COMMITTED)
TOLD = (ev.SourceLost, ev.ClientAborted, ev.Withdrawn)
MESSAGES = frozenset(get_args(Message))
LATE = "the shell cannot bring it about: "
CLEARED = LATE + "the timer was cleared at the end of the lease's phase"
NOT_TOLD = LATE + "only migrations under way are told"
NEVER_MET: dict[tuple[Any, type], str] = {
    (S.CLOSING, ev.RequestDescribed): LATE + "an end while describing needs no closing",
    (S.CLOSING, ev.RequestUnmovable): LATE + "an end while describing needs no closing",
    (D.IDLE, ev.ClientAborted): LATE + "an unknown migration is refused when it comes",
    (D.HOLDING, ev.SendFailed): LATE + "nothing is said while holding",
    (D.PREPARING, msg.Grow): LATE + "a source grows after `Prepared` only",
    **{(state, ev.TimerFired): CLEARED for state in (D.WITHDRAWING, D.RELEASING, *OURS, D.CLOSED)},
    **{(state, kind): NOT_TOLD for state in (D.COMMITTED, D.CLOSED) for kind in TOLD},
}
"""Rows of the table for events that come only if a shell errs; they are fed by hand."""
BY_HAND: dict[type, Any] = {
    ev.RequestDescribed: ev.RequestDescribed(LIVE.description),
    ev.RequestUnmovable: ev.RequestUnmovable("no"),
    ev.ClientAborted: ev.ClientAborted(),
    ev.SourceLost: ev.SourceLost(),
    ev.Withdrawn: ev.Withdrawn("off"),
    ev.SendFailed: ev.SendFailed("no way"),
    ev.TimerFired: ev.TimerFired(Timer.LEASE),
    msg.Grow: msg.Grow(migration_id="m", num_tokens=8),
}


@dataclass(frozen=True, slots=True)
class Met:
    """What the explorations met."""

    machines: Mapping[Any, tuple[tuple[Machines, int], ...]]
    """By state: snapshots that real runs produced."""
    led_to: Mapping[tuple[Any, type], frozenset[Any]]
    """Where each pair led."""


@pytest.fixture(scope="module")
def met() -> Met:
    machines: defaultdict[Any, dict[Any, tuple[Machines, int]]] = defaultdict(dict)
    led_to: defaultdict[tuple[Any, type], frozenset[Any]] = defaultdict(frozenset)
    for scenario in PAIRS:
        world = ProtocolWorld(scenario)
        found = world.explore()
        assert found.broken is None, str(found.broken)
        for pair, states in world.machines.covered.items():
            led_to[pair] |= states
        for number in world.machines.snapshots():
            machine = world.machines.look(number)
            machines[machine.state].setdefault(snapshot(machine), (world.machines, number))
    return Met({state: tuple(found.values()) for state, found in machines.items()}, led_to)


def snapshot(machine: Any) -> tuple[object, ...]:
    return tuple(getattr(machine, field.name) for field in fields(machine))


def pairs(states: Any, union: Any, table: Any, *, is_named: bool) -> list[Any]:
    kinds = sorted(get_args(union), key=lambda kind: kind.__name__)
    chosen = [(state, kind) for state in states for kind in kinds if ((state, kind) in table) is is_named]
    return [pytest.param(state, kind, id=f"{state.name}-{kind.__name__}") for state, kind in chosen]


TABLES: Any = ((S, SourceEvent, SOURCE_TABLE), (D, DestinationEvent, DESTINATION_TABLE))
ALL_PAIRS = [(state, kind) for states, union, _ in TABLES for state in states for kind in get_args(union)]
NAMED = [param for table in TABLES for param in pairs(*table, is_named=True)]
ABSENT = [param for table in TABLES for param in pairs(*table, is_named=False)]


def test_named_and_absent_pairs_are_all_pairs() -> None:
    assert (
        len(NAMED) + len(ABSENT)
        == len(ALL_PAIRS)
        == len(S) * len(get_args(SourceEvent)) + len(D) * len(get_args(DestinationEvent))
    )


def test_real_runs_produce_machines_in_every_state(met: Met) -> None:
    assert set(met.machines) == {*S, *D}
    assert sum(map(len, met.machines.values())) > 500


@pytest.mark.parametrize(("state", "kind"), NAMED)
def test_a_pair_of_the_table_is_met_or_comes_only_if_a_shell_errs(state: Any, kind: type, met: Met) -> None:
    table: Any = SOURCE_TABLE if isinstance(state, S) else DESTINATION_TABLE
    if (state, kind) not in NEVER_MET:
        assert met.led_to.get((state, kind)), "no run meets it"
        assert met.led_to[state, kind] <= table[state, kind]
        return
    assert (state, kind) not in met.led_to, "it is met after all"
    for machines, number in met.machines[state]:
        machine = machines.copy(number)
        machine.on(BY_HAND[kind], 0.0)
        machine.check_integrity()
        assert machine.state in table[state, kind]


@pytest.mark.parametrize(("state", "kind"), ABSENT)
def test_any_other_pair_is_turned_away_and_changes_nothing(state: Any, kind: type, met: Met) -> None:
    error = RemoteProtocolError if kind in MESSAGES else LocalProtocolError
    event: Any = next((message for message in EXAMPLES if type(message) is kind), None) or object.__new__(kind)
    for machines, number in met.machines[state]:
        machine = machines.copy(number)
        with pytest.raises(error, match=f"{kind.__name__} in state {state.name}"):
            machine.on(event, 0.0)
        assert machines.is_same(number, machine)


def test_a_client_that_leaves_in_any_state_of_the_source_ends_as_documented(met: Met) -> None:
    """Before `Commit` was sent it ends there; afterwards only the peer's answer decides."""
    open_states = [state for state in S if state not in (S.IDLE, S.COMMITTING, S.CLOSING, S.DONE)]
    for state in open_states:
        for machines, number in met.machines[state]:
            machine = machines.copy(number)
            effects = machine.on(ev.ClientAborted(), 0.0)
            assert machine.ending.outcome is Outcome.ABORTED_BY_CLIENT, state
            has_told = any(isinstance(e, ef.Send) and isinstance(e.message, msg.Cancel) for e in effects)
            assert has_told is (state is not S.DESCRIBING)
            assert (ef.ReleaseRequest() in effects) is (machine.stopped is not None)
    for machines, number in met.machines[S.COMMITTING]:
        machine = machines.copy(number)
        assert machine.on(ev.ClientAborted(), 0.0) == [] and machine.is_client_gone


def test_a_client_that_leaves_in_any_state_of_the_destination_frees_its_blocks_or_is_aborted(met: Met) -> None:
    for state in (D.HOLDING, D.GROWING, D.HELD, D.PREPARING, D.COMMITTING):
        for machines, number in met.machines[state]:
            machine = machines.copy(number)
            effects = machine.on(ev.ClientAborted(), 0.0)
            match state:
                case D.HOLDING | D.GROWING:  # the engine is at work: what it holds is given back after that
                    effects = machine.on(ev.EngineFailed("too late"), 0.0)
                    assert effects == [ef.GiveBack()]
                case D.COMMITTING:
                    assert ef.AbortRequest() in machine.on(ev.RequestCommitted(), 0.0)
                case _:
                    assert effects[-1] == ef.GiveBack()
            assert machine.outcome in (Outcome.ABORTED_BY_CLIENT, Outcome.COMMITTED)


def test_a_full_destination_ends_in_a_refusal_with_nothing_held(met: Met) -> None:
    for state in (D.HOLDING, D.GROWING, D.PREPARING, D.COMMITTING):
        for machines, number in met.machines[state]:
            machine = machines.copy(number)
            effects = machine.on(ev.EngineRefused("no block is free"), 0.0)
            if state is not D.HOLDING:  # it holds something
                assert effects[-1] == ef.GiveBack()
                effects = machine.on(ev.BlocksGivenBack(), 0.0)
            assert effects[-1] == ef.Send(msg.Refused(migration_id="m", reason="no block is free"))
            assert machine.state is D.CLOSED and machine.outcome is Outcome.REFUSED and machine.reservation is None
