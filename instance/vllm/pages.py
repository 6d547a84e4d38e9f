"""How does a carrier read and write vLLM's KV memory? As pages, in host memory or on a GPU. Needs torch, not vLLM."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from migration.transports import KVLayout
from migration.types import BlockTable

_WORD_BYTES = 8


class PageStore:
    """A rank's KV memory as pages: `migration.transports.HostKVStore` over vLLM's one raw allocation.

    Byte order of a gather: KV tensor by KV tensor (their order is vLLM's, equal on both sides), in each as they lie in
    memory: [layer, block, page] or [block, layer, page].
    """

    def __init__(self, pages: tuple[tuple[int, torch.Tensor], ...], num_groups: int, num_blocks: int) -> None:
        """`pages`: (group, int8 view [layers, blocks, page bytes])."""
        self._pages = tuple((group, _in_wide_words(view), _block_axis(view)) for group, view in pages)
        group_bytes = [0] * num_groups
        for group, view in pages:
            group_bytes[group] += view.shape[0] * view.shape[2]
        page_order = "|".join("LB" if axis else "BL" for _, _, axis in self._pages)
        self._layout = KVLayout(tuple(group_bytes), num_blocks, page_order)
        device = pages[0][1].device
        self._host = tuple(_host_pages(*page) for page in pages) if device.type == "cpu" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def views(self, block_ids: BlockTable) -> list[memoryview] | None:
        if self._host is None:
            return None
        return [view for pages in self._host for view in pages.views(block_ids[pages.group])]

    def gather(self, block_ids: BlockTable, out: memoryview) -> None:
        if self._host is None:
            self._gather_from_device(block_ids, out)
            return
        offset = 0
        for pages in self._host:
            offset = pages.copy(block_ids[pages.group], out, offset, is_gather=True)

    def scatter(self, block_ids: BlockTable, data: memoryview) -> None:
        if self._host is None:
            self._scatter_to_device(block_ids, data)
            return
        offset = 0
        for pages in self._host:
            offset = pages.copy(block_ids[pages.group], data, offset, is_gather=False)

    @property
    def device_index(self) -> int | None:
        """The GPU that holds the pages; None: host memory."""
        device = self._pages[0][1].device
        return (device.index or 0) if device.type == "cuda" else None

    def gather_on_device(self, block_ids: BlockTable, out: torch.Tensor) -> None:
        """As `gather`, into a uint8 tensor of the pages' device, on torch's current stream; waits for nothing."""
        offset = 0
        for group, view, axis in self._pages:
            part, offset = self._part(view, axis, len(block_ids[group]), out, offset)
            torch.index_select(_as_they_lie(view, axis), axis, self._index(block_ids[group]), out=part)

    def scatter_on_device(self, block_ids: BlockTable, data: torch.Tensor) -> None:
        """As `scatter`, from a uint8 tensor of the pages' device, on torch's current stream; waits for nothing."""
        offset = 0
        for group, view, axis in self._pages:
            part, offset = self._part(view, axis, len(block_ids[group]), data, offset)
            _as_they_lie(view, axis).index_copy_(axis, self._index(block_ids[group]), part)

    def _gather_from_device(self, block_ids: BlockTable, out: memoryview) -> None:
        with self._on_side_stream():
            packed = torch.empty(len(out), dtype=torch.uint8, device=self._pages[0][1].device)
            self.gather_on_device(block_ids, packed)
            torch.frombuffer(out, dtype=torch.uint8).copy_(packed)  # waits: the bytes are there when this returns

    def _scatter_to_device(self, block_ids: BlockTable, data: memoryview) -> None:
        with self._on_side_stream():
            packed = torch.frombuffer(data, dtype=torch.uint8).to(self._pages[0][1].device)
            self.scatter_on_device(block_ids, packed)
            if self._stream is not None:
                self._stream.synchronize()

    def _index(self, ids: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._pages[0][1].device)

    def _on_side_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @staticmethod
    def _part(
        view: torch.Tensor, axis: int, num_blocks: int, packed: torch.Tensor, offset: int
    ) -> tuple[torch.Tensor, int]:
        """The bytes of these blocks within `packed`, shaped as the pages lie; and where the next tensor's begin."""
        num_layers, _, page_words = view.shape
        end = offset + num_layers * num_blocks * page_words * view.itemsize
        shape = (num_layers, num_blocks, page_words) if axis else (num_blocks, num_layers, page_words)
        return packed[offset:end].view(view.dtype).view(shape), end


@dataclass(frozen=True, slots=True)
class _HostPages:
    """The pages of one KV tensor in host memory."""

    group: int
    memory: memoryview
    """All of the allocation, as bytes."""
    pages: np.ndarray[Any, np.dtype[np.uint8]]
    """The tensor's part of it: [layers, blocks, page bytes]."""
    offset: int
    block_axis: int

    def copy(self, ids: tuple[int, ...], packed: memoryview, offset: int, *, is_gather: bool) -> int:
        """Between these blocks and `packed[offset:]`; returns where the next tensor's bytes begin. One call a block, of
        which none holds the interpreter's lock."""
        num_layers, _, page_bytes = self.pages.shape
        num_bytes = len(ids) * int(num_layers * page_bytes)
        if not num_bytes:
            return offset
        part = np.frombuffer(packed, np.uint8, num_bytes, offset)
        if len(ids) == 1:  # no axis to put first: spares a fifth of what the interpreter costs
            page, part = self.pages[:, ids[0]], part.reshape(num_layers, page_bytes)
            if is_gather:
                part[:] = page
            else:
                page[:] = part
            return offset + num_bytes
        if self.block_axis:
            part = part.reshape(num_layers, len(ids), page_bytes)
        else:
            part = part.reshape(len(ids), num_layers, page_bytes).transpose(1, 0, 2)
        for number, block in enumerate(ids):
            if is_gather:
                part[:, number] = self.pages[:, block]
            else:
                self.pages[:, block] = part[:, number]
        return offset + num_bytes

    def views(self, ids: tuple[int, ...]) -> list[memoryview]:
        """The pages of these blocks in the order of a gather, those that are adjacent in memory in one view."""
        num_layers, _, page_bytes = self.pages.shape
        layer_bytes, block_bytes, _ = self.pages.strides
        blocks = [self.offset + block * block_bytes for block in ids]
        if not self.block_axis and layer_bytes == page_bytes:  # a block's layers follow each other
            starts, size = blocks, num_layers * page_bytes
        else:
            layers, size = [layer * layer_bytes for layer in range(num_layers)], page_bytes
            if self.block_axis:
                starts = [layer + block for layer in layers for block in blocks]
            else:
                starts = [layer + block for block in blocks for layer in layers]
        found: list[memoryview] = []
        first = end = None
        for start in starts:
            if start != end:
                if end is not None:
                    found.append(self.memory[first:end])
                first = start
            end = start + size
        if end is not None:
            found.append(self.memory[first:end])
        return found


def _host_pages(group: int, view: torch.Tensor) -> _HostPages:
    raw = torch.empty(0, dtype=torch.int8).set_(view.untyped_storage()).numpy()
    pages = view.numpy().view(np.uint8)
    return _HostPages(group, memoryview(raw).cast("B"), pages, view.storage_offset(), _block_axis(view))


def _block_axis(view: torch.Tensor) -> int:
    """Of the view as it lies in memory: 0 when a block's layers lie together, 1 when a layer's blocks do."""
    return int(view.stride(0) >= view.stride(1))


def _as_they_lie(view: torch.Tensor, block_axis: int) -> torch.Tensor:
    return view if block_axis else view.transpose(0, 1)


def _in_wide_words(view: torch.Tensor) -> torch.Tensor:
    """The same bytes as int64 where sizes and strides allow it: torch scatters element by element, ten times slower
    in bytes than in words (measured: 0.6 against 6 GB/s)."""
    spans = (view.shape[2], view.stride(0), view.stride(1), view.storage_offset())
    return view.view(torch.int64) if all(span % _WORD_BYTES == 0 for span in spans) else view
