"""Does `kvferry serve` answer questions about images, and move such an answer while it streams? Real vLLM, two
gateways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.support.image_model import Picture, image_model_path, question
from tests.support.moved_streams import MODEL, Sampling, moved_texts, text_of, texts_of
from tests.support.serving import Serving

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

READY_S = 240.0
NUM_TOKENS = 1500
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16"),
)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    cluster = Serving(str(image_model_path()), "--instances", "2", "--no-rebalance", *FLAGS, num_gateways=2)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


def about(*seeds: int) -> Sampling:
    return {"temperature": 0.0, "messages": question(*map(Picture, seeds))}


async def test_an_answer_about_images_moved_there_and_back_says_what_one_left_alone_says(serving: Serving) -> None:
    alone = await texts_of(serving, "alone", NUM_TOKENS, about(1, 2))
    moved, num_committed = await moved_texts(serving, "moved", NUM_TOKENS, about(1, 2), num_hops=2)
    assert num_committed == 2
    assert moved == alone


async def test_every_image_is_told_from_every_other_whichever_gateway_it_comes_to(serving: Serving) -> None:
    """The negative control of the test above. Each client connection may meet another gateway."""
    texts = [await text_of(serving, f"image-{i}", 30, about(10 + i % 6)) for i in range(12)]
    assert len(set(texts)) == 6
    assert texts[:6] == texts[6:]
