"""Who may use the admin API, and how does each side prove who it is? Plain values; `config.py` reads the files."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """What the server asks for and shows. PEM texts; empty: not used."""

    token: str = field(default="", repr=False)
    """Bearer token that every call must carry (but for health checks); empty: none is asked for."""
    certificate: bytes = field(default=b"", repr=False)
    """With `key`: TLS."""
    key: bytes = field(default=b"", repr=False)
    client_ca: bytes = field(default=b"", repr=False)
    """Clients must show a certificate that these have signed (mutual TLS)."""


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """What a client shows, and whom it trusts. PEM texts; empty: not used."""

    token: str = field(default="", repr=False)
    ca: bytes = field(default=b"", repr=False)
    """TLS; the server's certificate must be signed by these."""
    certificate: bytes = field(default=b"", repr=False)
    """With `key`: shown to a server that asks for one."""
    key: bytes = field(default=b"", repr=False)


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
