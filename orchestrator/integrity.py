"""Do the records of instances, of moves in flight and of those who wait for a drain fit each other? For tests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.events import MigrationNumber, Token
from orchestrator.state import CoreParams, GatewayRecord, InstanceRecord, MigrationRecord


def check_records(
    instances: Mapping[InstanceId, InstanceRecord],
    gateways: Mapping[str, GatewayRecord],
    in_flight: Mapping[MigrationNumber, MigrationRecord],
    history: Iterable[MigrationRecord],
    params: CoreParams,
) -> None:
    """Raise AssertionError when two of them contradict each other or a bound of `params` is passed."""
    assert len(instances) <= params.max_instances
    assert len(gateways) <= params.max_gateways
    moving = [record.request_id for record in in_flight.values()]
    assert len(moving) == len(set(moving)), "a request moves twice at once"
    assert all(record.outcome is None for record in in_flight.values())
    assert all(record.outcome is not None for record in history)
    for instance, record in instances.items():
        assert record.instance == instance
        assert record.state in (State.SERVING, State.DRAINING), "an ended instance is among the living"
        assert not record.drained or record.state is State.DRAINING
        sends = sum(move.source == record.incarnation for move in in_flight.values())
        receives = sum(move.destination == record.incarnation for move in in_flight.values())
        assert sends <= params.max_migrations_out, "too many migrations out"
        assert receives <= params.max_migrations_in, "too many migrations in"


def check_waiters(
    drain_waiters: Mapping[Token, InstanceId], instances: Mapping[InstanceId, InstanceRecord], params: CoreParams
) -> None:
    """Raise AssertionError unless each waits for an instance that drains."""
    assert len(drain_waiters) <= params.max_waiters
    for token, waited_for in drain_waiters.items():
        assert waited_for in instances, "a waiter of no instance"
        assert instances[waited_for].state is State.DRAINING, f"token {token} waits for no drain"
