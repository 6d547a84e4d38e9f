"""Do streams of `kvferry serve` move while their instances guess tokens ahead? Seen from outside."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.support.model import tiny_model_path
from tests.support.moved_streams import GREEDY, MODEL, Sampling, client, moved_texts, texts_of
from tests.support.serving import Serving

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

READY_S = 240.0
NUM_TOKENS = 1800
NUM_HOPS = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16"),
    *("--speculative-config", json.dumps(NGRAM)),
)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    cluster = Serving(str(tiny_model_path()), "--instances", "2", "--no-rebalance", *FLAGS, num_gateways=1)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


async def test_a_greedy_stream_moved_there_and_back_says_what_one_left_alone_says(serving: Serving) -> None:
    sampling: Sampling = {**GREEDY, "frequency_penalty": 0.3}  # or it would go round in circles, and end too soon
    alone = await texts_of(serving, "alone", NUM_TOKENS, sampling)
    moved, num_committed = await moved_texts(serving, "moved", NUM_TOKENS, sampling, NUM_HOPS)
    assert num_committed == NUM_HOPS
    assert moved == alone


async def test_a_sampled_request_is_refused_with_its_reason(serving: Serving) -> None:
    sampling: Sampling = {"temperature": 0.8, "seed": 17}
    async with client(serving) as api:
        with pytest.raises(openai.BadRequestError, match="sampled requests cannot run on a CPU"):
            await api.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5, **sampling)
    with pytest.raises(openai.APIError, match="sampled requests cannot run on a CPU"):  # its stream has begun by then
        await texts_of(serving, "sampled", NUM_TOKENS, sampling)
