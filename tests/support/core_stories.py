"""What may a core meet in its life? Random stories: processes that come and go, reports, commands, ticks, odd ends."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from instance.messages import LoadReport, RequestReport, StepTotals
from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    ChangeNumber,
    DrainingSet,
    DrainRequested,
    Event,
    GatewayLost,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    InstanceStartFailed,
    KeyClassRequested,
    LevelRequested,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    MigrationNumber,
    MigrationWithdrawn,
    PolicyUpdateRequested,
    PriorityAnswered,
    PriorityRequested,
    ReportReceived,
    RequestCancelled,
    RequestsReceived,
    ScaleRequested,
    Ticked,
    Token,
    UndrainRequested,
    WaiterGone,
)
from tests.support.reports import load_report, request_load

NAMES = tuple(InstanceId(f"instance-{number}") for number in range(4))
Story = list[tuple[float, Event]]
"""(seconds since the one before, event)"""
_names = st.sampled_from(NAMES)
_epochs = st.sampled_from([Epoch(1), Epoch(1), Epoch(1), Epoch(2)])
_tokens = st.integers(1, 6).map(Token)
_steps = st.integers(1, 40)
_draining = st.sampled_from(["serving", "serving", "draining"])


def _started(name: InstanceId, epoch: Epoch) -> InstanceStarted:
    return InstanceStarted(Incarnation(name, epoch, f"tcp://{name}"), f"kvferry-{name}-{epoch}", "tiny", 16, 400)


def _totals(num_steps: int, step_s: float) -> StepTotals:
    """Of steps that all took as long, each with eight that decoded; some of it prefill."""
    return StepTotals(
        num_steps, 90 * num_steps, 8 * num_steps, 0, 8 * num_steps, 4000 * num_steps, 0, step_s * num_steps
    )


@st.composite
def _loads(draw: st.DrawFn) -> LoadReport:
    step, step_s = draw(_steps), draw(st.sampled_from([0.0, 0.01, 0.01, 0.05]))
    load = load_report(
        draw(_names),
        epoch=draw(_epochs),
        step=step,
        state=draw(_draining),
        total_blocks=400,
        free_blocks=draw(st.sampled_from([0, 7, 60, 380, 400])),
        num_running=draw(st.integers(0, 12)),
        num_waiting=draw(st.sampled_from([0, 0, 1, 3])),
        head_of_line_blocks=draw(st.sampled_from([0, 0, 50, 120])),
        reserved_blocks=draw(st.sampled_from([0, 0, 5])),
        migrations_in=draw(st.integers(0, 1)),
        migrations_out=draw(st.integers(0, 1)),
    )
    return msgspec.structs.replace(load, steps=_totals(step, step_s)) if step_s else load


@st.composite
def _request_reports(draw: st.DrawFn) -> RequestReport:
    numbers = draw(st.lists(st.integers(0, 9), unique=True, max_size=8))
    requests = tuple(
        request_load(
            f"r{number}",
            draw(st.integers(1, 40)),
            status=draw(st.sampled_from(["running", "running", "running", "waiting", "preempted"])),
            priority=draw(st.integers(0, 2)),
            movable=draw(st.integers(0, 5)) > 0,
            tpot_s=draw(st.sampled_from([None, None, 0.002, 0.02])),
            ttft_s=draw(st.sampled_from([None, None, 1.2, 9.0])),
        )
        for number in numbers
    )
    return RequestReport(draw(_names), draw(_epochs), draw(_steps), requests)


_FIGURES = st.builds(
    MigrationFigures, num_stages=st.integers(0, 3), copied_blocks=st.integers(0, 9), stopped_s=st.floats(0, 0.1)
)
_references = st.sampled_from(["r1", "r", "client-r2", "none"])
_digests = st.sampled_from([digit * 64 for digit in "abc"])
_priority_answers = st.builds(
    PriorityAnswer, st.sampled_from(PriorityOutcome), st.integers(0, 2), st.sampled_from(RequestStatus)
)
_EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(_started, _names, _epochs),
    st.builds(ReportReceived, _loads()),
    st.builds(ReportReceived, _loads()),
    st.builds(RequestsReceived, _request_reports()),
    st.builds(RequestsReceived, _request_reports()),
    st.just(Ticked()),
    st.just(Ticked()),
    st.builds(MigrateRequested, _tokens, _references, _names),
    st.builds(
        MigrationEnded,
        st.integers(1, 12).map(MigrationNumber),
        st.sampled_from(Outcome),
        st.sampled_from(["", "no room"]),
        _FIGURES,
    ),
    st.builds(DrainRequested, _tokens, _names, st.booleans()),
    st.builds(UndrainRequested, _tokens, _names),
    st.builds(DrainingSet, _names, _epochs, st.booleans(), st.sampled_from([None, None, "no answer"])),
    st.builds(WaiterGone, _tokens),
    st.builds(PriorityRequested, _tokens, _references, st.sampled_from(["high", "normal", "3", "none"]), st.just("x")),
    st.builds(PriorityAnswered, st.integers(1, 9).map(ChangeNumber), st.one_of(st.none(), _priority_answers)),
    st.builds(
        KeyClassRequested, _tokens, _digests, st.sampled_from(["high", "normal", "3", None, "no level"]), st.just("x")
    ),
    st.builds(
        LevelRequested,
        _tokens,
        st.sampled_from(["high", "normal", "low", "none"]),
        st.sampled_from([None, -20, -10, 0, 5]),
        st.sampled_from([None, 0, 50, 200]),
        st.just("x"),
        validate_only=st.booleans(),
    ),
    st.builds(CancelRequested, _tokens, _references, st.booleans()),
    st.builds(RequestCancelled, _tokens, st.sampled_from([None, "no answer"])),
    st.builds(CancelMigrationRequested, _tokens, st.integers(1, 12).map(MigrationNumber)),
    st.builds(MigrationWithdrawn, _tokens, st.sampled_from([None, "no answer"])),
    st.builds(PolicyUpdateRequested, _tokens, st.just((("rebalance.margin_steps", 32.0), ("drain.max_moves", 4)))),
    st.builds(InstanceLost, _names, _epochs, st.just("killed")),
    st.builds(InstanceStartFailed, _names, st.integers(1, 8).map(Epoch), st.just("no node has a place")),
    st.builds(_started, _names, st.integers(2, 8).map(Epoch)),  # as the answer to a start, or late
    st.builds(
        ScaleRequested,
        _tokens,
        target=st.sampled_from([None, 1, 2, 3, 3]),
        fewest=st.sampled_from([None, None, 1, 2]),
        most=st.sampled_from([None, None, 3, 9]),
        is_automatic=st.sampled_from([None, True, False]),
    ),
    st.builds(lambda number: GatewayStarted(f"gateway-{number}", f"g-{number}", "http://here"), st.integers(0, 2)),
    st.builds(lambda number: GatewayLost(f"gateway-{number}", "killed"), st.integers(0, 2)),
)


@st.composite
def stories(draw: st.DrawFn, max_events: int = 60) -> Story:
    """Two instances that serve, one of them nearly full of requests, then anything."""
    beginning: Story = []
    for name in NAMES[:2]:
        beginning.append((0.01, _started(name, Epoch(1))))
        beginning.append((0.01, ReportReceived(load_report(name, total_blocks=400, free_blocks=400))))
    requests = tuple(request_load(f"r{number}", 38) for number in range(10))
    full = load_report(NAMES[0], step=2, total_blocks=400, free_blocks=20, num_running=10)
    beginning += [
        (0.01, ReportReceived(full)),
        (0.01, RequestsReceived(RequestReport(NAMES[0], 1, 2, requests))),
        (0.01, Ticked()),
    ]
    gaps = st.sampled_from([0.0, 0.013, 0.1, 0.4, 1.3, 11.0])
    return beginning + draw(st.lists(st.tuples(gaps, _EVENTS), max_size=max_events))
