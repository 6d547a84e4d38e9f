"""How urgent may a request be? Named levels, each with a scheduling rank and, separately, an execution headroom.

A level is written `NAME:RANK[:BLOCKS]`: the rank is vLLM's `priority` number (lower is more urgent), the blocks are
kept free on an instance that runs a request of that level, so that its batch keeps its speed. Any number may be a
request's priority: it counts as the most urgent level whose rank it reaches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from orchestrator.policy.load import LoadParams

MAX_LEVELS = 16
MAX_PRIORITY = 2**31 - 1
"""Ranks and priorities lie within this, on either side of 0: they travel as 32 bits."""
MAX_HEADROOM_BLOCKS = 2**31 - 1
DEFAULT_LEVELS = "high:-10:0,normal:0:0,low:10:0"
"""Three ranks; no headroom, since how much is right depends on the model and its memory."""
_MAX_SHOWN_CHARS = 40

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


class BadLevel(ValueError):
    """Levels or a level's name cannot be read; the text is one line that says what would be right."""


@dataclass(frozen=True, slots=True)
class Level:
    name: str
    rank: int
    """vLLM's `priority`: lower is more urgent."""
    headroom_blocks: int = 0
    """Kept free on an instance that runs a request of this level."""


@dataclass(frozen=True)
class Levels:
    """The levels of a fleet, the most urgent first. Use `parse_levels`."""

    levels: tuple[Level, ...]

    @cached_property
    def load_params(self) -> LoadParams:
        """What virtual usage needs to know of them; nothing when no level has headroom."""
        if not any(level.headroom_blocks for level in self.levels):
            return LoadParams()
        return LoadParams(tuple((level.rank, level.headroom_blocks) for level in self.levels))

    def of(self, priority: int) -> Level | None:
        """The most urgent level whose rank this priority reaches; None: it is less urgent than all of them."""
        return next((level for level in self.levels if priority <= level.rank), None)

    def priority(self, text: str) -> int:
        """The priority that a level's name or a number stands for. Raises BadLevel."""
        wanted = text.strip().lower()
        for level in self.levels:
            if level.name == wanted:
                return level.rank
        if re.fullmatch(r"[+-]?[0-9]{1,10}", wanted) and abs(int(wanted)) <= MAX_PRIORITY:
            return int(wanted)
        names = ", ".join(level.name for level in self.levels)
        raise BadLevel(f"{_shown(text)} is no priority: give a level ({names}) or a whole number, lower is more urgent")

    def shown(self, priority: int) -> str:
        """`high (-10)`, or the bare number where it is no level's."""
        named = next((level.name for level in self.levels if level.rank == priority), None)
        return str(priority) if named is None else f"{named} ({priority})"


def parse_levels(text: str) -> Levels:
    """Read `NAME:RANK[:BLOCKS],...`. Raises BadLevel."""
    levels = [_level(part) for part in text.split(",") if part.strip()]
    if not levels:
        raise BadLevel(f"no level is named: write at least one, such as {DEFAULT_LEVELS}")
    if len(levels) > MAX_LEVELS:
        raise BadLevel(f"{len(levels)} levels are named, {MAX_LEVELS} are the most there can be")
    for what, values in (("name", [level.name for level in levels]), ("rank", [str(level.rank) for level in levels])):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise BadLevel(f"two levels have the {what} {twice}: each needs one of its own")
    return Levels(tuple(sorted(levels, key=lambda level: level.rank)))


def _level(part: str) -> Level:
    pieces = [piece.strip() for piece in part.split(":")]
    if len(pieces) not in (2, 3):
        raise BadLevel(f"{_shown(part)} is no level: write NAME:RANK or NAME:RANK:BLOCKS, such as high:-10:2048")
    name = pieces[0].lower()
    if not _NAME.fullmatch(name):
        raise BadLevel(f"{_shown(name)} is no name of a level: use letters, digits and dashes, a letter first")
    rank = _number(pieces[1], f"the rank of level {name}", -MAX_PRIORITY, MAX_PRIORITY)
    blocks = _number(pieces[2], f"the headroom of level {name}", 0, MAX_HEADROOM_BLOCKS) if len(pieces) == 3 else 0
    return Level(name, rank, blocks)


def _number(text: str, what: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise BadLevel(f"{what} is {_shown(text)}, it must be a whole number from {least} to {most}")
    return int(text)


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...")
