"""How does a journal get to the disk without the loop ever waiting for it? A bounded queue, and a thread that writes.

Files: `path` is written to; full, it becomes `path`.1, that one `path`.2, and so on; the oldest is dropped.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.core import Orchestrator
from orchestrator.effects import Effect
from orchestrator.errors import JournalError
from orchestrator.events import Event
from orchestrator.journal.lines import VERSION, Checkpoint, LineWriter, begins_a_journal
from orchestrator.journal.values import Unwritable, core_snapshot, finished
from orchestrator.log import fields, logger
from orchestrator.runtime.ports import Recorder

_log = logger("orchestrator")
MODE = 0o600
_BATCH_BYTES = 1 << 18
"""Written at once at most, so that a part is turned over in time."""


@dataclass(frozen=True, slots=True)
class JournalParams:
    max_part_bytes: int = 32 << 20
    """A part is closed before it holds more (its first line excepted, which holds the state of the core)."""
    max_parts: int = 4
    """Files kept, the one being written included."""
    turn_at: float = 0.875
    """Share of a part after which the next one is prepared: only the loop can say what the core knows."""
    max_queued: int = 16_384
    """Events that wait for the disk; more are lost, and the journal says how many."""
    flush_s: float = 0.1
    """The thread writes at most so often: what a killed process may lose."""
    close_s: float = 2.0
    """So long does `close` wait for a disk that hangs."""


@dataclass(frozen=True, slots=True)
class _Happened:
    event: Event
    effects: Sequence[Effect]
    now_s: float
    wall_s: float
    raised: str


@dataclass(frozen=True, slots=True)
class _State:
    """What the core knows after all that was queued before."""

    core: Any
    """A `core_snapshot`, or None."""
    now_s: float
    wall_s: float
    num_lost: int


class Journal:
    """Called from the loop only, and never raises there once it is open.

    The first error of the disk ends the journal and is logged. Opening raises JournalError and OSError.
    """

    def __init__(self, path: Path, core: Orchestrator, now_s: float, params: JournalParams | None = None) -> None:
        self._params = params or JournalParams()
        self._core = core
        self._queue: deque[_Happened | _State | threading.Event] = deque()
        self._num_lost = 0
        self._must_turn = False
        """Set by the thread; the loop answers with a `_State`."""
        self._has_asked = False
        """The thread's own: of this part, once."""
        self._is_over = False
        self._has_work, self._is_closing = threading.Event(), threading.Event()
        self._parts = _Parts(path, self._params)
        self._queue.append(self._state(now_s, num_lost=0))
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()
        self._has_work.set()

    def write(self, event: Event, effects: Sequence[Effect], now_s: float, raised: BaseException | None = None) -> None:
        """The core was given the event, and this followed. To be called before the next event."""
        if self._is_over or self._is_closing.is_set():
            return
        num_queued, most = len(self._queue), self._params.max_queued
        if num_queued >= most or (self._num_lost and num_queued > most // 2):
            self._num_lost += 1
        elif self._num_lost:
            self._queue.append(self._state(now_s, self._num_lost + 1))
            self._num_lost = 0
        else:
            self._queue.append(_Happened(event, tuple(effects), now_s, time.time(), _error_text(raised)))
            if self._must_turn:
                self._must_turn = False
                self._queue.append(self._state(now_s, num_lost=0))
        self._has_work.set()

    @property
    def num_lost(self) -> int:
        """Events left out since the last that was queued: the disk is too slow."""
        return self._num_lost

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was queued is written; False: it took too long. Blocks."""
        is_written = threading.Event()
        self._queue.append(is_written)
        self._has_work.set()
        return is_written.wait(timeout_s)

    def close(self) -> None:
        """Write what is queued, unless the disk takes longer than `close_s`. Blocks."""
        self._is_closing.set()
        self._has_work.set()
        self._thread.join(self._params.close_s)
        if self._thread.is_alive():
            _log.error("the end of the journal is not on the disk %s", fields(path=self._parts.path))

    def _state(self, now_s: float, num_lost: int) -> _State:
        core: Any = None
        try:
            core = core_snapshot(self._core)
        except Unwritable as error:
            _cannot_be_replayed(self._parts.path, error)
        return _State(core, now_s, time.time(), num_lost)

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        while not self._is_over:
            self._has_work.wait()
            self._has_work.clear()
            is_last = self._is_closing.is_set()
            try:
                self._drain()
                if is_last:
                    self._parts.end(self._num_lost)
            except (OSError, Unwritable, TypeError) as error:
                self._is_over = True
                _log.error("no journal from here on %s", fields(path=self._parts.path, reason=error))
            if is_last:
                break  # nothing comes after `close`
            self._is_closing.wait(self._params.flush_s)
        self._queue.clear()
        self._parts.close()

    def _drain(self) -> None:
        parts = self._parts
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, threading.Event):
                parts.flush()
                item.set()
            elif isinstance(item, _State):
                parts.checkpoint(item)
                self._has_asked = False
            else:
                parts.entry(item)
            if parts.is_nearly_full() and not self._has_asked:
                self._has_asked = self._must_turn = True
        parts.flush()


class _Parts:
    """The files, for the thread."""

    def __init__(self, path: Path, params: JournalParams) -> None:
        """Raises JournalError where another file would be overwritten, and OSError."""
        check_path(path, params.max_parts)
        self.path = path
        self._params = params
        self._run = os.urandom(4).hex()
        self._lines = LineWriter()
        self._pending = bytearray()
        self._part = 1
        self._num_bytes = 0
        self._head_bytes = 0
        """Of the first line."""
        self._num_left_out = 0
        self._now_s = 0.0
        if path.is_file() and path.stat().st_size:
            self._shift()
        self._descriptor = _opened(path)

    def checkpoint(self, state: _State) -> None:
        """Begin with it: the first part, the next part, or anew in this one where something was lost."""
        try:
            state = replace(state, core=finished(state.core))
        except Unwritable as error:
            _cannot_be_replayed(self.path, error)
            state = replace(state, core=None)
        text = self._checkpoint_line(state)
        if self._num_bytes and (self.is_nearly_full() or not self._has_room(text)):
            self._turn_over()
            text = self._checkpoint_line(state)
        if not self._num_bytes:
            self._head_bytes = len(text) + 1
        self._num_left_out = 0
        self._append(text)

    def end(self, num_lost: int) -> None:
        """Say what was lost at the very end; what the core knew then is of no use to anybody."""
        if num_lost + self._num_left_out:
            self.checkpoint(_State(None, self._now_s, time.time(), num_lost))
            self.flush()

    def _checkpoint_line(self, state: _State) -> bytes:
        num_lost = state.num_lost + self._num_left_out
        wall = _wall(state.wall_s)
        return self._lines.checkpoint(
            Checkpoint(self._run, self._part, state.now_s, wall, VERSION, state.core, num_lost)
        )

    def entry(self, item: _Happened) -> None:
        """Leave it out when the part is full before the loop has said what the next one begins with, and all until it
        has: what comes after a gap means nothing."""
        self._now_s = item.now_s
        text = self._lines.entry(item.event, item.effects, item.now_s, _wall(item.wall_s), item.raised)
        if self._num_left_out or not self._has_room(text):
            self._num_left_out += 1
        else:
            self._append(text)

    def _has_room(self, text: bytes) -> bool:
        return self._num_bytes - self._head_bytes + len(text) + 1 <= self._params.max_part_bytes

    def is_nearly_full(self) -> bool:
        return self._num_bytes - self._head_bytes > self._params.turn_at * self._params.max_part_bytes

    def flush(self) -> None:
        view = memoryview(self._pending)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._pending = bytearray()

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)

    def _append(self, text: bytes) -> None:
        self._pending += text + b"\n"
        self._num_bytes += len(text) + 1
        if len(self._pending) > _BATCH_BYTES:
            self.flush()

    def _turn_over(self) -> None:
        self.flush()
        os.close(self._descriptor)
        self._shift()
        self._descriptor = _opened(self.path)
        self._num_bytes = self._head_bytes = 0
        self._part += 1

    def _shift(self) -> None:
        """Each part gets the next higher number; the oldest is overwritten by the one before it."""
        if self._params.max_parts == 1:
            self.path.unlink()
            return
        for number in range(self._params.max_parts - 1, 0, -1):
            younger = part_path(self.path, number - 1)
            if younger.exists():
                younger.replace(part_path(self.path, number))


def part_path(path: Path, number: int) -> Path:
    """Of the part that is so many parts older than the one being written."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def check_path(path: Path, max_parts: int) -> None:
    """Raise JournalError unless a journal may be written there: no other file is ever overwritten."""
    if not path.absolute().parent.is_dir():
        raise JournalError(f"--journal: there is no folder {path.absolute().parent}")
    for number in range(max_parts):
        part = part_path(path, number)
        if part.is_dir():
            raise JournalError(f"--journal: {part} is a folder: name a file")
        if not part.is_file():
            continue
        try:
            with part.open("rb") as file:
                head = file.read(64)
        except OSError as error:
            raise JournalError(f"--journal: cannot read {part}: {error.strerror}") from error
        if not begins_a_journal(head):
            raise JournalError(
                f"--journal: {part} is there and is not a journal of this version: move it away, or name another"
            )


def _opened(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, MODE)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, MODE)  # it may have been there, empty
    return descriptor


def _cannot_be_replayed(path: Path, error: Unwritable) -> None:
    _log.error("the journal can be read, but not replayed from here on %s", fields(path=path, reason=error))


def _wall(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _error_text(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def decided(core: Orchestrator, event: Event, now_s: float, journal: Recorder | None) -> list[Effect]:
    """What the core makes of the event; the journal holds it, also when the core raises."""
    raised: BaseException | None = None
    effects: list[Effect] = []
    try:
        effects = core.on(event, now_s)
    except BaseException as error:
        raised = error
        raise
    finally:
        if journal is not None:
            journal.write(event, effects, now_s, raised)
    return effects
