"""(of copy_rate) Who stands at the two ends? The bench's own process sends; this module, run as one, receives.

The two talk JSON lines over a socket pair; a second pair carries the raw loops' ticks. Each has one KV memory of the
same size, laid out anew for each shape.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import torch

from bench.copy_rate_memory import KVMemory, Lines, Shape, crc_of
from bench.copy_rate_raw import Mapping, receive_by_mapping, receive_by_socket
from migration.transports import BlockReceiver, CarrierParams, open_receiver
from migration.types import MigrationId

TOKEN = b"copy_rate"
MOVED = MigrationId("copy_rate")
WAIT_S = 120.0


class Peer:
    """The receiving process, as the sender sees it."""

    def __init__(self, num_bytes: int) -> None:
        control, control_there = socket.socketpair()
        self.ticks, ticks_there = socket.socketpair()
        self.mapping = Mapping.make()
        fds = (control_there.fileno(), ticks_there.fileno(), self.mapping.fd)
        argv = [sys.executable, "-m", "bench.copy_rate_ends", *map(str, fds), str(num_bytes)]
        self._process = subprocess.Popen(argv, pass_fds=fds)
        for sock in (control_there, ticks_there):
            sock.close()
        control.settimeout(WAIT_S)
        self.ticks.settimeout(None)
        self._lines = Lines(control)
        listener = socket.create_server(("127.0.0.1", 0))
        self.start("connect", port=listener.getsockname()[1])
        self.sock, _ = listener.accept()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.close()
        self.finish()

    def start(self, what: str, **arguments: Any) -> None:
        """Order it to do something, which it does while we do our part."""
        self._lines.say(what=what, **arguments)

    def finish(self) -> Any:
        """Its answer when it has done it. Raises `ChildProcessError`: it is gone or said why not."""
        answer = self._lines.hear()
        if answer is None or "error" in answer:
            raise ChildProcessError(f"the receiving process: {answer}")
        return answer["result"]

    def ask(self, what: str, **arguments: Any) -> Any:
        self.start(what, **arguments)
        return self.finish()

    def close(self) -> None:
        self.start("end")
        self._process.wait(WAIT_S)


class _Receiving:
    """What the receiving process does for each order."""

    def __init__(self, ticks: socket.socket, mapping: Mapping, num_bytes: int) -> None:
        self._ticks = ticks
        self._mapping = mapping
        self._memory = KVMemory.make(num_bytes, seed=2)
        self._receivers: list[BlockReceiver] = []
        self._sock = socket.socket()

    def obey(self, what: str, arguments: dict[str, Any]) -> Any:
        match what:
            case "connect":
                self._sock = socket.create_connection(("127.0.0.1", arguments["port"]))
            case "receive_by_socket":
                receive_by_socket(self._sock, self._memory.view)
            case "receive_by_mapping":
                receive_by_mapping(self._ticks, self._mapping, self._memory.view)
            case "receive_and_scatter":
                self._receive_and_scatter(Shape(**arguments["shape"]))
            case "open":
                shape = Shape(**arguments["shape"])
                params = CarrierParams(checksum=arguments["checksum"])
                receiver = open_receiver(self._memory.store(shape), arguments["url"], TOKEN, params)
                receiver.open(MOVED, self._memory.table(shape, seed=2))
                self._receivers.append(receiver)
                return receiver.url
            case "wipe":
                self._memory.raw.zero_()
            case "crc":
                shape = Shape(**arguments["shape"])
                return crc_of(self._memory.store(shape), self._memory.table(shape, seed=2))
            case _:
                raise ValueError(f"no such order: {what}")
        return None

    def _receive_and_scatter(self, shape: Shape) -> None:
        store, (ids,) = self._memory.store(shape), self._memory.table(shape, seed=2)
        data = memoryview(bytearray(shape.block_bytes))
        for block in ids:
            num_read = 0
            while num_read < len(data):
                num_read += self._sock.recv_into(data[num_read:], 0, socket.MSG_WAITALL)
            store.scatter(((block,),), data)
        self._sock.sendall(b".")


def main(argv: list[str]) -> None:
    control_fd, ticks_fd, mapping_fd, num_bytes = map(int, argv)
    torch.set_num_threads(1)
    lines = Lines(socket.socket(fileno=control_fd))
    receiving = _Receiving(socket.socket(fileno=ticks_fd), Mapping.of(mapping_fd), num_bytes)
    while (order := lines.hear()) is not None and order["what"] != "end":
        what = order.pop("what")
        try:
            lines.say(result=receiving.obey(what, order))
        except (OSError, ValueError) as error:
            lines.say(error=f"{what}: {error}")
    os._exit(0)  # receivers' threads may still wait for a sender


if __name__ == "__main__":
    main(sys.argv[1:])
