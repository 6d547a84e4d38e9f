"""What was decided, when, why, and what came of it? A journal as rows for people, and a summary of them.

Events and effects that have no words of their own here are told by their names and fields, so that none is left out.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from migration.types import Incarnation, InstanceId, Outcome
from orchestrator.effects import (
    Answer,
    Drained,
    FenceInstance,
    Refused,
    SetDraining,
    StartMigration,
    UpdateMembers,
    UpdatePriorities,
)
from orchestrator.errors import JournalError
from orchestrator.events import (
    DrainingSet,
    Event,
    GatewayLost,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    MigrationEnded,
    MigrationNumber,
    ReportReceived,
    RequestsReceived,
    Ticked,
    WaiterGone,
)
from orchestrator.journal.lines import Checkpoint, Entry, Line
from orchestrator.journal.values import CONTENT, KIND, Unwritable, plain

QUIET = (ReportReceived, RequestsReceived, Ticked, WaiterGone, MigrationEnded, DrainingSet)
"""Told by what follows from them, or by the row they complete."""
_REQUEST_KEYS = frozenset({"request_id", "reference", "external_id"})
_INSTANCE_KEYS = frozenset({"instance", "source", "destination", "peers"})
_TOLD_ELSEWHERE = frozenset({KIND, "reason", "signal_age_s", "token"})
_MAX_TEXT = 160
IN_FLIGHT = "in flight at the end"


@dataclass(slots=True)
class Row:
    """One decision, or one thing that happened to the cluster."""

    now_s: float
    wall: str
    what: str
    why: str
    age_s: float | None = None
    """Of the oldest signal it rests on."""
    came_of_it: str = ""
    is_decision: bool = True
    requests: frozenset[str] = frozenset()
    instances: frozenset[str] = frozenset()
    gateways: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows; empty: any."""

    request: str = ""
    """Engine's or client's id, or a prefix."""
    instance: str = ""
    since_s: float | None = None
    """Seconds after the first line."""
    until_s: float | None = None
    since_wall: str = ""
    until_wall: str = ""
    """UTC, such as 2026-11-22T10:30; compared as text, so any beginning of a time will do."""

    def takes(self, row: Row, first_s: float) -> bool:
        after_s = row.now_s - first_s
        return (
            (not self.request or any(name.startswith(self.request) for name in row.requests))
            and (not self.instance or self.instance in row.instances)
            and (self.since_s is None or after_s >= self.since_s)
            and (self.until_s is None or after_s <= self.until_s)
            and row.wall >= self.since_wall
            and (not self.until_wall or row.wall[: len(self.until_wall)] <= self.until_wall)
        )


@dataclass(slots=True)
class Migrations:
    """Those of one cause."""

    outcomes: Counter[str] = field(default_factory=Counter)
    durations_s: list[float] = field(default_factory=list)
    """Of those that committed; from the decision to its end, as the orchestrator saw it."""
    stopped_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    first_s: float = 0.0
    last_s: float = 0.0
    first_wall: str = ""
    last_wall: str = ""
    num_runs: int = 0
    events: Counter[str] = field(default_factory=Counter)
    effects: Counter[str] = field(default_factory=Counter)
    migrations: dict[str, Migrations] = field(default_factory=dict)
    """By the first word of their reason."""
    ages_s: list[float] = field(default_factory=list)
    """Of the signals that decisions rest on."""


class Story:
    """Takes the lines of a journal one after the other."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.summary = Summary()
        self._run = ""
        self._in_flight: dict[MigrationNumber, tuple[Row, StartMigration]] = {}
        self._setting: dict[tuple[InstanceId, bool], Row] = {}
        self._draining: dict[InstanceId, Row] = {}
        self._clients: dict[str, str] = {}
        """Client's id of each request the reports named last, by engine's id."""

    def take(self, line: Line) -> None:
        """Raises JournalError when a value is not what its field should hold, or an effect is not of this version."""
        try:
            self._take(line)
        except (AttributeError, TypeError, ValueError, KeyError, Unwritable) as error:
            raise JournalError(f"a value is not what it should be ({type(error).__name__}: {error})") from error

    def _take(self, line: Line) -> None:
        if not self.summary.first_wall:
            self.summary.first_s, self.summary.first_wall = line.now_s, line.wall
        self.summary.last_s, self.summary.last_wall = line.now_s, line.wall
        if isinstance(line, Checkpoint):
            self._begin(line)
        else:
            self._entry(line)

    def _begin(self, line: Checkpoint) -> None:
        if line.num_lost:
            what = f"{line.num_lost} events are missing here"
            self.rows.append(
                Row(line.now_s, line.wall, what, "they came faster than the disk took them", None, "", False)
            )
        if line.run == self._run:
            return
        self._run = line.run
        self.summary.num_runs += 1
        self._in_flight, self._setting, self._draining, self._clients = {}, {}, {}, {}
        what = "an orchestrator starts" if line.part == 1 else f"the journal begins, at part {line.part} of its run"
        self.rows.append(Row(line.now_s, line.wall, what, f"run {line.run}, kvferry {line.version}", None, "", False))

    def _entry(self, line: Entry) -> None:
        event = line.event
        self.summary.events[type(event).__name__] += 1
        if isinstance(event, RequestsReceived):
            self._clients |= {item.request_id: item.external_id for item in event.report.requests}
        if isinstance(event, MigrationEnded):
            self._migration_ended(event, line.now_s)
        elif isinstance(event, DrainingSet):
            self._draining_set(event)
        elif not isinstance(event, QUIET):
            self._fact(line, event)
        for effect in line.effect_values():
            self.summary.effects[type(effect).__name__] += 1
            self._effect(line, event, effect)
        if line.raised:
            self.rows.append(self._row(line, event, f"the core refused {type(event).__name__}", line.raised))

    # ------------------------------------------------------------------ events
    def _fact(self, line: Entry, event: Event) -> None:
        match event:
            case InstanceStarted(incarnation=Incarnation(instance=instance, epoch=epoch)):
                what = f"{instance} started, epoch {epoch}, {event.total_blocks} blocks of {event.block_size} tokens"
            case InstanceLost():
                what = f"{event.instance} was lost, epoch {event.epoch}"
            case GatewayStarted():
                what = f"{event.gateway} started, {event.url}"
            case GatewayLost():
                what = f"{event.gateway} was lost"
            case _:
                what = _in_words(event)
        row = self._row(line, event, what, str(getattr(event, "reason", "")))
        row.is_decision = False
        self.rows.append(row)

    def _migration_ended(self, event: MigrationEnded, now_s: float) -> None:
        started = self._in_flight.pop(event.number, None)
        if started is None:
            return
        row, effect = started
        figures, after_s = event.figures, now_s - row.now_s
        row.came_of_it = f"{event.outcome.value} after {after_s:.2f} s"
        if event.outcome is Outcome.COMMITTED:
            row.came_of_it += (
                f", stopped {figures.stopped_s * 1e3:.1f} ms, {figures.copied_blocks + figures.tail_blocks} blocks"
                f" in {figures.num_stages} stages"
            )
        if event.reason:
            row.came_of_it += f" ({event.reason})"
        migrations = self.summary.migrations.setdefault(cause(effect.reason), Migrations())
        migrations.outcomes[IN_FLIGHT] -= 1
        migrations.outcomes[event.outcome.value] += 1
        if event.outcome is Outcome.COMMITTED:
            migrations.durations_s.append(after_s)
            migrations.stopped_s.append(figures.stopped_s)

    def _draining_set(self, event: DrainingSet) -> None:
        row = self._setting.pop((event.instance, event.draining), None)
        if row is not None:
            row.came_of_it = "confirmed" if event.error is None else f"not carried out: {event.error}"

    # ------------------------------------------------------------------ effects
    def _effect(self, line: Entry, event: Event, effect: object) -> None:
        age_s = getattr(effect, "signal_age_s", None)
        if isinstance(age_s, float):
            self.summary.ages_s.append(age_s)
        reason = str(getattr(effect, "reason", ""))
        match effect:
            case StartMigration():
                what = f"move {effect.request_id}: {effect.source.instance} -> {effect.destination.instance}"
                row = self._row(line, effect, what if effect.mode == "live" else f"{what} ({effect.mode})", reason)
                row.came_of_it = IN_FLIGHT
                self._in_flight[effect.number] = row, effect
                self.summary.migrations.setdefault(cause(reason), Migrations()).outcomes[IN_FLIGHT] += 1
            case SetDraining():
                what = f"{'drain' if effect.draining else 'undrain'} {effect.instance}"
                row = self._setting[effect.instance, effect.draining] = self._row(line, effect, what, reason)
                self._draining[effect.instance] = row
            case UpdateMembers():
                names = ", ".join(str(member.incarnation.instance) for member in effect.members) or "nobody"
                row = self._row(line, effect, f"tell the gateways who is there: {names}", reason)
            case UpdatePriorities():
                levels = ", ".join(f"{level.name} {level.rank}" for level in effect.levels.levels)
                what = f"tell the gateways the levels ({levels}) and the classes of {len(effect.key_classes)} keys"
                row = self._row(line, effect, what, reason)
            case FenceInstance():
                what = f"fence {effect.instance}, epoch {effect.epoch}, at {', '.join(effect.peers) or 'nobody'}"
                row = self._row(line, effect, what, reason)
            case Answer(result=Refused() as refused):
                row = self._row(line, event, f"refuse {_in_words(event)}", f"{refused.kind.value}: {refused.reason}")
            case Answer(result=Drained() as drained):
                told = self._draining.get(drained.instance)
                if told is not None and "empty" not in told.came_of_it:
                    told.came_of_it += f"{', ' if told.came_of_it else ''}empty after {line.now_s - told.now_s:.2f} s"
                return
            case Answer():
                return  # what it answers has a row of its own
            case _:
                row = self._row(line, effect, _in_words(effect), reason)
        row.age_s = age_s if isinstance(age_s, float) else None
        self.rows.append(row)

    def _row(self, line: Entry, about: object, what: str, why: str) -> Row:
        requests, instances = set[str](), set[str]()
        for key, name in _names(plain(about)):
            if key in _REQUEST_KEYS:
                requests |= {name, self._clients.get(name, name)}
            elif key in _INSTANCE_KEYS:
                instances.add(name)
        return Row(
            line.now_s, line.wall, what, why, requests=frozenset(requests - {""}), instances=frozenset(instances)
        )


def cause(reason: str) -> str:
    """Of a move: rebalance, defragment, drain, asked for, ..."""
    return reason.partition(":")[0]


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _names(written: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the value, with the field it stands in."""
    if isinstance(written, str):
        yield key, written
    elif isinstance(written, dict):
        for name, part in written.items():
            yield from _names(part, key if name == CONTENT else name)
    elif isinstance(written, list):
        for part in written:
            yield from _names(part, key)


def _in_words(value: object) -> str:
    """`DrainRequested(instance="instance-0")` as "drain requested: instance instance-0"."""
    name = " ".join(re.findall(r"[A-Z][a-z0-9]*", type(value).__name__)).lower()
    told = (f"{key} {_shown(part)}" for key, part in plain(value).items() if key not in _TOLD_ELSEWHERE)
    return _cut(": ".join(part for part in (name, ", ".join(told)) if part))


def _shown(written: Any) -> str:
    return written if isinstance(written, str) else msgspec.json.encode(written).decode()


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def chosen(rows: Iterable[Row], wanted: Wanted, first_s: float) -> list[Row]:
    return [row for row in rows if wanted.takes(row, first_s)]
