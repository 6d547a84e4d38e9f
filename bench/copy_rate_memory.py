"""(of copy_rate) What lies in the KV memories? Shapes of served models over one allocation. Needs torch alone."""

from __future__ import annotations

import json
import random
import socket
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

from instance.vllm.pages import PageStore
from migration.types import BlockTable


@dataclass(frozen=True, slots=True)
class Shape:
    """How a model's KV lies in one rank's memory."""

    name: str
    page_bytes: int
    """Of one layer in one block."""
    num_layers: int
    is_layers_outermost: bool = True

    @property
    def block_bytes(self) -> int:
        return self.page_bytes * self.num_layers


@dataclass(frozen=True, slots=True)
class KVMemory:
    """One allocation, as vLLM makes it."""

    raw: torch.Tensor

    @classmethod
    def make(cls, num_bytes: int, seed: int) -> KVMemory:
        generator = torch.Generator().manual_seed(seed)
        words = torch.empty(num_bytes // 8, dtype=torch.int64)
        return cls(words.random_(generator=generator).view(torch.int8))

    @property
    def view(self) -> memoryview:
        return memoryview(self.raw.numpy()).cast("B")

    def num_blocks(self, shape: Shape) -> int:
        return int(self.raw.numel()) // shape.block_bytes

    def store(self, shape: Shape) -> PageStore:
        blocks, page, layers = self.num_blocks(shape), shape.page_bytes, shape.num_layers
        strides = (blocks * page, page, 1) if shape.is_layers_outermost else (page, layers * page, 1)
        return PageStore(((0, self.raw.as_strided((layers, blocks, page), strides)),), 1, blocks)

    def table(self, shape: Shape, seed: int) -> BlockTable:
        """Every block, in an order that no memory has."""
        ids = list(range(self.num_blocks(shape)))
        random.Random(seed).shuffle(ids)
        return (tuple(ids),)


def crc_of(store: PageStore, table: BlockTable) -> int:
    """Of the blocks one by one, in the table's order: equal at both ends when every page is."""
    crc, one = 0, bytearray(store.layout.index_bytes)
    for block in table[0]:
        store.gather(((block,),), memoryview(one))
        crc = zlib.crc32(one, crc)
    return crc


class Lines:
    """JSON objects over a socket, one a line."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rw")

    def say(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def hear(self) -> dict[str, Any] | None:
        line = self._file.readline()
        return json.loads(line) if line else None


def order_of(shape: Shape) -> dict[str, Any]:
    return asdict(shape)
