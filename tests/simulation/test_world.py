"""Does the simulated fleet serve every request whole, move running ones, and live the same day twice?"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from migration.types import InstanceId
from orchestrator.events import DrainRequested
from orchestrator.policy.columns import Rule
from orchestrator.sim.arms import ARMS, Arm
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.compare import Question, Scaled
from orchestrator.sim.copying import LinkParams
from orchestrator.sim.day import Counts
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.score import littles_law_gap
from orchestrator.sim.steptime import StepTimes
from orchestrator.sim.workload import Zipf, gamma_times, generated
from orchestrator.sim.world import World, WorldParams

SMALL = LengthConfig(num_blocks=96, block_size=16, max_model_len=6_144, max_num_seqs=32, max_num_batched_tokens=512)
TIMES = StepTimes(base_s=0.01, token_s=0.0001, request_s=0.0005)
ROBIN = Arm("skewed", "each in turn, evened by moves", rule=Rule.ROUND_ROBIN)


def asked(seed: int, count: int = 150, requests_per_s: float = 6.0) -> list[Arrival]:
    """So many that memory runs out now and then."""
    rng = Random(seed)
    arrivals = generated(rng, Zipf(64, 2.0, 500), Zipf(96, 1.5, 700), gamma_times(rng, requests_per_s, 2.0), count)
    return [replace(one, max_tokens=700) for one in arrivals]


def params(arm: Arm = ARMS["ours"], **more: object) -> WorldParams:
    return WorldParams(engine=SMALL, times=TIMES, arm=arm, **more)  # type: ignore[arg-type]


def play(
    world_params: WorldParams, arrivals: list[Arrival], meanwhile: Callable[[World], None] | None = None
) -> tuple[list[Lived], Counts, World]:
    """`meanwhile` is called when a third of the requests have come."""

    async def day() -> tuple[list[Lived], Counts, World]:
        world = World(world_params)
        if meanwhile is not None:
            at_s = world_params.settle_s + arrivals[len(arrivals) // 3].at_s
            asyncio.get_running_loop().call_later(at_s, meanwhile, world)
        lived = await world.play(arrivals)
        return lived, world.counts(), world

    return run_jumping(day())


@pytest.mark.parametrize("arm", [*ARMS.values(), ROBIN], ids=lambda arm: arm.name)
def test_every_request_gets_its_whole_answer(arm: Arm) -> None:
    arrivals = asked(1)
    lived, counts, world = play(params(arm), arrivals)
    assert [one.arrival for one in lived] == arrivals
    assert [one.error for one in lived] == [""] * len(arrivals)
    assert [one.num_tokens for one in lived] == [one.num_answer for one in arrivals]
    assert all(one.sent_s < one.first_s <= one.last_s for one in lived)
    assert counts.preemptions > 0, "memory must run out for this to mean anything"
    for instance in world.instances.values():
        instance.engine.check_integrity()
        assert instance.engine.batch.free == SMALL.num_blocks, "blocks of somebody who has left"
        instance.agent.check_integrity()
    for gateway in world.gateways:
        gateway.router.check_integrity()
    assert littles_law_gap(lived) < 1e-9


def test_control_a_fleet_that_takes_the_least_free_instance_for_the_freest_does_far_worse() -> None:
    arrivals = asked(2, requests_per_s=3.0)
    waits = {}
    for name in ("inverted", "dispatch", "ours", "llumnix", "round-robin"):
        lived, _, _ = play(params(ARMS[name]), arrivals)
        waits[name] = sum(one.first_s - one.sent_s for one in lived) / len(lived)
    inverted = waits.pop("inverted")
    assert inverted > 3 * max(waits.values()), (inverted, waits)


def test_control_over_links_that_carry_nothing_no_request_arrives_with_its_kv_and_none_is_lost() -> None:
    """What waits has no KV, and may begin elsewhere all the same."""
    arrivals, with_kv = asked(2), {}
    for bytes_per_s in (0.0, 8e9):
        lived, _, world = play(params(ROBIN, link=LinkParams(bytes_per_s=bytes_per_s)), arrivals)
        assert [one.num_tokens for one in lived] == [one.num_answer for one in arrivals]
        ended = [one for one in world.fleet.summaries if one.moved_tokens > 0]
        with_kv[bytes_per_s] = [one.outcome for one in ended].count("committed")
        assert any(one.outcome != "committed" for one in world.fleet.summaries), "they were tried"
    assert with_kv[0.0] == 0 < with_kv[8e9]


def test_requests_move_while_they_run_and_skewed_load_is_evened() -> None:
    arrivals = asked(2, count=250)
    off, _, _ = play(params(ARMS["round-robin"]), arrivals)
    on, counts, _ = play(params(ROBIN), arrivals)
    assert counts.migrations > 0 and counts.copied_bytes > 0
    assert sum(one.ttft_s for one in on) < sum(one.ttft_s for one in off)
    assert sum(one.num_tokens for one in on) == sum(one.num_tokens for one in off)


def test_the_same_day_is_lived_twice_to_the_byte() -> None:
    def live() -> tuple[bytes, list[float]]:
        lived, _, world = play(params(ROBIN, keeps_journal=True, num_gateways=2), asked(3))
        assert world.journal is not None
        return world.journal.text(), [one.last_s for one in lived]

    assert live() == live()


def test_a_gateway_takes_its_time_for_one_request_after_the_other() -> None:
    arrivals = [Arrival(index, 0.0, 16, 1, 1) for index in range(4)]
    at_once, _, _ = play(params(num_gateways=2), arrivals)
    one_by_one, _, _ = play(params(num_gateways=2, front_end_s=1.0), arrivals)
    later = [slow.ttft_s - fast.ttft_s for fast, slow in zip(at_once, one_by_one, strict=True)]
    assert later == pytest.approx([1.0, 1.0, 2.0, 2.0], abs=0.02)


def test_no_decision_hangs_on_the_hashes_of_names(repo_root: Path) -> None:
    """Python's differ from process to process, and with them the order of sets."""
    script = (
        "import hashlib; from tests.simulation.test_world import *\n"
        "lived, _, world = play(params(ROBIN, keeps_journal=True, num_gateways=2, num_instances=3), asked(4))\n"
        "print(hashlib.sha256(world.journal.text()).hexdigest())"
    )

    def live(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", script], cwd=repo_root, env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert live("1") == live("2") != ""


def test_a_drained_instance_is_empty_while_the_others_serve() -> None:
    def drain(world: World) -> None:
        name = InstanceId("instance-1")
        _TASKS.append(
            asyncio.ensure_future(world.orchestrator.ask(lambda token: DrainRequested(token, name, wait=True)))
        )

    arrivals = asked(5)
    lived, _, world = play(params(num_instances=3), arrivals, drain)
    assert [one.num_tokens for one in lived] == [one.num_answer for one in arrivals]
    assert [one.error for one in lived] == [""] * len(arrivals)
    assert _TASKS.pop().done(), "the drain was confirmed"
    assert world.instances["instance-1"].agent.num_streams == 0


_TASKS: list[asyncio.Future[object]] = []


def test_what_had_begun_at_a_killed_instance_goes_on_elsewhere_and_nobody_hears_of_it() -> None:
    arrivals = asked(6)
    lived, _, world = play(params(num_instances=3), arrivals, lambda world: world.kill_instance("instance-2"))
    assert [(one.error, one.num_tokens) for one in lived] == [("", one.arrival.num_answer) for one in lived]
    assert sum(gateway.router.counts.revived for gateway in world.gateways) > 0, "the control: some had begun"
    assert "instance-2" not in world.instances


def test_who_was_asked_to_end_is_not_called_lost_and_who_was_killed_is(caplog: pytest.LogCaptureFixture) -> None:
    question = Question("S-S", 1.0, num_requests=240, num_instances=3, scaled=Scaled(40.0, 640.0, most=3))
    idle = question.arrivals(1)
    with caplog.at_level(logging.INFO):
        _, _, world = play(question.world(ARMS["ours"], 1), idle)
        assert len(world.instances) < 3, "the control: some have ended"
        assert "instance stopped instance=" in caplog.text and "instance lost" not in caplog.text
        play(params(num_instances=3), asked(6), lambda world: world.kill_instance("instance-2"))
        assert "instance lost instance=instance-2" in caplog.text


def test_a_part_that_breaks_ends_the_play_at_once() -> None:
    def break_it(world: World) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("broken on purpose")

        world.instances["instance-0"].agent._handle = broken  # type: ignore[assignment, method-assign]

    arrivals = [*asked(7), Arrival(1_000, 1_000_000.0, 1, 1, 1)]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        play(params(), arrivals, break_it)
