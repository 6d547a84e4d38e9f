"""What does the person at the terminal see meanwhile? A live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orchestrator.demo.answers import Move
from orchestrator.demo.client import Tally
from orchestrator.demo.watch import History, InstanceView

FRAMES_PER_S = 4
PLAIN_LINE_S = 5.0
BAR_CELLS = 24
RECENT_MOVES = 6
STATE_STYLES = {"serving": "green", "draining": "yellow", "starting": "cyan", "stopped": "red"}


@dataclass(frozen=True, slots=True)
class Scene:
    """What is shown of one run."""

    title: str
    tally: Tally
    history: History


@asynccontextmanager
async def shown(console: Console, scene: Scene) -> AsyncIterator[None]:
    """Keep the scene on screen while the body runs."""
    painter = asyncio.create_task(_paint_live(console, scene) if console.is_terminal else _print_lines(console, scene))
    try:
        yield
    finally:
        painter.cancel()
        await asyncio.wait([painter])


async def _paint_live(console: Console, scene: Scene) -> None:
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=40),
        TextColumn("{task.completed:.0f}/{task.total:.0f} answers"),
        TimeElapsedColumn(),
        console=console,
    )
    task = progress.add_task(scene.title, total=scene.tally.num_planned)
    with Live(console=console, refresh_per_second=FRAMES_PER_S) as live:
        try:
            while True:
                live.update(_picture(scene, progress, task))
                await asyncio.sleep(1 / FRAMES_PER_S)
        finally:
            live.update(_picture(scene, progress, task), refresh=True)


def _picture(scene: Scene, progress: Progress, task: TaskID) -> RenderableType:
    progress.update(task, completed=scene.tally.num_done)
    return Group(progress, _instance_table(scene), _recent_moves(scene.history))


def _instance_table(scene: Scene) -> Table:
    moves = [move for move in scene.history.moves.values() if move.outcome == "committed"]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("instance", "state", "KV use"):
        table.add_column(name)
    for name in ("running", "waiting", "moved away", "moved here"):
        table.add_column(name, justify="right")
    for view in scene.history.instances:
        table.add_row(
            Text(view.instance, style="bold"),
            Text(view.state, style=STATE_STYLES.get(view.state, "")),
            _bar(view),
            str(view.num_running),
            str(view.num_waiting),
            str(sum(move.source == view.instance for move in moves)),
            str(sum(move.destination == view.instance for move in moves)),
        )
    return table


def _use(view: InstanceView) -> float:
    return min(1.0, view.used_blocks / max(1, view.total_blocks))


def _bar(view: InstanceView) -> Text:
    use = _use(view)
    filled = round(use * BAR_CELLS)
    style = "green" if use < 0.6 else "yellow" if use < 0.85 else "red"
    return Text.assemble(("█" * filled, style), ("░" * (BAR_CELLS - filled), "dim"), f" {use:4.0%}")


def _recent_moves(history: History) -> RenderableType:
    latest = sorted(history.moves.values(), key=lambda move: (move.ended_s, move.migration_id))[-RECENT_MOVES:]
    lines = [Text("latest moves", style="dim")]
    lines += [_move_line(move, history) for move in reversed(latest)]
    lines += [Text("")] * (RECENT_MOVES - len(latest))
    return Group(*lines)


def _move_line(move: Move, history: History) -> Text:
    took = (
        f"{move.num_blocks} blocks, stood still {move.stopped_s * 1e3:.1f} ms"
        if move.outcome == "committed"
        else move.reason
    )
    return Text.assemble(
        (f"{move.ended_s - history.started_s:6.1f} s  ", "dim"),
        f"{move.request_id[-24:]:24}  {move.source} → {move.destination}  ",
        (f"{move.outcome:12}", "green" if move.outcome == "committed" else "yellow"),
        (took, "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


async def _print_lines(console: Console, scene: Scene) -> None:
    console.print(f"{scene.title}: {scene.tally.num_planned} requests")
    while True:
        await asyncio.sleep(PLAIN_LINE_S)
        console.print(plain_line(scene, time.monotonic()), soft_wrap=True, highlight=False)


def plain_line(scene: Scene, now_s: float) -> str:
    """One line for a log."""
    tally, history = scene.tally, scene.history
    instances = ", ".join(
        f"{view.instance} {_use(view):.0%} KV {view.num_running}+{view.num_waiting} requests"
        + ("" if view.state == "serving" else f" ({view.state})")
        for view in history.instances
    )
    return (
        f"{now_s - history.started_s:5.0f} s  {tally.num_done}/{tally.num_planned} answers, {tally.num_errors} errors, "
        f"{tally.num_tokens} tokens, {history.num_committed} moves; {instances}"
    )
