"""Where do the lines of a journal come from? Its files, oldest first, also while they are written and turned over."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import JournalError
from orchestrator.journal.lines import Checkpoint, Line, LineReader, begins_a_journal

MAX_LINE_BYTES = 1 << 30
"""A checkpoint of a large fleet takes tens of megabytes; what is longer than this is no line of ours."""
_TRIES = 5
"""Looks at the folder, when parts were turned over between two of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line stands."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file} line {self.number}"


@dataclass(slots=True)
class Reading:
    """What was read, besides the lines."""

    num_bytes: int = 0
    torn: str = ""
    """Which last line is not whole: it was being written, or a crash cut it."""


class JournalFiles:
    """The parts of one journal, opened at once, so that none slips away while the others are read."""

    def __init__(self, path: Path) -> None:
        """`path`: as given to --journal, for all its parts; or one part, such as FILE.2. Raises JournalError."""
        self._stack = ExitStack()
        try:
            self._files = self._opened(path)
        except JournalError:
            self._stack.close()
            raise
        self.num_bytes = sum(os.fstat(file.fileno()).st_size for file in self._files)
        """About; for a progress bar."""
        self.reading = Reading()

    def __enter__(self) -> JournalFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def lines(self) -> Iterator[tuple[Place, Line]]:
        """Every line. Raises JournalError naming the file and the line that cannot be read."""
        seen: set[tuple[str, int]] = set()
        for file in self._files:
            reader = LineReader()
            name = Path(file.name).name
            for number, text in enumerate(_texts(file), start=1):
                place = Place(name, number)
                self.reading.num_bytes += len(text)
                if not text.endswith(b"\n"):
                    self.reading.torn = f"{place} is not whole ({len(text)} bytes), so it is left out"
                    break
                try:
                    line = reader.read(text)
                except JournalError as error:
                    raise JournalError(f"{place}: {error}") from error
                if number == 1 and isinstance(line, Checkpoint):
                    if (line.run, line.part) in seen:
                        break  # the same file under its next name
                    seen.add((line.run, line.part))
                yield place, line

    def _opened(self, path: Path) -> list[BinaryIO]:
        """Oldest first."""
        if path.is_dir():
            raise JournalError(f"{path} is a folder: name a journal in it")
        for _ in range(_TRIES):
            parts = _parts(path)
            self._stack.close()
            try:
                files: list[BinaryIO] = [self._stack.enter_context(part.open("rb")) for part in parts]
            except FileNotFoundError:
                continue  # turned over just now
            except OSError as error:
                raise JournalError(f"cannot read {error.filename}: {error.strerror}") from error
            if _parts(path) == parts and _identities(parts) == [_identity(os.fstat(file.fileno())) for file in files]:
                if not files:
                    raise JournalError(f"there is no file {path}")
                _check_heads(files)
                return files
        raise JournalError(f"the parts of {path} are turned over faster than they can be opened: try again")


def _parts(path: Path) -> list[Path]:
    """`path`.N ... `path`.1, `path`, as far as they are there; one of them alone when it is named."""
    older = {part: part.suffix[1:] for part in path.parent.glob(f"{glob.escape(path.name)}.*")}
    numbered = sorted((int(number), part) for part, number in older.items() if number.isdecimal() and part.is_file())
    return [part for _, part in reversed(numbered)] + ([path] if path.exists() else [])


def _identities(paths: list[Path]) -> list[tuple[int, int]]:
    """Of the files that have these names now; of those that are gone, none."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(_identity(path.stat()))
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _check_heads(files: list[BinaryIO]) -> None:
    for file in files:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise JournalError(f"{file.name} is empty: nothing has been written to it yet")
        if not begins_a_journal(head):
            raise JournalError(f"{file.name} is not a journal of kvferry: it does not begin with a checkpoint")


def _texts(file: BinaryIO) -> Iterator[bytes]:
    while text := file.readline(MAX_LINE_BYTES):
        yield text
