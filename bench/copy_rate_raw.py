"""(of copy_rate) What could the path carry at best? Bare loops over the same bytes: a socket, and a shared mapping.

Neither knows blocks, tickets, deadlines, frames or reasons. Both ends of a loop are here; `memory` is contiguous.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from dataclasses import dataclass

SOCKET_PIECE_BYTES = 1 << 20
SLOT_BYTES = 1 << 20
NUM_SLOTS = 4
_TICK = b"."


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def send_by_socket(sock: socket.socket, memory: memoryview) -> None:
    for start in range(0, len(memory), SOCKET_PIECE_BYTES):
        sock.sendall(memory[start : start + SOCKET_PIECE_BYTES])
    sock.recv(1)


def receive_by_socket(sock: socket.socket, memory: memoryview) -> None:
    for start in range(0, len(memory), SOCKET_PIECE_BYTES):
        piece = memory[start : start + SOCKET_PIECE_BYTES]
        num_read = 0
        while num_read < len(piece):
            num_new = sock.recv_into(piece[num_read:], 0, socket.MSG_WAITALL)
            if not num_new:
                raise ConnectionResetError("the other process is gone")
            num_read += num_new
    sock.sendall(_TICK)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Slots that both processes have mapped."""

    memory: mmap.mmap
    fd: int

    @classmethod
    def make(cls) -> Mapping:
        return cls.of(os.memfd_create("copy_rate"))

    @classmethod
    def of(cls, fd: int) -> Mapping:
        os.ftruncate(fd, SLOT_BYTES * NUM_SLOTS)
        memory = mmap.mmap(fd, SLOT_BYTES * NUM_SLOTS)
        memory.write(bytes(SLOT_BYTES * NUM_SLOTS))
        return cls(memory, fd)


def send_by_mapping(sock: socket.socket, slots: Mapping, memory: memoryview) -> None:
    """A byte through `sock` for each slot filled, one back for each emptied."""
    base, here = address_of(memoryview(slots.memory)), address_of(memory)
    num_chunks = len(memory) // SLOT_BYTES
    for chunk in range(num_chunks):
        if chunk >= NUM_SLOTS:
            sock.recv(1)
        ctypes.memmove(base + chunk % NUM_SLOTS * SLOT_BYTES, here + chunk * SLOT_BYTES, SLOT_BYTES)
        sock.sendall(_TICK)
    for _ in range(min(num_chunks, NUM_SLOTS)):
        sock.recv(1)


def receive_by_mapping(sock: socket.socket, slots: Mapping, memory: memoryview) -> None:
    base, here = address_of(memoryview(slots.memory)), address_of(memory)
    for chunk in range(len(memory) // SLOT_BYTES):
        if not sock.recv(1):
            raise ConnectionResetError("the other process is gone")
        ctypes.memmove(here + chunk * SLOT_BYTES, base + chunk % NUM_SLOTS * SLOT_BYTES, SLOT_BYTES)
        sock.sendall(_TICK)
