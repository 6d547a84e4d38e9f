"""How are the two ends of a carrier opened?"""

from __future__ import annotations

from typing import cast

from migration.errors import CopyFailed
from migration.transports.links import LinkMaker
from migration.transports.memory import MemoryHub, MemoryReceiver
from migration.transports.nccl import DeviceKVStore, NcclMaker
from migration.transports.params import CarrierParams
from migration.transports.receiver import BlockReceiver, SocketReceiver
from migration.transports.sender import BlockSender
from migration.transports.store import KVStore


def open_sender(
    store: KVStore,
    token: bytes,
    params: CarrierParams,
    hub: MemoryHub | None = None,
    link_maker: LinkMaker | None = None,
) -> BlockSender:
    """The sending end of one rank; it can push to any URL (``memory://`` needs the hub).

    `link_maker`: for ``nccl://``, where it is not this GPU's own (`nccl_maker`).
    """
    return BlockSender(store, token, params, hub, link_maker)


def open_receiver(
    store: KVStore,
    url: str,
    token: bytes,
    params: CarrierParams,
    hub: MemoryHub | None = None,
    link_maker: LinkMaker | None = None,
) -> BlockReceiver:
    """The receiving end of one rank; its `url` is what peers push to.

    `url`: ``tcp://HOST``, ``shm://HOST``, ``nccl://HOST`` (a free port is taken; a peer that cannot share memory goes
    through the socket) or ``memory://NAME`` (needs the hub). Raises `ValueError` for anything else and, with the
    reason, where there is no NCCL; `OSError` when the host cannot be bound.
    """
    scheme, _, rest = url.partition("://")
    match scheme:
        case "tcp" | "shm" if rest:
            return SocketReceiver(store, scheme, rest, token, params)
        case "nccl" if rest:
            return SocketReceiver(store, scheme, rest, token, params, link_maker or nccl_maker(store))
        case "memory" if rest and hub is not None:
            return MemoryReceiver(store, rest, hub, token, params)
        case _:
            raise ValueError(f"no carrier for {url!r}")


def nccl_maker(store: KVStore) -> LinkMaker:
    """Links of this rank's own GPU. Raises `ValueError` with the reason where there are none."""
    if not hasattr(store, "device_index"):
        raise ValueError("no carrier nccl: the KV memory is not a GPU's")
    try:
        return NcclMaker(cast(DeviceKVStore, store))
    except CopyFailed as error:
        raise ValueError(str(error)) from error
