"""Does the core decide again what the journal says it decided? The real core, given the same events, same times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from orchestrator.core import Orchestrator
from orchestrator.errors import JournalError
from orchestrator.journal.lines import Checkpoint, Entry, Line
from orchestrator.journal.values import KIND, Unwritable, core_of, core_state, plain, value_of

TOLERANCE = 1e-6
"""Of what is learned, as a share of its largest value: linear algebra rounds otherwise on another processor."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where the core of this version does otherwise."""

    where: str
    now_s: float
    after: str
    """The event."""
    written: tuple[str, ...]
    """What the journal has, as JSON; one line an effect."""
    replayed: tuple[str, ...]
    """What the core did now."""


class Replay:
    """Takes the lines of a journal one after the other. Verifies until the first divergence, never after it."""

    def __init__(self) -> None:
        self.divergence: Divergence | None = None
        self.num_verified = 0
        """Events whose effects agree."""
        self.num_effects = 0
        self.num_unverified = 0
        """Events with no state of the core before them."""
        self.num_lost = 0
        self._core: Orchestrator | None = None
        self._run = ""
        self._part = 0

    def take(self, line: Line, where: str) -> None:
        """Raises JournalError when a checkpoint holds no state that this version knows."""
        if self.divergence is not None:
            return
        if isinstance(line, Checkpoint):
            self._begin_anew(line, where)
        elif self._core is None:
            self.num_unverified += 1
        else:
            self._verify(self._core, line, where)

    def _begin_anew(self, line: Checkpoint, where: str) -> None:
        follows = (line.run, line.part) in ((self._run, self._part), (self._run, self._part + 1)) and not line.num_lost
        if follows and self._core is not None and line.core is not None:
            now = core_state(self._core)
            if not _is_alike(now, line.core):
                unlike = _unlike(line.core, now)
                self.divergence = Divergence(where, line.now_s, "the state of the core", *unlike)
                return
        self._run, self._part = line.run, line.part
        self.num_lost += line.num_lost
        self._core = None if line.core is None else _restored(line.core, where)

    def _verify(self, core: Orchestrator, line: Entry, where: str) -> None:
        raised = ""
        replayed: list[Any] = []
        try:
            effects = core.on(line.event, line.now_s)
            replayed = [plain(effect) for effect in effects]
        except Unwritable as error:
            raise JournalError(f"{where}: {error}") from error
        except Exception as error:  # noqa: BLE001 - what the core raised then, it must raise now
            raised = f"{type(error).__name__}: {error}"
        if (raised, replayed) == (line.raised, list(line.effects)):
            self.num_verified += 1
            self.num_effects += len(replayed)
            return
        self.divergence = Divergence(
            where,
            line.now_s,
            type(line.event).__name__,
            _lines_of(line.effects, line.raised),
            _lines_of(replayed, raised),
        )


def _restored(written: Any, where: str) -> Orchestrator:
    try:
        return core_of(written)
    except JournalError as error:
        raise JournalError(f"{where}: {error}") from error


def _lines_of(effects: Any, raised: str) -> tuple[str, ...]:
    texts = tuple(msgspec.json.encode(effect).decode() for effect in effects)
    return (*texts, f"raised {raised}") if raised else texts


def _is_alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of arrays."""
    if one == other:
        return True
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        if one.get(KIND) == other.get(KIND) == "array" and one["of"] == other["of"] and one["shape"] == other["shape"]:
            here, there = value_of(one), value_of(other)
            largest = float(np.abs(there).max(initial=0.0))  # what is nothing here may be a little there
            return np.allclose(here, there, rtol=TOLERANCE, atol=TOLERANCE * largest)
        return all(_is_alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_is_alike, one, other))
    return False


def _unlike(written: dict[str, Any], now: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The attributes of the core that differ, on both sides."""
    names = [name for name in {**written, **now} if not _is_alike(written.get(name), now.get(name))]
    return tuple(
        tuple(f"{name}: {msgspec.json.encode(side.get(name)).decode()}" for name in names) for side in (written, now)
    )  # type: ignore[return-value]
