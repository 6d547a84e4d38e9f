"""The command `kvferry scale`. Heavy imports are inside."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli_client import Admin, connect

MAX_INSTANCES = 2**31 - 1
"""What the admin API can hold; how many there may be is its to say."""


def scale(  # noqa: PLR0913, PLR0917 - one parameter a flag
    target: Annotated[
        int | None, typer.Argument(min=1, max=MAX_INSTANCES, metavar="N", help="Instances there shall be.")
    ] = None,
    fewest: Annotated[int | None, typer.Option("--min", min=1, max=MAX_INSTANCES, help="No target is below.")] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, max=MAX_INSTANCES, help="No target is above.")] = None,
    automatic: Annotated[
        bool | None, typer.Option("--auto/--no-auto", help="Let the target follow the load.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when N are there.")] = True,
    deadline: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Wait no longer than this.")
    ] = None,
    admin: Admin = None,
) -> None:
    """Say how many instances there shall be. Those too many are emptied by migration, then stopped."""
    from orchestrator import cli_scaling as shown  # noqa: PLC0415
    from orchestrator.admin.errors import Declined  # noqa: PLC0415

    with connect(admin) as client:
        scaling = client.scale(target, fewest, most, automatic)
        if target is None or not wait:
            print(shown.line(scaling))
        elif not shown.follow(client, scaling, deadline):
            raise Declined("not done within the deadline; what was begun goes on")
