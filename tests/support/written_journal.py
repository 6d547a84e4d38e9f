"""How does a test write a journal of a story, and read it again? The real core, the real writer, the real reader."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from orchestrator.core import Orchestrator
from orchestrator.errors import LimitExceeded
from orchestrator.events import Event
from orchestrator.journal.lines import Line
from orchestrator.journal.reader import JournalFiles
from orchestrator.journal.replay import Replay
from orchestrator.journal.story import Story
from orchestrator.runtime.journal import Journal, JournalParams, decided
from orchestrator.state import CoreParams

START_S = 1000.0
PROMPT = JournalParams(flush_s=0.0, close_s=30.0)


def write_story(
    path: Path,
    story: Iterable[tuple[float, Event]],
    params: JournalParams = PROMPT,
    core: CoreParams | None = None,
    *,
    is_paced: bool = False,
) -> Orchestrator:
    """A whole run: opened, told, closed. `is_paced`: the disk keeps up with the story."""
    made = Orchestrator(core or CoreParams())
    journal = Journal(path, made, START_S, params)
    now_s = START_S
    for gap_s, event in story:
        now_s += gap_s
        with suppress(LimitExceeded):
            decided(made, event, now_s, journal)
        if is_paced:
            assert journal.flush(30.0)
        made.check_integrity()
    journal.close()
    return made


def lines_of(path: Path) -> list[Line]:
    with JournalFiles(path) as files:
        return [line for _, line in files.lines()]


def read(path: Path) -> tuple[Story, Replay]:
    story, replay = Story(), Replay()
    with JournalFiles(path) as files:
        for place, line in files.lines():
            story.take(line)
            replay.take(line, str(place))
    return story, replay
