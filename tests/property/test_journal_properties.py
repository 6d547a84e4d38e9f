"""Does a journal hold all that the core's decisions rest on, whatever happens, and does every value come back?"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instance.messages import LoadReport, RequestLoad, RequestReport
from migration.types import Epoch, Incarnation
from orchestrator.core import Orchestrator
from orchestrator.effects import Effect
from orchestrator.errors import LimitExceeded
from orchestrator.events import Event, InstanceStarted, ReportReceived, ScaleRequested, Ticked, Token
from orchestrator.journal.difference import difference, patched
from orchestrator.journal.lines import Checkpoint, Entry, LineReader, LineWriter
from orchestrator.journal.replay import Replay
from orchestrator.journal.values import core_of, core_state, known_classes, plain, value_of
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.runtime.journal import JournalParams
from orchestrator.state import CoreParams, ScalingParams
from tests.support.core_stories import NAMES, Story, stories
from tests.support.reports import load_report
from tests.support.written_journal import START_S, read, write_story

UNTIMED = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no finding."""
PARAMS = CoreParams(
    rebalance=RebalanceParams(margin_steps=16, rest_s=2.0),
    max_instances=3,
    max_waiters=2,
    scaling=ScalingParams(can_start=True, most=4, capacity=4, first_epoch=2, start_timeout_s=20.0, backoff_s=1.0),
)
LEFT_OUT = 5
"""Of every story: the report of ten requests on a full instance; a tick comes next."""
ONE_PART = JournalParams(flush_s=0.0)
SMALL = JournalParams(max_part_bytes=16_384, turn_at=0.5, max_parts=50, flush_s=0.0)


def any_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type as an event or effect declares it, derived from the declaration."""
    hint = getattr(hint, "__supertype__", hint)
    origin, args = typing.get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return any_of(args[0])
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(any_of(arg) for arg in args))
    if origin is tuple:
        return st.lists(any_of(args[0]), max_size=3).map(tuple) if args[-1] is ... else st.tuples(*map(any_of, args))
    if origin is frozenset:
        return st.frozensets(any_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(any_of(args[0]), any_of(args[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, msgspec.Struct)):
        made: Any = hint
        hints = get_type_hints(hint)
        return st.fixed_dictionaries({name: any_of(hints[name]) for name in fields_of(hint)}).map(
            lambda values: made(**values)
        )
    if hint is int:
        return st.integers(-(2**63), 2**63 - 1)
    if hint is float:
        return st.floats(allow_nan=False)  # which equals nothing; a test of its own has it
    return st.from_type(hint)


def fields_of(kind: Any) -> tuple[str, ...]:
    if issubclass(kind, msgspec.Struct):
        return tuple(kind.__struct_fields__)
    return tuple(field.name for field in dataclasses.fields(kind))


def through_json(written: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(written))


@pytest.mark.parametrize("kind", [*get_args(Event), *get_args(Effect)], ids=lambda kind: kind.__name__)
def test_every_event_and_effect_can_be_written_and_read(kind: type) -> None:
    @settings(max_examples=25, deadline=None)
    @given(any_of(kind))
    def holds(value: object) -> None:
        again = value_of(through_json(plain(value)))
        assert type(again) is kind and again == value

    holds()


@UNTIMED
@given(st.integers(0, 3))
def test_the_state_of_a_core_that_starts_and_empties_instances_can_be_written(num_ticks: int) -> None:
    """Random stories come there now and then only."""
    core, now_s = Orchestrator(PARAMS), START_S
    for name in NAMES[:2]:
        core.on(InstanceStarted(Incarnation(name, Epoch(1), f"tcp://{name}"), f"a-{name}", "tiny", 16, 400), now_s)
        core.on(ReportReceived(load_report(name, total_blocks=400, free_blocks=400)), now_s)
    for target, seen in ((1, "retiring"), (3, "starting")):
        core.on(ScaleRequested(Token(target), target), now_s)
        for _ in range(2 + num_ticks):  # the one that was being emptied is put back before another is started
            core.on(Ticked(), now_s)
        scaling = core.snapshot(now_s).scaling
        assert scaling is not None and getattr(scaling, seen), "or nothing is tested"
        again = core_of(through_json(core_state(core)))
        assert again.snapshot(now_s) == core.snapshot(now_s) and core_state(again) == core_state(core)
        assert again.on(Ticked(), now_s + 30.0) == core.on(Ticked(), now_s + 30.0), "also where a start is given up"
        core.check_integrity()


def test_no_field_of_an_event_or_effect_is_named_like_a_secret() -> None:
    secret = ("secret", "password", "authorization", "bearer", "api_key", "credential", "prompt_text", "payload")
    names = {
        f"{kind.__name__}.{name}"
        for kind in known_classes().values()
        if not issubclass(kind, Enum)
        for name in fields_of(kind)
    }
    assert {name for name in names if any(word in name.lower() for word in secret)} == set()
    assert "StartMigration.reason" in names and "RequestLoad.external_id" in names, "the walk reaches what is inside"


@UNTIMED
@given(stories(), st.sampled_from([ONE_PART, SMALL]))
def test_the_core_does_what_the_journal_of_any_story_says(story: Story, params: JournalParams) -> None:
    """In one part, and in several."""
    with tempfile.TemporaryDirectory() as folder:
        write_story(Path(folder, "j"), story, params, PARAMS, is_paced=params is SMALL)
        told, replay = read(Path(folder, "j"))
    assert replay.divergence is None
    assert (replay.num_verified, replay.num_lost, replay.num_unverified) == (len(story), 0, 0)
    assert sum(told.summary.events.values()) == len(story)


@UNTIMED
@given(stories(), st.data())
def test_a_core_restored_in_the_middle_of_a_story_goes_on_as_the_other_one(story: Story, data: st.DataObject) -> None:
    first, now_s = Orchestrator(PARAMS), START_S
    second: Orchestrator | None = None
    cut = data.draw(st.integers(0, len(story)), label="restored after")
    for number, (gap_s, event) in enumerate(story):
        if number == cut:
            second = core_of(through_json(core_state(first)))
            second.check_integrity()
            assert core_state(second) == core_state(first)
        now_s += gap_s
        assert second is None or reaction(second, event, now_s) == reaction(first, event, now_s)
        if second is None:
            reaction(first, event, now_s)
    if second is not None:
        assert core_state(second) == core_state(first)
        assert second.snapshot(now_s) == first.snapshot(now_s)


def reaction(core: Orchestrator, event: Event, now_s: float) -> object:
    try:
        return core.on(event, now_s)
    except LimitExceeded as error:
        return str(error)


@UNTIMED
@given(stories())
def test_a_replay_without_the_first_report_of_requests_is_noticed_where_it_mattered(story: Story) -> None:
    """The control: it diverges exactly where a core that was not told of them does otherwise."""
    whole, without, replay = Orchestrator(PARAMS), Orchestrator(PARAMS), Replay()
    replay.take(checkpoint_of(without), "1")
    now_s, left_out, expected = START_S, LEFT_OUT, ""
    for number, (gap_s, event) in enumerate(story):
        now_s += gap_s
        effects = reaction(whole, event, now_s)
        if number == left_out:
            continue
        if not expected and reaction(without, event, now_s) != effects:
            expected = str(number)
        if isinstance(effects, list):
            replay.take(Entry(now_s, "", event, tuple(map(plain, effects))), str(number))
        else:
            replay.take(Entry(now_s, "", event, raised=f"LimitExceeded: {effects}"), str(number))
    assert expected == str(LEFT_OUT + 1), "the tick that comes next would have moved something"
    assert replay.divergence is not None and replay.divergence.where == expected


@UNTIMED
@given(st.lists(any_of(RequestReport), min_size=2, max_size=6))
def test_a_report_follows_from_the_one_before_it(reports: list[RequestReport]) -> None:
    for old, new in itertools.pairwise(reports):
        assert patched(old, through_json(difference(old, new))) == new


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 300), st.floats(0, 1e6), st.booleans()).map(
        lambda drawn: RequestLoad(
            f"r{drawn[0]}", "", "running", 0, 7, drawn[1], 99, drawn[1] // 16, round(drawn[2], 3), drawn[3]
        )
    ),
    max_size=6,
)


@UNTIMED
@given(st.lists(ROWS, min_size=2, max_size=5))
def test_requests_that_come_go_and_change_places_are_told_by_what_differs(rows: list[list[RequestLoad]]) -> None:
    """Names may even stand there twice: a hostile instance may say so."""
    reports = [RequestReport("instance-0", 1, step, tuple(requests)) for step, requests in enumerate(rows)]
    for old, new in itertools.pairwise(reports):
        assert patched(old, through_json(difference(old, new))) == new


@UNTIMED
@given(any_of(LoadReport), any_of(LoadReport))
def test_a_load_report_follows_from_the_one_before_it(old: LoadReport, new: LoadReport) -> None:
    assert patched(old, through_json(difference(old, new))) == new


def test_numbers_that_json_does_not_have_come_back() -> None:
    writer, reader = LineWriter(), LineReader()
    reader.read(writer.checkpoint(checkpoint_of(Orchestrator(CoreParams()))))
    for value in (float("nan"), float("inf"), float("-inf"), 1e-300, -0.0):
        report = msgspec.structs.replace(EMPTY, step_time_s=value)
        line = reader.read(writer.entry(ReportReceived(report), (), START_S, ""))
        assert isinstance(line, Entry) and isinstance(line.event, ReportReceived)
        assert repr(line.event.report.step_time_s) == repr(value)


EMPTY = LoadReport("instance-0", 1, 1, "serving", 16, 10, 10, 0, 0, 0, (), 0, 0, 0.0, 0, 0, 0)


def checkpoint_of(core: Orchestrator) -> Checkpoint:
    return Checkpoint("run", 1, START_S, "2026-11-22T00:00:00.000Z", "0", core_state(core))
