"""Is a running stream of real vLLM given room when it is made urgent, with no word of any stream changed?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.gateway.priorities import key_digest
from tests.support.model import tiny_model_path
from tests.support.moved_streams import MODEL, owners_of, text_of
from tests.support.serving import Serving

pytestmark = pytest.mark.timeout(300)

READY_S = 240.0
NUM_TOKENS = 1800
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16"),
    *("--priority-levels", "high:-10:240,normal:0"),
)
"""Of 255 usable blocks a raised request wants 240 free beside it: it wants its instance for itself."""


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal.jsonl"


@pytest.fixture(scope="module")
def serving(journal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text("vip-key: high\n")
    flags = ("--journal", str(journal), "--priority-keys", str(keys))
    cluster = Serving(str(tiny_model_path()), "--instances", "2", *FLAGS, *flags, num_gateways=1)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


async def test_the_neighbour_of_a_stream_that_is_raised_moves_away_and_both_say_what_they_say_alone(
    serving: Serving, journal: Path
) -> None:
    alone = await text_of(serving, "alone", NUM_TOKENS)
    names = [f"shared-{number}" for number in range(3)]
    reading = {name: asyncio.create_task(text_of(serving, name, NUM_TOKENS)) for name in names}
    owners = {name: next(iter((await owners_of(serving, name)).values())) for name in names}
    crowded = max(set(owners.values()), key=list(owners.values()).count)
    raised, *neighbours = [name for name, owner in owners.items() if owner == crowded]
    assert neighbours, "three streams on two instances"
    done = await asyncio.to_thread(serving.command, "priority", f"cmpl-{raised}", "high")
    assert done.status == 0 and f"normal (0) -> high (-10) on {crowded}" in done.out, done
    for name in neighbours:
        await owners_of(serving, name, lambda found: set(found.values()).isdisjoint({crowded}))
    assert set((await owners_of(serving, raised)).values()) == {crowded}
    assert [await task for task in reading.values()] == [alone] * 3
    causes = [item["cause"] for item in (await asyncio.to_thread(serving.status))["migrations"]]
    assert causes and all(cause.startswith("isolate: 240 blocks are kept free") for cause in causes)
    text = await asyncio.to_thread(journal.read_text, encoding="utf-8")
    assert '"asked_by":"admin API SetRequestPriority"' in text and "normal (0) -> high (-10)" in text
    assert "vip-key" not in text


async def test_header_and_key_reach_the_engine_as_ranks(serving: Serving) -> None:
    async with httpx.AsyncClient(base_url=serving.base_url, timeout=60) as http:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 600, "ignore_eos": True}
        for request_id, headers, rank in (
            ("by-header", {"x-kvferry-priority": "high"}, -10),
            ("by-key", {"authorization": "Bearer vip-key"}, -10),
            ("by-neither", {}, 0),
        ):
            asked = {**headers, "x-request-id": request_id}
            answering = asyncio.create_task(http.post("/completions", json=body, headers=asked))
            await owners_of(serving, request_id)
            listed = (await asyncio.to_thread(serving.status))["requests"]
            assert [item["priority"] for item in listed if request_id in item["external_id"]] == [rank]
            assert (await answering).status_code == 200
        refused = await http.post("/completions", json=body, headers={"x-kvferry-priority": "urgent"})
        assert refused.status_code == 400 and "give a level (high, normal)" in json.dumps(refused.json())


async def test_a_key_that_gets_another_class_while_it_serves_has_it_from_the_next_request_on(serving: Serving) -> None:
    digest = key_digest(b"vip-key")
    async with httpx.AsyncClient(base_url=serving.base_url, timeout=60) as http:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 600, "ignore_eos": True}
        for level, rank in (("normal", 0), ("-4", -4)):
            done = await asyncio.to_thread(serving.command, "priority-key", level, "--digest", f"sha256:{digest}")
            assert done.status == 0 and done.out.startswith(f"key sha256:{digest[:12]}"), done
            asked = {"authorization": "Bearer vip-key", "x-request-id": f"vip{rank}"}
            answering = asyncio.create_task(http.post("/completions", json=body, headers=asked))
            await owners_of(serving, f"vip{rank}")
            listed = (await asyncio.to_thread(serving.status))["requests"]
            assert [item["priority"] for item in listed if f"vip{rank}" in item["external_id"]] == [rank]
            assert (await answering).status_code == 200
