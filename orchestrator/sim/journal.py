"""Where does the journal of a simulated orchestrator go? Into a list of lines, the same bytes for the same seed.

The lines are those of production's journal (`orchestrator/journal/lines.py`): `kvferry replay` explains them and says
whether the core decides the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from orchestrator.core import Orchestrator
from orchestrator.effects import Effect
from orchestrator.events import Event
from orchestrator.journal.lines import VERSION, Checkpoint, LineWriter
from orchestrator.journal.values import core_snapshot, finished

BEGAN_AT = datetime(2000, 1, 1, tzinfo=UTC)
"""When every simulated day begins."""


class MemoryJournal:
    """See `orchestrator.runtime.ports.Recorder`."""

    def __init__(self, core: Orchestrator, now_s: float, keeps_lines: bool = True) -> None:
        """`keeps_lines`: False: only what `digest` needs, for days whose journal is hundreds of megabytes."""
        self._lines = LineWriter()
        self._keeps_lines = keeps_lines
        self._digest = sha256()
        self.lines: list[bytes] = []
        checkpoint = Checkpoint("simulated", 1, now_s, _wall(now_s), VERSION, finished(core_snapshot(core)))
        self._add(self._lines.checkpoint(checkpoint))

    def write(self, event: Event, effects: Sequence[Effect], now_s: float, raised: BaseException | None = None) -> None:
        why = "" if raised is None else f"{type(raised).__name__}: {raised}"
        self._add(self._lines.entry(event, effects, now_s, _wall(now_s), why))

    def _add(self, line: bytes) -> None:
        self._digest.update(line + b"\n")
        if self._keeps_lines:
            self.lines.append(line)

    def text(self) -> bytes:
        """Of the lines that were kept."""
        return b"\n".join(self.lines) + b"\n"

    def digest(self) -> str:
        """SHA-256 of the whole journal, hexadecimal."""
        return self._digest.hexdigest()


def _wall(now_s: float) -> str:
    at = BEGAN_AT + timedelta(seconds=now_s)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
