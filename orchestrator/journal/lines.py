"""What is a line of a journal? A checkpoint, which all after it rests on, or an event and what the core made of it.

Every part of a journal begins with a checkpoint, so each can be read and replayed without those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from instance.messages import LoadReport, RequestReport
from orchestrator.effects import Effect
from orchestrator.errors import JournalError
from orchestrator.events import Event, ReportReceived, RequestsReceived
from orchestrator.journal.difference import difference, patched
from orchestrator.journal.values import plain, value_of

SCHEMA = 1
"""Raised when a reader of the last one could not read the new one."""
VERSION = "0.1.0"
"""Of kvferry, as in pyproject.toml."""
MAX_INSTANCES_KEPT = 1024
"""Instances whose last reports are remembered; of others a report is written in full."""
_BEGINNING = b'{"kvferry_journal":'


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All the core knew at `now_s`; what comes after differs from here."""

    run: str
    """Names one life of the orchestrator."""
    part: int
    """Of the run, from 1."""
    now_s: float
    wall: str
    """UTC, for people."""
    version: str
    """Of kvferry."""
    core: Any
    """`core_state`; None when it could not be written."""
    num_lost: int = 0
    """Events before it that are missing: they came faster than the disk took them."""
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Entry:
    """One event, and what followed."""

    now_s: float
    """What the core took for the time."""
    wall: str
    event: Event
    effects: tuple[Any, ...] = ()
    """As `plain` writes them."""
    raised: str = ""
    """Kind and text of the error that the core raised instead."""

    def effect_values(self) -> tuple[Effect, ...]:
        """Raises JournalError when one of them is not of this version."""
        effects = tuple(value_of(effect) for effect in self.effects)
        for effect in effects:
            if type(effect) not in _EFFECTS:
                raise JournalError(f"{type(effect).__name__} is no effect of this version")
        return effects


Line = Checkpoint | Entry
_EVENTS = frozenset(get_args(Event))
_EFFECTS = frozenset(get_args(Effect))
_ENCODER = msgspec.json.Encoder()


@dataclass(slots=True)
class _LastReports:
    """What differences refer to, since the last checkpoint."""

    of: OrderedDict[tuple[str, str], LoadReport | RequestReport] = field(default_factory=OrderedDict)

    def swap(self, key: tuple[str, str], report: LoadReport | RequestReport) -> LoadReport | RequestReport | None:
        """The last one, which this one replaces."""
        last = self.of.pop(key, None)
        self.of[key] = report
        while len(self.of) > 2 * MAX_INSTANCES_KEPT:
            self.of.popitem(last=False)
        return last


class LineWriter:
    """Values to lines."""

    def __init__(self) -> None:
        self._last = _LastReports()

    def checkpoint(self, line: Checkpoint) -> bytes:
        self._last = _LastReports()
        return _ENCODER.encode(
            {
                "kvferry_journal": line.schema,
                "version": line.version,
                "run": line.run,
                "part": line.part,
                "s": line.now_s,
                "at": line.wall,
                "lost": line.num_lost,
                "core": line.core,
            }
        )

    def entry(self, event: Event, effects: Sequence[Effect], now_s: float, wall: str, raised: str = "") -> bytes:
        """Raises Unwritable, and TypeError where JSON has no such number."""
        written: dict[str, Any] = {"s": now_s, "at": wall, "on": type(event).__name__}
        if isinstance(event, ReportReceived | RequestsReceived):
            written |= self._report(written["on"], event.report)
        else:
            written["is"] = plain(event)
        if effects:
            written["then"] = [plain(effect) for effect in effects]
        if raised:
            written["raised"] = raised
        return _ENCODER.encode(written)

    def _report(self, kind: str, report: LoadReport | RequestReport) -> dict[str, Any]:
        last = self._last.swap((kind, report.instance), report)
        if last is None:
            return {"report": plain(report)}
        return {"of": report.instance, **difference(last, report)}


class LineReader:
    """Lines to values, in the order they were written."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], LoadReport | RequestReport] = {}
        self._has_begun = False

    def read(self, text: bytes) -> Line:
        """Raises JournalError with what is wrong; the caller knows the file and the line."""
        try:
            written = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise JournalError(f"it is not JSON: {error}") from error
        if not isinstance(written, dict):
            raise JournalError("it is no line of a journal")
        try:
            if "kvferry_journal" in written:
                return self._checkpoint(written)
            return self._entry(written)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise JournalError(f"it is no line of a journal ({type(error).__name__}: {error})") from error

    def _checkpoint(self, written: dict[str, Any]) -> Checkpoint:
        schema = written["kvferry_journal"]
        if schema != SCHEMA:
            other = f"by kvferry {written.get('version', 'of an unknown version')}"
            raise JournalError(f"it was written {other} in schema {schema}, and this one reads schema {SCHEMA}")
        self._last, self._has_begun = {}, True
        return Checkpoint(
            run=str(written["run"]),
            part=_of_type(written["part"], int),
            now_s=float(_of_type(written["s"], float)),
            wall=str(written["at"]),
            version=str(written["version"]),
            core=written["core"],
            num_lost=_of_type(written["lost"], int),
        )

    def _entry(self, written: dict[str, Any]) -> Entry:
        if not self._has_begun:
            raise JournalError("it does not begin with a checkpoint: it is not a journal of kvferry")
        kind = written["on"]
        event: Any
        if kind in (ReportReceived.__name__, RequestsReceived.__name__):
            report = self._report(kind, written)
            event = ReportReceived(report) if isinstance(report, LoadReport) else RequestsReceived(report)
        else:
            event = value_of(written["is"])
        if type(event) not in _EVENTS:
            raise JournalError(f"{kind!r} is no event of this version")
        effects = tuple(_of_type(written.get("then", []), list))
        return Entry(_of_type(written["s"], float), str(written["at"]), event, effects, str(written.get("raised", "")))

    def _report(self, kind: str, written: dict[str, Any]) -> LoadReport | RequestReport:
        if "report" in written:
            report = value_of(written["report"])
        else:
            last = self._last.get((kind, written["of"]))
            if last is None:
                raise JournalError(f"the report of {written['of']} that this one differs from is missing")
            report = patched(last, written)
        if not isinstance(report, LoadReport if kind == ReportReceived.__name__ else RequestReport):
            raise JournalError("a report is of the wrong kind")
        self._last[kind, report.instance] = report
        return report


def begins_a_journal(text: bytes) -> bool:
    """Whether a file that begins so is (or was meant as) a journal."""
    return text.startswith(_BEGINNING) or (len(text) < len(_BEGINNING) and _BEGINNING.startswith(text))


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
