"""What happened, and what was decided? Events and effects as JSON lines in a bounded file, to read and to replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from orchestrator.effects import Effect
from orchestrator.events import Event

_ENCODER = msgspec.json.Encoder()
SUFFIX_OLDER = ".1"


class Journal:
    """Appends to `path`; past `max_bytes` that becomes `path`.1 and a new one begins: twice `max_bytes` at most."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO = path.open("ab")
        self._num_bytes = self._file.tell()

    def write(self, event: Event, effects: Sequence[Effect], now_s: float) -> None:
        """One line: when, the event, and the effects that followed from it."""
        line = _ENCODER.encode(
            {
                "at_s": round(now_s, 6),
                "event": type(event).__name__,
                "value": event,
                "effects": [{"effect": type(effect).__name__, "value": effect} for effect in effects],
            }
        )
        if self._num_bytes + len(line) + 1 > self._max_bytes:
            self._turn_over()
        self._file.write(line + b"\n")
        self._num_bytes += len(line) + 1

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _turn_over(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + SUFFIX_OLDER))
        self._file = self._path.open("ab")
        self._num_bytes = 0
