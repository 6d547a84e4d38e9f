"""What do a bench's options, table and result look like, where it has one table of figures by size?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.report import Result, Value, this_machine, write_result

WIDTH = 140
"""Of a table that no terminal bounds."""
Spread = Mapping[str, float | int | None]


def options_of(name: str, doc: str | None, quick: str) -> argparse.Namespace:
    """`quick` (bool) and `json` (Path or None) of `python -m bench.NAME`; `doc` is the module's."""
    parser = argparse.ArgumentParser(prog=f"bench.{name}", description=(doc or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def table_of(title: str, columns: Iterable[str]) -> Table:
    """Empty, of figures."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def result_of(
    name: str,
    figures: Mapping[str, float],
    arms: Mapping[str, Mapping[str, Value]],
    n: Mapping[str, int],
    spread: Mapping[str, Spread],
) -> Result:
    """Of this run, on this machine, now."""
    return Result(
        name=name,
        command=" ".join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=dict(figures),
        arms={arm: dict(values) for arm, values in arms.items()},
        n=dict(n),
        spread={what: dict(values) for what, values in spread.items()},
        machine=this_machine(),
    )


def show(tables: Sequence[Table], result: Result, json: Path | None) -> None:
    """Print the tables and each figure; write the result to `json` where that is given."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for table in tables:
        console.print(table)
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}", highlight=False)
    if json:
        write_result(json, result)
        console.print(f"result: {json}")
