"""How does a carrier read and write vLLM's KV memory? As pages, in host memory or on a GPU. Needs torch, not vLLM."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from migration.transports import KVLayout
from migration.types import BlockTable

_WORD_BYTES = 8


class PageStore:
    """A rank's KV memory as pages: `migration.transports.KVStore` over vLLM's one raw allocation.

    Byte order of a gather: KV tensor by KV tensor (their order is vLLM's, equal on both sides), in each [layer,
    block, page].
    """

    def __init__(self, pages: tuple[tuple[int, torch.Tensor], ...], num_groups: int, num_blocks: int) -> None:
        """`pages`: (group, int8 view [layers, blocks, page bytes])."""
        self._pages = tuple((group, _in_wide_words(view)) for group, view in pages)
        group_bytes = [0] * num_groups
        for group, view in pages:
            group_bytes[group] += view.shape[0] * view.shape[2]
        self._layout = KVLayout(tuple(group_bytes), num_blocks)
        device = pages[0][1].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def gather(self, block_ids: BlockTable, out: memoryview) -> None:
        offset = 0
        with self._on_side_stream():
            for group, view in self._pages:
                part, offset = self._part(view, len(block_ids[group]), out, offset)
                index = torch.tensor(block_ids[group], dtype=torch.long, device=view.device)
                if self._stream is None:
                    torch.index_select(view, 1, index, out=part)
                else:
                    part.copy_(view.index_select(1, index))  # waits: the bytes are in `out` when this returns

    def scatter(self, block_ids: BlockTable, data: memoryview) -> None:
        offset = 0
        with self._on_side_stream():
            for group, view in self._pages:
                part, offset = self._part(view, len(block_ids[group]), data, offset)
                index = torch.tensor(block_ids[group], dtype=torch.long, device=view.device)
                view.index_copy_(1, index, part.to(view.device))
            if self._stream is not None:
                self._stream.synchronize()

    def _on_side_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @staticmethod
    def _part(view: torch.Tensor, num_blocks: int, buffer: memoryview, offset: int) -> tuple[torch.Tensor, int]:
        num_layers, _, page_words = view.shape
        count = num_layers * num_blocks * page_words
        part = torch.frombuffer(buffer, dtype=view.dtype, count=count, offset=offset)
        return part.view(num_layers, num_blocks, page_words), offset + count * view.itemsize


def _in_wide_words(view: torch.Tensor) -> torch.Tensor:
    """The same bytes as int64 where sizes and strides allow it: torch scatters element by element, ten times slower
    in bytes than in words (measured: 0.6 against 6 GB/s)."""
    spans = (view.shape[2], view.stride(0), view.stride(1), view.storage_offset())
    return view.view(torch.int64) if all(span % _WORD_BYTES == 0 for span in spans) else view
