"""What does a journal tell on a terminal? Its timeline, its summary, and whether the core decides the same again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from orchestrator.errors import ConfigError, JournalError
from orchestrator.journal.reader import JournalFiles
from orchestrator.journal.replay import Divergence, Replay
from orchestrator.journal.story import Row, Story, Summary, Wanted, chosen, median

AGREES, DIVERGES, UNREADABLE = 0, 1, 2
WIDTH_OF_A_FILE = 240
"""Columns when the output is no terminal."""
_LINES_A_STEP = 2_000
_WALL = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?Z?")


def wanted(request: str | None, instance: str | None, since: str | None, until: str | None) -> Wanted:
    """Raises ConfigError when a time is neither seconds nor a date."""
    since_s, since_wall = _time(since, "--since")
    until_s, until_wall = _time(until, "--until")
    return Wanted(request or "", instance or "", since_s, until_s, since_wall, until_wall)


def _time(text: str | None, flag: str) -> tuple[float | None, str]:
    if text is None:
        return None, ""
    if _WALL.fullmatch(text):
        return None, text.removesuffix("Z").replace(" ", "T")
    try:
        return float(text), ""
    except ValueError as error:
        raise ConfigError(
            f"{flag} is {text!r}: name seconds after the journal's beginning, or UTC such as 2026-11-22T10:30"
        ) from error


def show(path: Path, asked: Wanted, as_json: bool) -> int:
    """Print what it tells; returns the exit status. Raises JournalError when nothing of it can be read."""
    story, replay, error = Story(), Replay(), None
    with JournalFiles(path) as files:
        try:
            _read(files, story, replay)
        except JournalError as found:
            if not story.summary.first_wall:
                raise
            error = found
        torn = files.reading.torn
    rows = chosen(story.rows, asked, story.summary.first_s)
    if as_json:
        print(json.dumps(_as_values(rows, story.summary, replay, str(error or ""), torn)))
    else:
        _print(rows, story.summary, replay)
        if torn:
            print(f"{torn}")
    if error is not None:
        print(f"kvferry: {' '.join(str(error).split())}", file=sys.stderr)
        return UNREADABLE
    return AGREES if replay.divergence is None else DIVERGES


def _read(files: JournalFiles, story: Story, replay: Replay) -> None:
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("replaying", total=files.num_bytes)
        for number, (place, line) in enumerate(files.lines()):
            try:
                story.take(line)
            except JournalError as error:
                raise JournalError(f"{place}: {error}") from error
            replay.take(line, str(place))
            if number % _LINES_A_STEP == 0:
                progress.update(bar, completed=files.reading.num_bytes)


# ---------------------------------------------------------------------- for people
def _print(rows: list[Row], summary: Summary, replay: Replay) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE, markup=False, highlight=False, emoji=False)
    console.print(_timeline(rows, summary.first_s))
    for line in summary_lines(summary):
        console.print(line, soft_wrap=True)
    for line in verdict_lines(replay):
        console.print(line, soft_wrap=True)


def _timeline(rows: list[Row], first_s: float) -> Table:
    table = Table(title=f"timeline: {len(rows)}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("UTC", no_wrap=True)
    table.add_column("at s", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("signals", justify="right", no_wrap=True)
    table.add_column("what came of it", overflow="fold")
    for row in rows:
        table.add_row(
            row.wall.partition("T")[2].removesuffix("Z"),
            f"{row.now_s - first_s:.3f}",
            row.what,
            row.why,
            "" if row.age_s is None else f"{row.age_s:.2f} s",
            row.came_of_it,
        )
    return table


def summary_lines(summary: Summary) -> list[str]:
    """The summary of everything, whatever rows were asked for."""
    lines = [
        "",
        f"{summary.last_s - summary.first_s:.1f} s from {summary.first_wall} to {summary.last_wall},"
        f" {summary.num_runs} run{'s' if summary.num_runs != 1 else ''} of the orchestrator",
        f"events: {_counts(summary.events)}",
        f"effects: {_counts(summary.effects)}",
    ]
    for why, moves in sorted(summary.migrations.items()):
        line = f"moves, {why}: {_counts(moves.outcomes)}"
        if moves.durations_s:
            line += (
                f"; committed after {median(moves.durations_s):.2f} s (median, at most {max(moves.durations_s):.2f}),"
                f" stopped {1e3 * (median(moves.stopped_s) or 0.0):.1f} ms (median)"
            )
        lines.append(line)
    if summary.ages_s:
        lines.append(
            f"signals of decisions: {median(summary.ages_s):.2f} s old (median), at most {max(summary.ages_s):.2f}"
        )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()) if number) or "none"


def verdict_lines(replay: Replay) -> list[str]:
    """Whether the core of this version decides the same."""
    done = f"{replay.num_verified} events with {replay.num_effects} effects"
    lines = []
    if replay.num_lost:
        lines.append(f"{replay.num_lost} events are missing")
    if replay.num_unverified:
        lines.append(f"{replay.num_unverified} events could not be verified: no state of the core stands before them")
    if replay.divergence is None:
        return [*lines, f"replayed: {done}, all as written"]
    return [*lines, *_divergence_lines(replay.divergence, done)]


def _divergence_lines(found: Divergence, done: str) -> list[str]:
    """Both sides; lines that both have are left out when there are many."""
    lines = [f"DIVERGES at {found.where}, s {found.now_s:.6f}, after {found.after} ({done} before it agree)"]
    for name, side in (("journal", found.written), ("replayed", found.replayed)):
        lines += [f"  {name}: {text}" for text in side] or [f"  {name}: nothing"]
    return lines


# ---------------------------------------------------------------------- for programs
def _as_values(rows: list[Row], summary: Summary, replay: Replay, error: str, torn: str) -> dict[str, Any]:
    found = replay.divergence
    return {
        "rows": [
            {
                "utc": row.wall,
                "at_s": row.now_s - summary.first_s,
                "what": row.what,
                "why": row.why,
                "signal_age_s": row.age_s,
                "came_of_it": row.came_of_it,
                "is_decision": row.is_decision,
                "requests": sorted(row.requests),
                "instances": sorted(row.instances),
            }
            for row in rows
        ],
        "summary": {
            "first_utc": summary.first_wall,
            "last_utc": summary.last_wall,
            "duration_s": summary.last_s - summary.first_s,
            "runs": summary.num_runs,
            "events": dict(summary.events),
            "effects": dict(summary.effects),
            "moves": {
                why: {
                    "outcomes": {name: number for name, number in moves.outcomes.items() if number},
                    "committed_after_s": median(moves.durations_s),
                    "stopped_s": median(moves.stopped_s),
                }
                for why, moves in summary.migrations.items()
            },
            "signal_age_s": {"median": median(summary.ages_s), "max": max(summary.ages_s, default=None)},
        },
        "replay": {
            "agrees": found is None,
            "verified_events": replay.num_verified,
            "verified_effects": replay.num_effects,
            "unverified_events": replay.num_unverified,
            "lost_events": replay.num_lost,
            "divergence": None
            if found is None
            else {
                "where": found.where,
                "s": found.now_s,
                "after": found.after,
                "journal": list(found.written),
                "replayed": list(found.replayed),
            },
        },
        "torn": torn,
        "error": error,
    }
