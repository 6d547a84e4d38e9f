"""What does `kvferry simulate report` do? Results of earlier days: their tables, and a page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import cli_simulate_options as told
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.sim.result import Result


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="What `run --out`, `compare --json` or `sweep --json` wrote."),
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with pictures here; it needs no network.")
    ] = None,
    against: told.Against = None,
) -> None:
    """Tables of days that were simulated before, and a page with pictures of them. Days of the same question, in
    whichever files, stand side by side."""
    from orchestrator.sim.page import page  # noqa: PLC0415
    from orchestrator.sim.sheets import sheets_of  # noqa: PLC0415
    from orchestrator.sim.studies import studies_of  # noqa: PLC0415

    told.writable("--html", html)
    try:
        studies = studies_of([_read(path) for path in files])
        sheets = [sheets_of(study.days, against or "") for study in studies]
    except ValueError as error:
        raise ConfigError(f"{error}") from error
    for study, own in zip(studies, sheets, strict=True):
        told.show(own, study.title)
    if html is not None:
        told.write("--html", html, page(studies, against or ""))
        typer.echo(f"page: {html}")


def _read(path: Path) -> Result:
    from orchestrator.sim.result import from_json  # noqa: PLC0415

    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no result of `kvferry simulate`: {error}") from error
