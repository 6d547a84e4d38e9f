"""What happened, and what was decided? Events and effects as JSON lines in a bounded file, to read and to replay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from orchestrator.effects import Effect
from orchestrator.events import Event
from orchestrator.log import fields, logger

_log = logger("orchestrator")
_ENCODER = msgspec.json.Encoder()
SUFFIX_OLDER = ".1"


class Journal:
    """Appends to `path`; past `max_bytes` that becomes `path`.1 and a new one begins: twice `max_bytes` at most.

    The first error of the disk ends the journal, is logged, and never reaches the caller; opening raises OSError.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = path.open("ab")
        self._num_bytes = self._file.tell()

    def write(self, event: Event, effects: Sequence[Effect], now_s: float) -> None:
        """One line: when, the event, and the effects that followed from it."""
        if self._file is None:
            return
        line = _ENCODER.encode(
            {
                "at_s": round(now_s, 6),
                "event": type(event).__name__,
                "value": event,
                "effects": [{"effect": type(effect).__name__, "value": effect} for effect in effects],
            }
        )
        try:
            file = self._file
            if self._num_bytes + len(line) + 1 > self._max_bytes:
                file = self._turn_over(file)
            file.write(line + b"\n")
        except OSError as error:
            self._give_up(error)
        self._num_bytes += len(line) + 1

    def flush(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._give_up(error)

    def _turn_over(self, full: BinaryIO) -> BinaryIO:
        full.close()
        self._path.replace(self._path.with_name(self._path.name + SUFFIX_OLDER))
        self._file = self._path.open("ab")
        self._num_bytes = 0
        return self._file

    def _give_up(self, error: OSError) -> None:
        _log.error("no journal from here on %s", fields(path=self._path, reason=error))
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # it tries to write once more
                file.close()
