"""Where are published tables and traces, and what do their rows say? Files of a data folder, CSV or JSON lines."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from orchestrator.errors import ConfigError


def find(folder: Path | None, pattern: str) -> list[Path]:
    """The files of that name (a glob) in the data folder, one at least. Raises ConfigError, saying how to give it."""
    if folder is None:
        raise ConfigError(f"it needs {pattern}: name the folder that has it with --data DIR or KVFERRY_DATA")
    if not folder.is_dir():
        raise ConfigError(f"the data folder {folder} is no folder: name another with --data DIR or KVFERRY_DATA")
    found = sorted(folder.glob(pattern))
    if not found:
        raise ConfigError(
            f"it needs {pattern}, and {folder} has none: name the folder that has it with --data DIR or KVFERRY_DATA"
        )
    return found


def rows(path: Path) -> Iterator[Mapping[str, object]]:
    """Of a CSV file with a header, or, when the name says .jsonl, of one object a line; gzipped when it ends in .gz.
    To be consumed within `reading`."""
    with _open(path) as file:
        if ".jsonl" in path.suffixes:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"not an object: {line[:40]!r}")
                yield row
        else:
            yield from csv.DictReader(file)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with the file becomes a ConfigError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no {what}: {type(error).__name__}: {error}") from error


def number(row: Mapping[str, object], column: str) -> float:
    """Raises KeyError without the column, ValueError unless it is a finite number of at least 0."""
    value = row[column]
    if not isinstance(value, int | float | str):
        raise ValueError(f"{column} is {value!r}")
    found = float(value)
    if not 0 <= found < float("inf"):
        raise ValueError(f"{column} is {value!r}")
    return found


def tokens(row: Mapping[str, object], column: str) -> int:
    """At least 1: a request of no tokens is asked by nobody."""
    return max(1, int(number(row, column)))


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
