"""How does a command reach the admin API? Where it is, what to show it, whom to trust: flags and KVFERRY_ variables."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import config

if TYPE_CHECKING:
    from orchestrator.admin.client import AdminClient

_PANEL = "Admin API"
_shown: ContextVar[Mapping[str, str | None] | None] = ContextVar(
    "what the command shows to the admin API", default=None
)
"""Flags before the command's name; the way past the commands, which differ."""

Admin = Annotated[
    str | None,
    typer.Option(
        "--admin", metavar="HOST:PORT", help="Address of the admin API. Default: 127.0.0.1:50051. (KVFERRY_ADMIN)"
    ),
]


def before_the_command(
    admin_token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Holds the admin API's token. (KVFERRY_ADMIN_TOKEN_FILE; the token itself: KVFERRY_ADMIN_TOKEN)",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    admin_ca: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Use TLS, and trust these. (KVFERRY_ADMIN_CA)", rich_help_panel=_PANEL),
    ] = None,
    admin_cert: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Certificate to show. (KVFERRY_ADMIN_CERT)", rich_help_panel=_PANEL),
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its key. (KVFERRY_ADMIN_KEY)", rich_help_panel=_PANEL)
    ] = None,
) -> None:
    """Live migration of running LLM requests between vLLM instances, behind one OpenAI endpoint."""
    _shown.set(
        {
            "admin_token_file": admin_token_file,
            "admin_ca": admin_ca,
            "admin_cert": admin_cert,
            "admin_key": admin_key,
        }
    )


def connect(admin: str | None) -> AdminClient:
    """A client for the admin API at `admin` (None: as the environment says). Raises ConfigError."""
    from orchestrator.admin.client import AdminClient  # noqa: PLC0415 - gRPC is heavy

    return AdminClient(config.admin_address(admin), config.client_access_here(_shown.get() or {}))
