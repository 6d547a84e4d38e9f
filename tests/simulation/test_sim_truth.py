"""Does bench.sim_truth find a fleet's twin? Held against fleets that are simulated themselves, so that all is known."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from bench.sim_truth_twin import Run, Served, errors, simulated, told, twin_of
from orchestrator.errors import OrchestratorError
from orchestrator.sim.arms import ARMS
from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.steptime import Attention, StepTimes
from orchestrator.sim.workload import Zipf, gamma_times, generated
from orchestrator.sim.world import World, WorldParams

TRUE = WorldParams(
    num_instances=1,
    engine=LengthConfig(num_blocks=320, block_size=32, max_num_seqs=64, max_model_len=10_240),
    times=StepTimes(4e-3, 90e-6, 256, 10e-6, attention=Attention(sequence_s=2e-4, square_s=15e-9, cross_s=30e-9)),
    arm=ARMS["dispatch"],
    front_end_s=0.009,
    keeps_journal=True,
)


def lived_there(name: str, params: WorldParams, arrivals: list[Arrival]) -> tuple[Run, bytes]:
    async def day() -> tuple[Run, bytes]:
        world = World(params)
        lived = await world.play(arrivals)
        began_s = lived[0].sent_s
        requests = tuple(
            Served(
                one.sent_s - began_s,
                one.arrival.num_prompt,
                one.num_tokens,
                one.first_s - began_s,
                one.last_s - began_s,
            )
            for one in lived
        )
        assert world.journal is not None
        return Run(name, requests, 0.0, asyncio.get_running_loop().time()), world.journal.text()

    return run_jumping(day())


def asked(seed: int, prompts: Zipf, answers: Zipf, requests_per_s: float, count: int) -> list[Arrival]:
    rng = Random(seed)
    arrivals = generated(rng, prompts, answers, gamma_times(rng, requests_per_s, 2.0), count)
    return [replace(one, max_tokens=one.num_answer) for one in arrivals]


FITTED_TO = asked(1, Zipf(160, 1.2, 1_024), Zipf(96, 1.5, 768), 5.0, 250)
FORETOLD = asked(2, Zipf(256, 1.5, 1_536), Zipf(48, 1.5, 512), 25.0, 300)
"""More than it keeps up with, so that queues are part of it."""


def test_a_day_is_foretold_from_another_one(tmp_path: Path) -> None:
    run, journal = lived_there("A", TRUE, FITTED_TO)
    (tmp_path / "journal").write_bytes(journal)
    twin = twin_of([run], tmp_path / "journal", 1)
    # The way there and back is in it: a message takes between one latency and two.
    assert TRUE.front_end_s <= twin.params.front_end_s <= TRUE.front_end_s + 4 * TRUE.latency_s
    other, others_journal = lived_there("B", TRUE, FORETOLD)
    (tmp_path / "other").write_bytes(others_journal)
    off = errors(told([simulated(other.requests, twin.params)]), told([other.requests]))
    assert all(abs(one) < 0.02 for one in off.values()), off
    assert abs(twin.busy_error(other.lines_of(tmp_path / "other"))) < 0.01


def test_a_slower_machine_is_not_foretold(tmp_path: Path) -> None:
    """A negative control: the errors are those of what was measured, whatever is known."""
    run, journal = lived_there("A", TRUE, FITTED_TO)
    (tmp_path / "journal").write_bytes(journal)
    twin = twin_of([run], tmp_path / "journal", 1)
    slower = replace(TRUE, times=replace(TRUE.times, base_s=8e-3, token_s=180e-6))
    other, others_journal = lived_there("B", slower, FORETOLD)
    (tmp_path / "other").write_bytes(others_journal)
    off = errors(told([simulated(other.requests, twin.params)]), told([other.requests]))
    assert off["mean_e2e"] < -0.3 and off["p95_ttft"] < -0.3 and off["throughput"] > 0.2
    assert twin.busy_error(other.lines_of(tmp_path / "other")) < -0.3


def test_figures_are_those_of_all_runs_together() -> None:
    first = (Served(0.0, 5, 10, 1.0, 2.0), Served(1.0, 5, 30, 1.5, 4.0))
    second = (Served(0.0, 5, 20, 3.0, 6.0),)
    both = told([first, second])
    assert both.mean_e2e_s == pytest.approx((2.0 + 3.0 + 6.0) / 3)
    assert both.tokens_per_s == pytest.approx(60 / 10)
    assert both.p95_ttft_s == pytest.approx(2.8)  # between 1.0 and 3.0
    assert errors(both, both) == {"mean_e2e": 0.0, "p95_ttft": 0.0, "throughput": 0.0}


def test_a_request_that_the_twin_refuses_is_told() -> None:
    with pytest.raises(OrchestratorError, match="1 requests failed in the simulator: "):
        simulated((Served(0.0, 20_000, 5, 1.0, 2.0),), TRUE)
