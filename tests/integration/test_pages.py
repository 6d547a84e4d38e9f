"""Do pages come out of one KV memory and into another unchanged, whichever way layers and blocks are laid out?"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from instance.vllm.pages import PageStore  # noqa: E402 - it imports torch

LAYERS, BLOCKS, PAGE = 3, 10, 64


def memory(is_layer_outermost: bool, device: str, fill: int | None = None) -> tuple[PageStore, Any]:
    """A store over fresh memory, and its [layers, blocks, page bytes] view."""
    if fill is None:
        raw = torch.randint(-128, 127, (LAYERS * BLOCKS * PAGE,), dtype=torch.int8, device=device)
    else:
        raw = torch.full((LAYERS * BLOCKS * PAGE,), fill, dtype=torch.int8, device=device)
    strides = (BLOCKS * PAGE, PAGE, 1) if is_layer_outermost else (PAGE, LAYERS * PAGE, 1)
    view = raw.as_strided((LAYERS, BLOCKS, PAGE), strides)
    return PageStore(((0, view),), num_groups=1, num_blocks=BLOCKS), view


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_layer_outermost", [True, False])
def test_blocks_arrive_unchanged_and_nothing_else_is_touched(is_layer_outermost: bool, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source, source_view = memory(is_layer_outermost, device)
    destination, view = memory(is_layer_outermost, device, fill=7)
    assert source.layout.group_block_bytes == (LAYERS * PAGE,)
    data = memoryview(bytearray(3 * source.layout.index_bytes))
    source.gather(((8, 0, 3),), data)
    destination.scatter(((1, 9, 4),), data)
    assert torch.equal(view[:, [1, 9, 4]], source_view[:, [8, 0, 3]])
    untouched = [block for block in range(BLOCKS) if block not in (1, 9, 4)]
    assert bool((view[:, untouched] == 7).all())


@pytest.mark.parametrize("is_layer_outermost", [True, False])
def test_views_and_the_device_s_own_gather_say_the_same_bytes_as_a_gather(is_layer_outermost: bool) -> None:
    store, _ = memory(is_layer_outermost, "cpu")
    ids = ((8, 2, 3, 4, 0),)  # adjacent blocks among others
    data = bytearray(5 * store.layout.index_bytes)
    store.gather(ids, memoryview(data))
    views = store.views(ids)
    assert views is not None and b"".join(views) == data
    assert len(views) == (9 if is_layer_outermost else 3)  # adjacent pages are one view
    packed = torch.zeros(len(data), dtype=torch.uint8)
    store.gather_on_device(ids, packed)
    assert packed.numpy().tobytes() == data
    other, other_view = memory(is_layer_outermost, "cpu", fill=7)
    other.scatter_on_device(((1, 9, 5, 6, 7),), packed)
    back = bytearray(len(data))
    other.gather(((1, 9, 5, 6, 7),), memoryview(back))
    assert back == data
    assert bool((other_view[:, [0, 2, 3, 4, 8]] == 7).all())


def test_a_view_is_the_memory_itself() -> None:
    store, view = memory(True, "cpu")
    (first, *_) = store.views(((3,),)) or []
    first[0] ^= 1
    assert view[0, 3, 0].item() % 256 == first[0]
