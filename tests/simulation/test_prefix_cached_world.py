"""Is a simulated fleet with prefix caches faster by what it need not compute, and does dispatch make more of them?"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import pytest

from migration.types import InstanceId
from orchestrator.events import DrainRequested
from orchestrator.policy.columns import DispatchParams, Rule
from orchestrator.sim.arms import ARMS, Arm
from orchestrator.sim.arrivals import PREFIX_BLOCK_TOKENS, Arrival, Lived
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.steptime import StepTimes
from orchestrator.sim.world import World, WorldParams
from orchestrator.state import CoreParams
from tests.simulation.test_world import play

ENGINE = LengthConfig(num_blocks=1_000, max_model_len=6_144, max_num_seqs=32, max_num_batched_tokens=512)
TIMES = StepTimes(base_s=0.01, token_s=0.0001, request_s=0.0005)
ROBIN = Arm("skewed", "each in turn, evened by moves", rule=Rule.ROUND_ROBIN)


def talked(seed: int, count: int = 200, num_talks: int = 12, requests_per_s: float = 5.0) -> list[Arrival]:
    """As Mooncake's: a few beginnings, each of 4 ids, come again and again, each time with another end. All of them are
    more than one instance has room for."""
    rng, at_s, arrivals = Random(seed), 0.0, []
    for index in range(count):
        at_s += rng.expovariate(requests_per_s)
        talk, num_more = rng.randrange(num_talks), rng.randint(1, 600)
        ends = range(1_000 * index, 1_000 * index + (num_more - 1) // PREFIX_BLOCK_TOKENS + 1)
        ids = (*(-1 - 4 * talk - part for part in range(4)), *ends)
        answer = rng.randint(1, 60)
        arrivals.append(Arrival(index, at_s, 4 * PREFIX_BLOCK_TOKENS + num_more, answer, answer, prefix_ids=ids))
    return arrivals


@dataclass(frozen=True)
class Came:
    """Of one day."""

    lived: list[Lived]
    world: World

    @property
    def ttft_s(self) -> float:
        return statistics.fmean(one.ttft_s for one in self.lived)

    @property
    def prefill_tokens(self) -> int:
        """Computed, by what the instances reported."""
        view = self.world.gateways[0].router.view(0.0)
        return sum(one.report.steps.num_prefill_tokens for one in view.instances)


def day(arm: Arm, prefix_cache: bool, weight: float = 1.0, meanwhile: Callable[[World], None] | None = None) -> Came:
    params = WorldParams(
        num_instances=3,
        num_gateways=2,
        engine=replace(ENGINE, prefix_cache=prefix_cache),
        times=TIMES,
        core=CoreParams(dispatch=DispatchParams(prefix_weight=weight)),
        arm=arm,
    )
    lived, _, world = play(params, talked(1), meanwhile)
    assert [one.num_tokens for one in lived] == [one.arrival.num_answer for one in lived]
    for instance in world.instances.values():
        instance.engine.check_integrity()
        assert instance.engine.batch.free == ENGINE.num_blocks, "blocks of somebody who has left"
        instance.agent.check_integrity()
    for gateway in world.gateways:
        gateway.router.check_integrity()
    return Came(lived, world)


def test_what_is_cached_is_not_computed_and_first_tokens_come_sooner() -> None:
    off, on = day(ARMS["dispatch"], prefix_cache=False), day(ARMS["dispatch"], prefix_cache=True)
    assert off.world.counts().found_tokens == 0
    assert off.prefill_tokens == sum(one.arrival.num_prompt for one in off.lived) == off.world.counts().prompt_tokens
    assert on.prefill_tokens == off.prefill_tokens - on.world.counts().found_tokens
    assert on.world.counts().found_share > 0.5
    assert on.ttft_s < 0.7 * off.ttft_s


def test_dispatch_that_heeds_prefixes_finds_more_of_them() -> None:
    heeding, without = (day(ARMS["dispatch"], prefix_cache=True, weight=weight) for weight in (1.0, 0.0))
    assert heeding.world.counts().found_share > without.world.counts().found_share + 0.1
    assert heeding.ttft_s < without.ttft_s


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_what_the_destination_has_cached_is_not_copied(prefix_cache: bool) -> None:
    """An instance is emptied while it serves."""

    draining: list[asyncio.Future[object]] = []

    def drain(world: World) -> None:
        asked = world.orchestrator.ask(lambda token: DrainRequested(token, InstanceId("instance-1"), wait=True))
        draining.append(asyncio.ensure_future(asked))

    came = day(ROBIN, prefix_cache, meanwhile=drain)
    counts = came.world.counts()
    assert draining.pop().done() and counts.migrations > 0
    of_each = counts.copied_bytes / counts.migrations / ENGINE.bytes_per_token
    assert (of_each < 4 * PREFIX_BLOCK_TOKENS) == prefix_cache
