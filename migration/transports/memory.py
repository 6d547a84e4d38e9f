"""How do bytes move inside one process? Straight from store to store, over a hub that names the receivers (tests,
simulator).
"""

from __future__ import annotations

import threading

from migration.errors import CopyFailed
from migration.transports.params import CarrierParams
from migration.transports.receiver import BlockReceiver
from migration.transports.store import KVStore


class MemoryHub:
    """The receivers of one process by name: what a network is to sockets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, MemoryReceiver] = {}

    def add(self, name: str, receiver: MemoryReceiver) -> None:
        with self._lock:
            if name in self._receivers:
                raise ValueError(f"a receiver named {name} exists")
            self._receivers[name] = receiver

    def remove(self, name: str) -> None:
        with self._lock:
            self._receivers.pop(name, None)

    def find(self, url: str) -> MemoryReceiver:
        """Raises `CopyFailed` when nobody of this name is there (any more)."""
        with self._lock:
            receiver = self._receivers.get(url.removeprefix("memory://"))
        if receiver is None:
            raise CopyFailed(f"nobody receives at {url}")
        return receiver


class MemoryReceiver(BlockReceiver):
    """The receiving end of a rank inside this process."""

    def __init__(self, store: KVStore, name: str, hub: MemoryHub, token: bytes, params: CarrierParams) -> None:
        super().__init__(store, f"memory://{name}", token, params)
        self._name = name
        self._hub = hub
        hub.add(name, self)

    def close(self) -> None:
        self._hub.remove(self._name)
