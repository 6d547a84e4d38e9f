"""How do reports stand in a journal without filling it? As what differs from the last one of the same instance.

Most of a fleet's events are reports, and most of a report is as it was: so many more tokens, so much older. A list of
requests is compared by columns, and a column in which most values have grown by the same is written as that one number.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from instance.messages import LoadReport, RequestLoad, RequestReport
from orchestrator.errors import JournalError
from orchestrator.journal.values import plain, value_of

_REQUEST_FIELDS = RequestLoad.__struct_fields__
_REQUESTS = "requests"
_LARGEST_S = 1e9
"""Of a time that is compared in milliseconds."""


def difference(old: LoadReport | RequestReport, new: LoadReport | RequestReport) -> dict[str, Any]:
    """What makes the new report of the old one: {"set": fields, "rows": order of requests, "columns": their values}."""
    written: dict[str, Any] = {}
    changed = {
        name: plain(getattr(new, name))
        for name in new.__struct_fields__
        if name != _REQUESTS and not _is_same(getattr(old, name), getattr(new, name))
    }
    if changed:
        written["set"] = changed
    if isinstance(old, RequestReport) and isinstance(new, RequestReport):
        written |= _rows_and_columns(old.requests, new.requests)
    return written


def patched(old: LoadReport | RequestReport, written: dict[str, Any]) -> LoadReport | RequestReport:
    """The new report. Raises JournalError when it does not fit the old one."""
    try:
        changed = {name: value_of(value) for name, value in written.get("set", {}).items()}
        if isinstance(old, RequestReport):
            changed[_REQUESTS] = _requests(old.requests, written)
        return msgspec.structs.replace(old, **changed)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise JournalError(f"a report does not follow from the one before it ({error})") from error


def _rows_and_columns(old: tuple[RequestLoad, ...], new: tuple[RequestLoad, ...]) -> dict[str, Any]:
    places = {request.request_id: place for place, request in enumerate(old)}
    rows = [places.get(request.request_id, -1) for request in new]
    written: dict[str, Any] = {}
    if rows != list(range(len(old))):
        written["rows"] = [
            place if place >= 0 else [plain(getattr(request, name)) for name in _REQUEST_FIELDS]
            for place, request in zip(rows, new, strict=True)
        ]
    kept = [(at, place) for at, place in enumerate(rows) if place >= 0]
    before = zip(*(msgspec.structs.astuple(old[place]) for _, place in kept), strict=True)
    after = zip(*(msgspec.structs.astuple(new[at]) for at, _ in kept), strict=True)
    columns = {
        name: _column(ones, others, [at for at, _ in kept])
        for name, ones, others in zip(_REQUEST_FIELDS, before, after, strict=False)
        if ones != others
    }
    if columns:
        written["columns"] = columns
    return written


def _requests(old: tuple[RequestLoad, ...], written: dict[str, Any]) -> tuple[RequestLoad, ...]:
    values: list[list[Any]] = []
    kept: list[list[Any]] = []
    for row in written.get("rows", range(len(old))):
        if isinstance(row, int):
            values.append(list(msgspec.structs.astuple(old[row])))
            kept.append(values[-1])
        else:
            values.append([value_of(item) for item in row])
    for name, column in written.get("columns", {}).items():
        at, by, exceptions = _REQUEST_FIELDS.index(name), column.get("by", 0), column.get("but", [])
        if by:
            for row in kept:
                row[at] = _later(row[at], by)
        for place, value in zip(exceptions[::2], exceptions[1::2], strict=True):
            values[place][at] = value_of(value)
    return tuple(RequestLoad(*row) for row in values)


def _column(before: tuple[Any, ...], after: tuple[Any, ...], places: list[int]) -> dict[str, Any]:
    """{"by": what most have grown by (whole numbers, or milliseconds), "but": [place, value, ...] of the others}."""
    steps = Counter(step for one, other in zip(before, after, strict=True) if (step := _step(one, other)) is not None)
    by = steps.most_common(1)[0][0] if steps else 0
    exceptions: list[Any] = []
    for one, other, at in zip(before, after, places, strict=True):
        if not _is_same(_later(one, by), other):
            exceptions += [at, plain(other)]
    return ({"by": by} if by else {}) | ({"but": exceptions} if exceptions else {})


def _step(one: object, other: object) -> int | None:
    """By what the value has grown; None unless it is a number that `_later` would make of it again."""
    if type(one) is int and type(other) is int:
        return other - one
    if type(one) is float and type(other) is float and abs(one) < _LARGEST_S and abs(other) < _LARGEST_S:
        step = round(other * 1000) - round(one * 1000)
        return step if _is_same(_later(one, step), other) else None
    return None


def _later(value: Any, by: int) -> Any:
    if not by or type(value) not in (int, float):
        return value
    if type(value) is int:
        return value + by
    return (round(value * 1000) + by) / 1000 if abs(value) < _LARGEST_S else value


def _is_same(one: object, other: object) -> bool:
    """Equal and of one kind; a number that is none is like no other."""
    return type(one) is type(other) and one == other
