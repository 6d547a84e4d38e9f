"""What does `kvferry simulate fit` do? A simulated twin of a real fleet, from the journal of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator import cli_simulate_options as told
from orchestrator.errors import ConfigError


def fit(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="As given to `kvferry serve --journal`.")],
    instance: Annotated[
        str | None, typer.Option(metavar="NAME", help="All incarnations of this one. Default: of all instances.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="For `compare --twin FILE`.")] = None,
) -> None:
    """Step times of a real fleet, from the journal of its run."""
    from orchestrator.journal.reader import JournalFiles  # noqa: PLC0415
    from orchestrator.sim.fitting import fitted  # noqa: PLC0415
    from orchestrator.sim.observed import observed  # noqa: PLC0415
    from orchestrator.sim.twin import fit_lines, written  # noqa: PLC0415

    told.writable("--json", out)
    with JournalFiles(journal) as files, Console(stderr=True).status("reading the journal"):
        try:
            seen = observed((line for _, line in files.lines()), instance)
            found = fitted(seen)
        except ConfigError as error:
            raise ConfigError(f"{journal}: {error}") from error
        torn = files.reading.torn
    for line in (*fit_lines(found, seen), *([torn] if torn else [])):
        typer.echo(line)
    if out is not None:
        text = json.dumps(written(found, seen, str(journal)), indent=1, allow_nan=False)
        told.write("--json", out, text + "\n")
