"""Which requests does a trace file hold? Azure's CSV and Mooncake's JSONL, plain or gzipped; a bad row is one line."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

MAX_TRACE_ROWS = 1_000_000
MAX_TRACE_TOKENS = 10_000_000
"""No request of any published trace comes near; a larger number is a mistake in the file."""
COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
GZIP_MAGIC = b"\x1f\x8b"


class TraceError(ValueError):
    """The trace cannot be used; the text is one line, ``FILE:LINE: what is wrong``."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace: arrival in seconds from the trace's start, lengths in tokens (both at least 1)."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


class _JsonRow(msgspec.Struct, frozen=True):
    arrival_s: float
    input_tokens: int
    output_tokens: int


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """Every row of the file, in order of arrival. Raises TraceError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    try:
        text = (gzip.decompress(raw) if raw.startswith(GZIP_MAGIC) else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: the gzip file is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file (expected CSV or JSONL, plain or gzipped)") from error
    return parse_trace(text.splitlines(), str(path))


def parse_trace(lines: Iterable[str], name: str) -> tuple[TraceRow, ...]:
    """Parse CSV (with header) or JSONL, told apart by the first character; `name` is for errors. Raises TraceError."""
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TraceError(f"{name}: the trace is empty")
    if len(numbered) > MAX_TRACE_ROWS:
        raise TraceError(f"{name}: more than {MAX_TRACE_ROWS} rows; cut the file first")
    rows = list(_json_rows(numbered, name) if numbered[0][1].startswith("{") else _csv_rows(numbered, name))
    if not rows:
        raise TraceError(f"{name}: the trace has a header but no rows")
    # Sorting is stable: rows of the same arrival keep their order.
    return tuple(sorted(rows, key=lambda row: row.arrival_s))


def _json_rows(numbered: list[tuple[int, str]], name: str) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(_JsonRow)
    for number, line in numbered:
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{name}:{number}: {error}") from error
        yield _checked(TraceRow(row.arrival_s, row.input_tokens, row.output_tokens), f"{name}:{number}")


def _csv_rows(numbered: list[tuple[int, str]], name: str) -> Iterator[TraceRow]:
    number, header = numbered[0]
    names = [column.strip() for column in header.split(",")]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise TraceError(
            f"{name}:{number}: the header lacks {', '.join(missing)} (expected the columns {', '.join(COLUMNS)})"
        )
    places = tuple(names.index(column) for column in COLUMNS)
    for number, line in numbered[1:]:
        cells = line.split(",")
        where = f"{name}:{number}"
        if len(cells) != len(names):
            raise TraceError(f"{where}: {len(cells)} columns where the header has {len(names)}")
        arrival, given, wanted = (cells[place].strip() for place in places)
        yield _checked(
            TraceRow(
                _number(arrival, where, COLUMNS[0]), _count(given, where, COLUMNS[1]), _count(wanted, where, COLUMNS[2])
            ),
            where,
        )


def _number(cell: str, where: str, column: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise TraceError(f"{where}: {column} is {cell!r}, not a number of seconds") from error


def _count(cell: str, where: str, column: str) -> int:
    try:
        return int(cell)
    except ValueError as error:
        raise TraceError(f"{where}: {column} is {cell!r}, not a whole number of tokens") from error


def _checked(row: TraceRow, where: str) -> TraceRow:
    if not math.isfinite(row.arrival_s) or row.arrival_s < 0:
        raise TraceError(f"{where}: arrival_s is {row.arrival_s}; it must be a number of seconds, 0 or more")
    for column, tokens in (("input_tokens", row.input_tokens), ("output_tokens", row.output_tokens)):
        if not 1 <= tokens <= MAX_TRACE_TOKENS:
            raise TraceError(f"{where}: {column} is {tokens}; it must be between 1 and {MAX_TRACE_TOKENS}")
    return row
