"""Do real instances come and go under load without an error? `kvferry scale`, vLLM, OpenAI streams; one serve."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.model import tiny_model_path
from tests.support.moved_streams import MODEL, Sampling, owners_of, text_of
from tests.support.serving import Serving

pytestmark = pytest.mark.timeout(400)

READY_S = 240.0
NUM_STREAMS = 6
NUM_TOKENS = 1000
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16"),
)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    cluster = Serving(str(tiny_model_path()), "--instances", "2", "--no-rebalance", *FLAGS, num_gateways=1)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


def sampling_of(number: int) -> Sampling:
    """Half of them greedy, half seeded: each of them has one right answer."""
    return {"temperature": 0.0} if number % 2 else {"temperature": 0.8, "seed": number}


async def texts(serving: Serving, name: str, num_tokens: int) -> list[str]:
    streams = (text_of(serving, f"{name}-{number}", num_tokens, sampling_of(number)) for number in range(NUM_STREAMS))
    return list(await asyncio.gather(*streams))


async def test_scaling_in_under_load_and_out_again_gives_no_error_and_changes_no_answer(serving: Serving) -> None:
    """1. Streams run on both. 2. `kvferry scale 1`. 3. New ones come, and `kvferry scale 2` while they run."""
    alone = await texts(serving, "alone", NUM_TOKENS)
    reading = asyncio.create_task(texts(serving, "scaled", NUM_TOKENS))
    owners: dict[str, str] = {}
    for number in range(NUM_STREAMS):
        owners |= await owners_of(serving, f"scaled-{number}")
    assert set(owners.values()) == {"instance-0", "instance-1"}, "both must have something to lose"
    done = await asyncio.to_thread(serving.command, "scale", "1", "--deadline", "60")
    assert done.status == 0 and "emptying" in done.out, done
    moves = (await asyncio.to_thread(serving.status))["migrations"]
    num_moved = sum(move["outcome"] == "MIGRATION_OUTCOME_COMMITTED" for move in moves)
    assert num_moved, "something had to move, or nothing was tested"
    assert await reading == alone, "no stream noticed anything"

    reading = asyncio.create_task(texts(serving, "while-starting", NUM_TOKENS))
    done = await asyncio.to_thread(serving.command, "scale", "2", "--deadline", "200", timeout_s=210.0)
    assert done.status == 0, done
    listed = (await asyncio.to_thread(serving.status))["instances"]
    there = [(item["name"], item["epoch"]) for item in listed if item["state"] == "INSTANCE_STATE_SERVING"]
    assert sorted(epoch for _, epoch in there) == [1, 2] and len({name for name, _ in there}) == 2
    assert await reading == alone
    assert await texts(serving, "again", NUM_TOKENS) == alone, "the new one answers as the old one did"
