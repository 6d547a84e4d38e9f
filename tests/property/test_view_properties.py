"""Are views what the records say, and those of a tick's later plans what they would be if they were made anew?"""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from instance.lifecycle import State
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator import view
from orchestrator.events import MigrationNumber
from orchestrator.policy.moves import InstanceView, Move
from orchestrator.state import CoreParams, InstanceRecord, MigrationRecord
from tests.support import slow_view
from tests.support.reports import load_report, request_load

NAMES = [InstanceId(f"instance-{number}") for number in range(5)]
EACH = 4
moves = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, EACH - 1)),
    max_size=8,
    unique_by=lambda move: (move[0], move[2]),
)


def record_of(name: InstanceId, age_s: float, copy_s: float) -> InstanceRecord:
    record = InstanceRecord(Incarnation(name, Epoch(1), "tcp://here"), name, "model", 16, 1000, 1)
    record.load, record.load_at_s = load_report(name, free_blocks=900, num_running=EACH), 10.0 - age_s
    record.take_requests(tuple(request_load(f"{name}-{number}") for number in range(EACH)), 10.0 - age_s)
    record.copy_s_per_block = copy_s
    return record


def begun(
    chosen: list[tuple[InstanceId, InstanceId, int]], records: dict[InstanceId, InstanceRecord], first: int
) -> tuple[dict[MigrationNumber, MigrationRecord], tuple[Move, ...]]:
    told = tuple(
        Move(RequestId(f"{source}-{number}"), source, destination, 0, 10, "because", 0.0)
        for source, destination, number in chosen
        if source != destination
    )
    in_flight = {
        MigrationNumber(first + at): view.begun(
            MigrationNumber(first + at),
            move,
            records[move.source].incarnation,
            records[move.destination].incarnation,
            10.0,
        )
        for at, move in enumerate(told)
    }
    return in_flight, told


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 5.0]), st.sampled_from([0.0, 0.01])), min_size=5, max_size=5),
    moves,
    st.integers(0, 8),
)
def test_views_taken_over_are_those_made_anew(
    instances: list[tuple[float, float]], chosen: list[tuple[InstanceId, InstanceId, int]], num_before: int
) -> None:
    records = {name: record_of(name, *how) for name, how in zip(NAMES, instances, strict=True)}
    params = CoreParams()
    earlier, _ = begun(chosen[:num_before], records, 1)
    since, told = begun(chosen[num_before:], records, 100)
    before = view.instance_views(records, earlier, params, 10.0)
    anew = view.instance_views(records, earlier | since, params, 10.0)
    again = view.instance_views(records, earlier | since, params, 10.0, (before, told))
    assert again == anew
    unmoved = {one.instance for one in before} - {name for move in told for name in (move.source, move.destination)}
    known: dict[InstanceId, InstanceView] = {one.instance: one for one in before}
    assert all(one is known[one.instance] for one in again if one.instance in unmoved), "else nothing is saved"


@st.composite
def records_and_moves(
    draw: st.DrawFn,
) -> tuple[dict[InstanceId, InstanceRecord], dict[MigrationNumber, MigrationRecord]]:
    """Of all states and ages; moves also of incarnations that are gone, and of requests that two instances list."""
    records = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        record = record_of(name, draw(st.sampled_from([0.0, 0.2, 1.5, 5.0])), draw(st.sampled_from([0.0, 0.01, 0.03])))
        assert record.load is not None
        word, reserved = draw(st.sampled_from(["serving", "draining"])), draw(st.sampled_from([0, 7, 30]))
        record.load = msgspec.structs.replace(record.load, state=word, reserved_blocks=reserved)
        if draw(st.integers(0, 3)) == 0:
            record.state = State.DRAINING
        if draw(st.integers(0, 4)) == 0:
            record.load = None
        if draw(st.booleans()):
            twice = tuple(request_load(f"{other}-{draw(st.integers(0, 1))}") for other in NAMES[:2])
            record.take_requests(record.requests + twice, draw(st.sampled_from([0.0, 8.0, 10.0])))
        records[name] = record
    in_flight = {}
    for number in range(draw(st.integers(0, 6))):
        source, destination = (
            Incarnation(draw(st.sampled_from(NAMES)), Epoch(draw(st.sampled_from([1, 1, 1, 2]))), "tcp://here")
            for _ in range(2)
        )
        request_id = RequestId(f"{source.instance}-{draw(st.integers(0, EACH - 1))}")
        blocks = draw(st.sampled_from([1, 10]))
        move = Move(request_id, source.instance, destination.instance, 0, blocks, "because", 0.0)
        in_flight[MigrationNumber(number)] = view.begun(MigrationNumber(number), move, source, destination, 10.0)
    return records, in_flight


@given(records_and_moves())
def test_views_are_those_of_the_rule_written_out(
    known: tuple[dict[InstanceId, InstanceRecord], dict[MigrationNumber, MigrationRecord]],
) -> None:
    records, in_flight = known
    params = CoreParams()
    assert view.instance_views(records, in_flight, params, 10.0) == slow_view.instance_views(
        records, in_flight, params, 10.0
    )


@given(moves)
def test_a_request_on_its_way_is_proposed_by_nobody_and_told_to_its_destination(
    chosen: list[tuple[InstanceId, InstanceId, int]],
) -> None:
    records = {name: record_of(name, 0.0, 0.0) for name in NAMES}
    in_flight, told = begun(chosen, records, 1)
    for move in told:  # committed, but its end is not known yet: both say that it is theirs
        records[move.destination].requests += (request_load(move.request_id),)
    views = {one.instance: one for one in view.instance_views(records, in_flight, CoreParams(), 10.0)}
    moving = {move.request_id for move in told}
    assert not any(RequestId(item.request_id) in moving for one in views.values() for item in one.requests)
    for name, one in views.items():
        assert {item.request_id for item in one.arriving} == {
            move.request_id for move in told if move.destination == name
        }
        assert len(one.requests) == EACH - sum(move.source == name for move in told)
