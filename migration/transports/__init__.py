"""Which carrier moves KV blocks? Chosen by URL: ``tcp://host:port``, ``shm://host:port``, ``nccl://host:port``,
``memory://name``; all from plain threads.

Names are looked up when they are first used, so that `nccl.py` can be imported where there is torch and CuPy only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migration.transports.memory import MemoryHub
    from migration.transports.mover import RankMover
    from migration.transports.opening import open_receiver, open_sender
    from migration.transports.params import CarrierParams
    from migration.transports.receiver import BlockReceiver
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

_HOMES = {
    "BlockReceiver": "receiver",
    "BlockSender": "sender",
    "CarrierParams": "params",
    "KVLayout": "store",
    "KVStore": "store",
    "MemoryHub": "memory",
    "RankMover": "mover",
    "open_receiver": "opening",
    "open_sender": "opening",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
