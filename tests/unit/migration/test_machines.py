"""Do both machines keep to their table? Every pair of state and event, met on walks through the real machines."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from migration import events as ev
from migration import messages as msg
from migration.destination import DestinationMachine
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.events import DestinationEvent, SourceEvent
from migration.messages import ToDestination, ToSource
from migration.params import MigrationParams
from migration.source import SourceMachine
from migration.table import DESTINATION_TABLE, SOURCE_TABLE, DestinationState, SourceState
from migration.types import Epoch, Incarnation, InstanceId, Migration, MigrationId, RequestId
from tests.support.message_examples import EXAMPLES

A = Incarnation(InstanceId("a"), Epoch(1), "tcp://a")
B = Incarnation(InstanceId("b"), Epoch(1), "tcp://b")


def kinds_of(union: Any) -> frozenset[type]:
    return frozenset(get_args(union))


def source() -> SourceMachine:
    return SourceMachine(Migration(MigrationId("m"), RequestId("r"), A, B), MigrationParams())


def destination() -> DestinationMachine:
    return DestinationMachine(MigrationId("m"), 10.0)


def snapshot(machine: Any) -> tuple[object, ...]:
    return tuple(getattr(machine, field.name) for field in fields(machine))


def bare(kind: type) -> Any:
    """An event of this kind, its fields unset where that can be: a machine turns it away before it looks inside."""
    return next((message for message in EXAMPLES if type(message) is kind), None) or object.__new__(kind)


def missing(table: Any, states: Any, union: Any) -> list[Any]:
    """The pairs that the table does not name."""
    kinds = sorted(kinds_of(union), key=lambda kind: kind.__name__)
    pairs = [(state, kind) for state in states for kind in kinds if (state, kind) not in table]
    return [pytest.param(state, kind, id=f"{state.name}-{kind.__name__}") for state, kind in pairs]


def test_the_tables_name_only_events_that_exist_and_reach_every_state() -> None:
    assert {event for _, event in SOURCE_TABLE} == kinds_of(SourceEvent)
    assert {event for _, event in DESTINATION_TABLE} == kinds_of(DestinationEvent)
    assert {state for targets in SOURCE_TABLE.values() for state in targets} == set(SourceState) - {SourceState.IDLE}
    reached = {state for targets in DESTINATION_TABLE.values() for state in targets}
    assert reached == set(DestinationState) - {DestinationState.IDLE}


def test_nothing_leads_out_of_done() -> None:
    assert not [event for state, event in SOURCE_TABLE if state is SourceState.DONE]


def test_only_an_answer_or_the_peers_end_leads_out_of_committing() -> None:
    leaving = {
        event
        for (state, event), targets in SOURCE_TABLE.items()
        if state is SourceState.COMMITTING and targets != {state}
    }
    assert leaving == {msg.Committed, msg.Refused, ev.DestinationLost}


def test_nothing_leads_out_of_committed_or_closed() -> None:
    for state in (DestinationState.COMMITTED, DestinationState.CLOSED):
        assert all(targets == {state} for (where, _), targets in DESTINATION_TABLE.items() if where is state)


@pytest.mark.parametrize(("state", "kind"), missing(SOURCE_TABLE, SourceState, SourceEvent))
def test_a_source_turns_away_what_its_table_does_not_name_and_changes_nothing(state: SourceState, kind: type) -> None:
    machine = source()
    machine.state = state
    before = snapshot(machine)
    error = RemoteProtocolError if kind in kinds_of(ToSource) else LocalProtocolError
    with pytest.raises(error, match=f"{kind.__name__} in state {state.name}"):
        machine.on(bare(kind), 0.0)
    assert snapshot(machine) == before


@pytest.mark.parametrize(("state", "kind"), missing(DESTINATION_TABLE, DestinationState, DestinationEvent))
def test_a_destination_turns_away_what_its_table_does_not_name_and_changes_nothing(
    state: DestinationState, kind: type
) -> None:
    machine = destination()
    machine.state = state
    before = snapshot(machine)
    error = RemoteProtocolError if kind in kinds_of(ToDestination) else LocalProtocolError
    with pytest.raises(error, match=f"{kind.__name__} in state {state.name}"):
        machine.on(bare(kind), 0.0)
    assert snapshot(machine) == before
