"""Do blocks get from GPU to GPU unchanged, and do links end in time? Needs torch, CuPy and a CUDA device; no more."""

from __future__ import annotations

import pytest

from migration.transports.nccl import why_unavailable

REASON = why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no NCCL: {REASON}")
if REASON is None:
    from bench.copy_rate_gpu import run, why_skipped
    from bench.copy_rate_memory import Shape

    SHAPES = [
        Shape("layers outermost", 64 << 10, 4),
        Shape("blocks outermost", 64 << 10, 4, is_layers_outermost=False),
        Shape("odd pages", 1000, 3),
    ]
else:
    SHAPES = []


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_every_page_arrives_and_was_another_before(way: str, shape: Shape) -> None:
    num_bytes = 1024 * shape.block_bytes
    found = run("links", way, shape, num_bytes)
    assert found["is_equal"]
    assert not found["was_equal"]  # the control: it is the copy that made them equal


def test_a_receiver_that_takes_nothing_ends_at_the_deadline_and_the_pair_can_be_aborted() -> None:
    found = run("deaf", "nccl", SHAPES[0], 64 << 20)
    assert found["failure"] is not None and "deadline" in found["failure"]


def test_a_receiver_that_never_comes_ends_at_the_watchdog() -> None:
    found = run("alone", "nccl", SHAPES[0], 64 << 20)
    assert found["failure"] is not None and "not up after" in found["failure"]
    assert found["took_s"] < 10


@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_the_whole_carrier_pushes_over_a_link(way: str) -> None:
    if why_skipped() is not None:
        pytest.skip(str(why_skipped()))
    found = run("rates", way, SHAPES[0], 64 << 20, rounds=1)
    assert len(found["push"]) == len(found["raw"]) == 1
