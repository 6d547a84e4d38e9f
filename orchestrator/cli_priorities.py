"""The commands `kvferry priorities | priority-key | priority-level`. Heavy imports are inside.

An API key is read from stdin or a file, never from the command line, which others can read; only its SHA-256 is sent.
"""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_client import Admin, connect
from orchestrator.config import DIGEST_PREFIX
from orchestrator.errors import ConfigError
from orchestrator.gateway.priorities import digest_in, key_digest
from orchestrator.policy.levels import MAX_HEADROOM_BLOCKS, MAX_PRIORITY

MAX_KEY_BYTES = 8192
_DRY = "Check only."
_NOT_YET = "not every gateway has answered: the others heed it, that one will when it does"


def add_to(app: typer.Typer) -> None:
    """Make them commands of `app`."""
    app.command()(priorities)
    # -10 is a level; and what is too much may be a key, which the parser's own refusal would repeat.
    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command("priority-key", context_settings=lenient)(priority_key)
    app.command("priority-level")(priority_level)


def priorities(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, admin: Admin = None
) -> None:
    """Show the levels, and the API keys (by their SHA-256) that have one."""
    from google.protobuf.json_format import MessageToJson  # noqa: PLC0415

    with connect(admin) as client:
        found = client.priorities()
    if as_json:
        print(MessageToJson(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    for level in found.levels:
        print(f"level {level.name}: rank {level.rank}, {level.headroom_blocks} blocks kept free beside one that runs")
    for key in found.keys:
        print(f"key {DIGEST_PREFIX}{key.key_sha256}: {key.shown}")
    if not found.keys:
        print("no API key has a level of its own")


def priority_key(  # noqa: PLR0913, PLR0917 - one parameter a flag
    context: typer.Context,
    level: Annotated[str | None, typer.Argument(help="A level's name, or a number: lower is more urgent.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Holds the key. Default: it is read from stdin.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option("--digest", metavar="sha256:DIGEST", help="The key's SHA-256, instead of the key.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take its level away.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False,
    admin: Admin = None,
) -> None:
    """Give an API key a level: that of its requests that ask for none, and the most urgent they may have."""
    if context.args or _is_option(level or ""):
        raise ConfigError(
            "priority-key takes a level, --file, --digest, --remove, --dry-run and --admin, and got something else;"
            " its key is read from stdin or a file: what stands on the command line, others can read"
        )
    if (level is None) is not remove:
        raise ConfigError("name the level that the key shall have, or take its level away with --remove")
    sha256 = _sha256(file, digest)
    with connect(admin) as client:
        if level is None:
            removed = client.delete_key_priority(sha256, dry_run)
            _tell(removed.change, removed.applied, dry_run)
        else:
            done = client.set_key_priority(sha256, level, dry_run)
            _tell(done.change, done.applied, dry_run)


def priority_level(
    name: Annotated[str, typer.Argument(metavar="LEVEL", help="Its name, as `kvferry priorities` shows it.")],
    rank: Annotated[
        int | None,
        typer.Option(min=-MAX_PRIORITY, max=MAX_PRIORITY, help="vLLM's priority: lower is more urgent."),
    ] = None,
    headroom: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_HEADROOM_BLOCKS,
            metavar="BLOCKS",
            help="Kept free on an instance that runs one of this level.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False,
    admin: Admin = None,
) -> None:
    """Change a level's rank or headroom. Keys of that level follow; requests that run stay as urgent as they are."""
    with connect(admin) as client:
        done = client.update_level(name, rank, headroom, dry_run)
    _tell(done.change, done.applied, dry_run)


def _tell(change: str, is_applied: bool, is_dry: bool) -> None:
    print(f"would be: {change}" if is_dry else change)
    if not is_dry and not is_applied:
        print(_NOT_YET)


def _is_option(level: str) -> bool:
    return level.startswith("-") and not level[1:].isdigit()


def _sha256(file: Path | None, digest: str | None) -> str:
    """Raises ConfigError, with no word of what was read."""
    if digest is not None:
        if file is not None:
            raise ConfigError("--digest and --file name one key each: give one of them")
        found = digest_in(digest.removeprefix(DIGEST_PREFIX)) if digest.startswith(DIGEST_PREFIX) else None
        if found is None:
            raise ConfigError(f"--digest must be {DIGEST_PREFIX} and 64 hexadecimal digits")
        return found
    key = _read(file).strip()
    if not key or len(key) > MAX_KEY_BYTES or b"\n" in key:
        where = "stdin" if file is None else str(file)
        raise ConfigError(f"{where} must hold one API key on one line, of at most {MAX_KEY_BYTES} bytes")
    return key_digest(key)


def _read(file: Path | None) -> bytes:
    if file is None:
        if sys.stdin.isatty():
            return getpass.getpass("API key (not shown): ").encode()
        return sys.stdin.buffer.read(2 * MAX_KEY_BYTES)
    try:
        with file.open("rb") as opened:
            return opened.read(2 * MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"--file: cannot read {file}: {error.strerror}") from error
