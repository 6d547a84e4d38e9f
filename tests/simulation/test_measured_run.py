"""Does a simulated instance take as long as a measured one? A published run of vLLM, and its step times."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.sim.arms import ARMS
from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.steptime import from_profile
from orchestrator.sim.world import World, WorldParams

MODEL = "llama3.1-8b/rtxpro6000/tp1"


def test_a_measured_run_of_vllm_is_foretold(data_dir: Path) -> None:
    """300 requests of ShareGPT at 10 a second: more than one instance keeps up with, so that queues are part of it. The
    step times were fitted to kernels measured one by one, the processor's part of 1 ms to this very run."""
    folder = data_dir / "profiles"
    with (folder / "vllm_measured_RTXPRO6000_llama31-8b_sharegpt300.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    arrivals = [
        Arrival(index, row["arrival_s"], int(row["input_tokens"]), answer := int(row["output_tokens"]), answer)
        for index, row in enumerate(rows)
    ]
    engine = LengthConfig(
        num_blocks=30_000, max_model_len=131_072, max_num_seqs=128, max_num_batched_tokens=2048, bytes_per_token=131_072
    )
    times = from_profile(json.loads((folder / "step_time_models.json").read_text()), MODEL)

    async def play() -> list[tuple[float, float, float, float]]:
        world = World(WorldParams(num_instances=1, engine=engine, times=times, arm=ARMS["dispatch"]))
        return [(one.ttft_s, one.latency_s, one.sent_s, one.last_s) for one in await world.play(arrivals)]

    ttft_s, latency_s, sent_s, last_s = np.array(run_jumping(play())).T
    first_s, ended_s = (np.array([row[name] for row in rows]) for name in ("first_token_s", "last_token_s"))
    came_s = np.array([row["arrival_s"] for row in rows])
    num_tokens = sum(one.num_answer for one in arrivals)
    assert latency_s.mean() == pytest.approx((ended_s - came_s).mean(), rel=0.15)
    assert np.percentile(ttft_s, 95) == pytest.approx(np.percentile(first_s - came_s, 95), rel=0.25)
    assert num_tokens / (last_s.max() - sent_s.min()) == pytest.approx(num_tokens / ended_s.max(), rel=0.10)
