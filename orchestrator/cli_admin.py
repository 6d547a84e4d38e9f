"""The commands `kvferry watch | cancel | cancel-migration | policy`. Heavy imports are inside."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli_client import Admin, connect
from orchestrator.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Make them commands of `app`."""
    app.command()(watch)
    app.command()(cancel)
    app.command("cancel-migration")(cancel_migration)
    app.command()(policy)


def watch(
    only: Annotated[
        list[str] | None, typer.Option(help="instances, requests or migrations; may be repeated. Default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one change a line.")] = False,
    admin: Admin = None,
) -> None:
    """Show what is there, then a line for each change, until Ctrl-C."""
    from orchestrator import cli_watch as shown  # noqa: PLC0415

    topics = shown.topics(only or [])
    with connect(admin) as client:
        shown.follow(client.watch(topics), as_json=as_json)


def cancel(
    request: Annotated[str, typer.Argument(help="Engine's or client's request id, or a prefix that fits only one.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would end, and end nothing.")] = False,
    admin: Admin = None,
) -> None:
    """End a running request; its client's stream ends with an error that says so."""
    with connect(admin) as client:
        ended = client.cancel_request(request, validate_only=dry_run)
    where = f" on {ended.instance.partition('/')[2]}" if ended.instance else ""
    print(f"{ended.name.partition('/')[2]} {'would end' if dry_run else 'was ended'}{where}")


def cancel_migration(
    migration: Annotated[str, typer.Argument(metavar="NUMBER", help="As `kvferry status` shows it.")],
    admin: Admin = None,
) -> None:
    """Call off a migration in flight; the request stays where it is."""
    from orchestrator import cli_status as shown  # noqa: PLC0415

    with connect(admin) as client:
        print(shown.migration_line(client.cancel_migration(migration)))


def policy(
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; may be repeated: all or none."),
    ] = None,
    reset: Annotated[
        list[str] | None, typer.Option("--reset", metavar="NAME", help="Back to what the cluster was started with.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    admin: Admin = None,
) -> None:
    """Show the parameters by which the orchestrator decides, or change them while it runs."""
    from orchestrator import cli_policy as shown  # noqa: PLC0415

    assignments = [_assignment(text) for text in change or []]
    with connect(admin) as client:
        if assignments or reset:
            asked = shown.policy_of(assignments)
            paths = (*(name for name, _ in assignments), *(reset or []))
            print("\n".join(shown.change_lines(client.update_policy(asked, paths, dry_run), dry_run)))
        else:
            print(shown.as_text(client.policy(), as_json))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"--set {text}: write NAME=VALUE, such as rebalance.threshold_steps=256")
    return name, value
