"""Which carrier moves KV blocks? Chosen by URL: ``tcp://host:port``, ``shm://host:port``, ``memory://name``; all from
plain threads.
"""

from __future__ import annotations

from migration.transports.memory import MemoryHub, MemoryReceiver
from migration.transports.mover import RankMover
from migration.transports.params import CarrierParams
from migration.transports.receiver import BlockReceiver, SocketReceiver
from migration.transports.sender import BlockSender
from migration.transports.store import KVLayout, KVStore

__all__ = [
    "BlockReceiver",
    "BlockSender",
    "CarrierParams",
    "KVLayout",
    "KVStore",
    "MemoryHub",
    "RankMover",
    "open_receiver",
    "open_sender",
]


def open_sender(store: KVStore, token: bytes, params: CarrierParams, hub: MemoryHub | None = None) -> BlockSender:
    """The sending end of one rank; it can push to any URL (``memory://`` needs the hub)."""
    return BlockSender(store, token, params, hub)


def open_receiver(
    store: KVStore, url: str, token: bytes, params: CarrierParams, hub: MemoryHub | None = None
) -> BlockReceiver:
    """The receiving end of one rank; its `url` is what peers push to.

    `url`: ``tcp://HOST``, ``shm://HOST`` (a free port is taken; a peer that cannot share memory goes through the
    socket) or ``memory://NAME`` (needs the hub). Raises `ValueError` for anything else, `OSError` when the host cannot
    be bound.
    """
    scheme, _, rest = url.partition("://")
    match scheme:
        case "tcp" | "shm" if rest:
            return SocketReceiver(store, scheme, rest, token, params)
        case "memory" if rest and hub is not None:
            return MemoryReceiver(store, rest, hub, token, params)
        case _:
            raise ValueError(f"no carrier for {url!r}")
