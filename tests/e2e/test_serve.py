"""Does `kvferry serve` with real vLLM do the main job, seen from outside? One serve for the whole module."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from bench.models.adapters import write_adapter
from tests.support.model import tiny_model_path
from tests.support.moved_streams import GREEDY, MODEL, Sampling, moved_texts, owners_of, text_of, texts_of
from tests.support.serving import Serving, wait_gone

pytestmark = pytest.mark.timeout(300)

READY_S = 240.0
NUM_TOKENS = 1800
NUM_HOPS = 6
"""Three times there and back."""
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16"),
)


ADAPTER = "pirate"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    adapter = write_adapter(tmp_path_factory.mktemp("adapters") / ADAPTER, 1, tiny_model_path())
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}")
    cluster = Serving(str(tiny_model_path()), "--instances", "2", "--no-rebalance", *FLAGS, *lora, num_gateways=2)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, {"temperature": 0.8, "seed": 17}],
    ids=["greedy", "seeded"],
)
async def test_a_stream_moved_three_times_there_and_back_says_what_one_left_alone_says(
    serving: Serving, sampling: Sampling
) -> None:
    kind = "seeded" if "seed" in sampling else "greedy"
    alone = await texts_of(serving, f"alone-{kind}", NUM_TOKENS, sampling)
    moved, num_committed = await moved_texts(serving, f"moved-{kind}", NUM_TOKENS, sampling, NUM_HOPS)
    assert num_committed == NUM_HOPS
    assert moved == alone


async def test_a_stream_of_an_adapter_moves_with_its_adapter(serving: Serving) -> None:
    """The other instance has not heard of the adapter before."""
    sampling: Sampling = {**GREEDY, "model": ADAPTER}
    moved, num_committed = await moved_texts(serving, "adapter-moved", 1000, sampling, num_hops=3)
    assert num_committed == 3
    assert moved == await texts_of(serving, "adapter-alone", 1000, sampling)
    plain = await text_of(serving, "no-adapter", 60)
    assert not moved[0].startswith(plain.removesuffix("<length>")), "the control: the adapter matters"


async def test_a_stop_string_ends_a_moved_answer_where_it_ends_one_left_alone(serving: Serving) -> None:
    sampling: Sampling = {"temperature": 0.8, "seed": 17}
    whole = await text_of(serving, "whole", NUM_TOKENS, sampling)
    at = next(at for at in range(len(whole) * 9 // 10, len(whole)) if whole.index(whole[at : at + 12]) == at)
    stopping = {**sampling, "stop": [whole[at : at + 12]]}
    alone = await texts_of(serving, "stop-alone", NUM_TOKENS, stopping)
    assert alone == (whole[:at] + "<stop>",)
    moved, num_committed = await moved_texts(serving, "stop-moved", NUM_TOKENS, stopping, num_hops=4)
    assert num_committed == 4
    assert moved == alone


async def test_every_choice_of_n_moves_and_is_what_it_is_alone(serving: Serving) -> None:
    sampling: Sampling = {"temperature": 0.8, "seed": 17, "n": 2}
    alone = await texts_of(serving, "choices-alone", NUM_TOKENS, sampling)
    assert len(set(alone)) == 2, "the choices must differ, or one could stand for the other"
    moved, num_committed = await moved_texts(serving, "choices-moved", NUM_TOKENS, sampling, num_hops=2)
    assert num_committed == 4
    assert moved == alone


async def test_another_seed_says_something_else(serving: Serving) -> None:
    """The negative control of the test above: the text does depend on what travels with the request."""
    texts = [await text_of(serving, f"seed-{seed}", 60, {"temperature": 0.8, "seed": seed}) for seed in (17, 18)]
    assert texts[0] != texts[1]


def test_vllm_bench_serve_runs_unchanged(serving: Serving, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("vllm")
    options = ("--model", MODEL, "--tokenizer", str(tiny_model_path()), "--port", str(serving.port))
    load = ("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "24", "--num-prompts", "30")
    result = ("--save-result", "--result-dir", str(tmp_path), "--result-filename", "bench.json")
    done = subprocess.run(
        [command, "bench", "serve", *options, *load, *result], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "bench.json").read_text())
    assert (told["completed"], told["failed"]) == (30, 0)


async def test_a_drain_under_load_moves_the_streams_and_none_of_them_notices(serving: Serving) -> None:
    alone = await text_of(serving, "before-drain", 300)
    reading = [asyncio.create_task(text_of(serving, f"drain-{n}", 300)) for n in range(6)]
    for number in range(6):
        await owners_of(serving, f"drain-{number}")
    done = await asyncio.to_thread(serving.command, "drain", "instance-0", "--deadline", "10")
    assert done.status == 0 and "instance-0 is empty" in done.out, done
    assert await asyncio.gather(*reading) == [alone] * 6
    assert (await asyncio.to_thread(serving.command, "undrain", "instance-0")).status == 0


async def test_a_stream_that_the_operator_ends_says_so_and_the_others_go_on(serving: Serving) -> None:
    alone = await text_of(serving, "not-ended-alone", 600)
    ended = asyncio.create_task(text_of(serving, "to-be-ended", NUM_TOKENS))
    other = asyncio.create_task(text_of(serving, "not-ended", 600))
    (name,) = await owners_of(serving, "to-be-ended")
    await owners_of(serving, "not-ended")
    done = await asyncio.to_thread(serving.command, "cancel", name)
    assert done.status == 0 and f"{name} was ended" in done.out, done
    with pytest.raises(openai.APIError, match="the operator of this service ended the request"):
        await ended
    assert await other == alone
    await owners_of(serving, "to-be-ended", lambda owners: not owners)


async def begun(serving: Serving, name: str, num_tokens: int) -> str:
    """The instance of each request of that name, once it has put out so much."""
    async with asyncio.timeout(30):
        while True:  # another process: there is no event to wait for
            for item in (await asyncio.to_thread(serving.status))["requests"]:
                if name in item["external_id"] and item.get("num_output_tokens", 0) >= num_tokens:
                    return str(item["instance"].removeprefix("instances/"))
            await asyncio.sleep(0.05)


async def test_the_streams_of_a_killed_instance_go_on_at_the_other_one_token_for_token(serving: Serving) -> None:
    samplings: list[Sampling] = [GREEDY, GREEDY, {"temperature": 0.8, "seed": 17}, {"temperature": 0.8, "seed": 17}]
    alone = [await text_of(serving, f"not-killed-{n}", NUM_TOKENS, one) for n, one in enumerate(samplings)]
    reading = [asyncio.create_task(text_of(serving, f"bereft-{n}", NUM_TOKENS, one)) for n, one in enumerate(samplings)]
    owners = [await begun(serving, f"bereft-{n}", 30) for n in range(len(samplings))]
    assert "instance-0" in owners, "dispatch evens out"
    killed = psutil.Process((await asyncio.to_thread(serving.instance, "instance-0"))["process_id"])
    killed.kill()
    async with asyncio.timeout(15):
        while (await asyncio.to_thread(serving.instance, "instance-0"))["state"] != "INSTANCE_STATE_STOPPED":
            pass
    assert await asyncio.gather(*reading) == alone
    text = await text_of(serving, "after-the-kill", 40)
    assert len(text) > 40
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://127.0.0.1:{serving.port}/health")).status_code == 200
    states = {item["name"]: item["state"] for item in (await asyncio.to_thread(serving.status))["instances"]}
    assert states["instances/instance-1"] == "INSTANCE_STATE_SERVING"


def test_ctrl_c_leaves_nothing(serving: Serving) -> None:
    """The last one of this module: it ends the shared serve."""
    before = serving.descendants()
    status, said = serving.stop(signal.SIGINT)
    assert status == 0 and "nothing is left running" in said, said
    assert wait_gone(before, 3.0) == []
