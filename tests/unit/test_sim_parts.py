"""Do the simulator's parts say what their sources say: step times, links, workloads, scores?"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import pytest

from migration.errors import CopyFailed
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.asked import Wanted
from orchestrator.sim.copying import LinkParams, Links
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.score import by_kind, figure, half_width, littles_law_gap
from orchestrator.sim.steptime import LLUMNIX_A10, LLUMNIX_FLEET, Attention, StepTimes, from_profile
from orchestrator.sim.workload import LLUMNIX, gamma_times, llumnix, with_urgent

# ---------------------------------------------------------------------- step times
EXAMPLES = {
    "decode B=1 ctx=512": ((), 1, 512),
    "decode B=8 ctx=1024": ((), 8, 8 * 1024),
    "decode B=32 ctx=1024": ((), 32, 32 * 1024),
    "decode B=64 ctx=2048": ((), 64, 64 * 2048),
    "prefill 512": (((512, 0),), 0, 0),
    "prefill 2048": (((2048, 0),), 0, 0),
    "prefill 512 @ctx 1536": (((512, 1536),), 0, 0),
    "mixed 480+32x1024": (((480, 0),), 32, 32 * 1024),
}


def test_published_step_times_are_those_of_their_worked_examples(data_dir: Path) -> None:
    profiles = json.loads((data_dir / "profiles" / "step_time_models.json").read_text())
    examples = profiles["worked_examples_gpu_ms_without_cpu"]
    assert len(examples) == 6
    for name, expected_ms in examples.items():
        del profiles["models"][name]["cpu"]
        times = from_profile(profiles, name)
        found_ms = {what: 1e3 * times.step_s(*EXAMPLES[what]) for what in expected_ms}
        assert found_ms == pytest.approx(expected_ms, abs=0.011), name  # they are rounded to hundredths


def test_a_profile_that_is_not_there_or_lacks_something_is_named() -> None:
    with pytest.raises(ValueError, match="no step times named 'b'; there: a"):
        from_profile({"models": {"a": {}}}, "b")
    with pytest.raises(ValueError, match="the step times of 'a' lack 'linear'"):
        from_profile({"models": {"a": {}}}, "a")


def test_steps_alike_take_as_long_together_as_one_by_one() -> None:
    times = StepTimes(0.01, 0.001, 4, 0.0005, 0.0003, Attention(0.001, 0.0002, 1e-5))
    one_by_one = [times.step_s((), 7, 900 + 7 * number) for number in range(40)]
    first_s = one_by_one[0]
    for count in (1, 2, 17, 40):
        assert times.steps_s(first_s, 7, count) == pytest.approx(sum(one_by_one[:count]), rel=1e-12)
        assert times.steps_within(first_s, 7, sum(one_by_one[:count])) == count
        assert times.steps_within(first_s, 7, sum(one_by_one[:count]) - 1e-6) == count - 1
    with pytest.raises(ValueError, match="must take time"):
        times.steps_within(0.0, 1, 1.0)


def test_the_a10_of_llumnix_is_as_fast_as_its_paper_shows() -> None:
    anew_ms = {256: 58, 512: 110, 1024: 220, 2048: 436, 4096: 940, 8192: 1995}
    found_ms = {tokens: 1e3 * LLUMNIX_A10.step_s(((tokens, 0),), 0, 0) for tokens in anew_ms}
    assert found_ms == pytest.approx(anew_ms, rel=0.04)
    assert 1e3 * LLUMNIX_A10.step_s((), 32, 8192) == pytest.approx(52.0, rel=0.02)
    assert 1e3 * LLUMNIX_A10.step_s((), 1, 8192) == pytest.approx(43.5, rel=0.02)


def test_an_instance_of_llumnixs_fleet_pays_for_each_request_and_for_prompts_a_step_of_their_own() -> None:
    def more_ms(chunks: list[tuple[int, int]], num_decoding: int) -> float:
        steps_s = (times.step_s(chunks, num_decoding, 100 * num_decoding) for times in (LLUMNIX_FLEET, LLUMNIX_A10))
        return 1e3 * (next(steps_s) - next(steps_s))

    assert more_ms([], 8) == pytest.approx(8 * 2.0)
    assert more_ms([(300, 0)], 0) == pytest.approx(2.0)
    assert more_ms([(300, 0), (90, 0)], 8) == pytest.approx(10 * 2.0 + 36.5)


# ---------------------------------------------------------------------- links
def test_copies_share_the_way_out_and_the_way_in() -> None:
    async def play() -> dict[str, float]:
        links, loop = Links(LinkParams(bytes_per_s=100.0, latency_s=0.0)), asyncio.get_running_loop()
        ended: dict[str, float] = {}

        async def copy(name: str, source: str, destination: str, num_bytes: int) -> None:
            await links.copy(source, destination, num_bytes)
            ended[name] = loop.time()

        await asyncio.gather(
            copy("a to b", "a", "b", 100), copy("a to c", "a", "c", 200), copy("d to e", "d", "e", 300)
        )
        return ended

    # a's two share its way out until the shorter one has landed; d's has all of its own.
    assert run_jumping(play()) == pytest.approx({"a to b": 2.0, "a to c": 3.0, "d to e": 3.0})


def test_a_copy_to_one_that_goes_fails_and_gives_its_share_back() -> None:
    async def play() -> float:
        links, loop = Links(LinkParams(bytes_per_s=100.0, latency_s=0.0)), asyncio.get_running_loop()
        lost, kept = (asyncio.create_task(links.copy("a", name, 200)) for name in "bc")
        loop.call_later(1.0, links.remove, "b")
        await kept
        with pytest.raises(CopyFailed, match="b is gone"):
            await lost
        with pytest.raises(CopyFailed, match="nobody receives at b"):
            await links.copy("a", "b", 1)
        return loop.time()

    assert run_jumping(play()) == pytest.approx(1.0 + 150 / 100)


def test_a_copy_that_is_broken_off_gives_its_share_back() -> None:
    async def play() -> float:
        links, loop = Links(LinkParams(bytes_per_s=100.0, latency_s=0.0)), asyncio.get_running_loop()
        broken, kept = (asyncio.create_task(links.copy("a", name, 200)) for name in "bc")
        loop.call_later(1.0, broken.cancel)
        await kept
        return loop.time()

    assert run_jumping(play()) == pytest.approx(1.0 + 150 / 100)


# ---------------------------------------------------------------------- workloads
@pytest.mark.parametrize(
    ("name", "mean", "quantiles"),
    [("S", 128, (38, 113, 413, 1464)), ("M", 256, (32, 173, 1288, 4208)), ("L", 512, (55, 582, 3113, 5166))],
)
def test_lengths_are_those_of_llumnix(name: str, mean: int, quantiles: tuple[int, ...]) -> None:
    """P50, P80, P95, P99 of its table (10,000 requests), within what such a sample of a heavy tail may miss."""
    drawn = LLUMNIX[name].draw(Random(1), 200_000)
    assert fmean(drawn) == pytest.approx(mean, rel=0.08)  # a little is cut off
    assert np.percentile(drawn, [50, 80, 95, 99]) == pytest.approx(quantiles, rel=0.15)


def test_a_workload_follows_from_its_seed_and_keeps_its_rate_and_bound() -> None:
    wanted = Wanted(4.0, 4_000, longest=8_192)
    arrivals = llumnix("M-L", Random(5), wanted).arrivals
    assert arrivals == llumnix("M-L", Random(5), wanted).arrivals != llumnix("M-L", Random(6), wanted).arrivals
    assert arrivals[-1].at_s == pytest.approx(1_000, rel=0.1)
    assert [one.index for one in arrivals] == list(range(4_000))
    assert all(1 <= one.num_answer <= one.max_tokens and one.num_prompt + one.max_tokens == 6_144 for one in arrivals)
    urgent = [one for one in with_urgent(arrivals, Random(1), 0.1) if one.kind == "urgent"]
    assert len(urgent) == pytest.approx(400, rel=0.2) and {one.priority for one in urgent} == {-10}
    shorter = llumnix("M-L", Random(5), Wanted(4.0, 4_000, longest=1_000)).arrivals
    assert {one.num_prompt + one.max_tokens for one in shorter} == {1_000}


@pytest.mark.parametrize("variation", [0.5, 1.0, 4.0])
def test_gaps_have_their_coefficient_of_variation(variation: float) -> None:
    times = gamma_times(Random(2), 10.0, variation)
    gaps = np.diff([next(times) for _ in range(50_000)])
    assert gaps.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


# ---------------------------------------------------------------------- scores
def lived(index: int, sent_s: float, first_s: float, last_s: float, num_tokens: int, kind: str = "") -> Lived:
    return Lived(
        Arrival(index, sent_s, 1, num_tokens, num_tokens, kind=kind), sent_s, first_s, last_s, num_tokens, True
    )


def test_a_score_counts_each_kind_without_the_first_and_the_failed() -> None:
    lives = [lived(0, 0.0, 9.0, 9.0, 1), lived(1, 1.0, 1.5, 3.5, 5, "urgent"), lived(2, 2.0, 3.0, 4.0, 1, "normal")]
    lives[2].error = "lost"
    lives += [lived(3, 3.0, 3.25, 3.25, 1, "normal")]
    found = by_kind(lives, warm_up_share=0.25)
    assert found.keys() == {"", "normal", "urgent"}
    assert (found["urgent"].ttft_s.mean, found["urgent"].tpot_s.mean, found["urgent"].latency_s.mean) == (0.5, 0.5, 2.5)
    assert (found["normal"].ttft_s.mean, found["normal"].num_failed, found["normal"].tpot_s.n) == (0.25, 1, 0)
    assert (found[""].ttft_s.n, found[""].num_failed) == (2, 1)
    assert math.isnan(figure([], lambda one: one.ttft_s).mean)


def test_an_interval_of_batch_means_holds_the_mean_19_times_in_20() -> None:
    rng = Random(3)

    def holds() -> bool:
        values, last = [], 0.0
        for _ in range(4_000):
            last = 0.8 * last + rng.gauss(0.0, 1.0)  # neighbours are alike
            values.append(last)
        return abs(fmean(values)) <= half_width(values)

    assert sum(holds() for _ in range(200)) == pytest.approx(190, abs=12)
    assert math.isnan(half_width([1.0] * 19))


def test_littles_law_is_broken_by_a_life_that_is_told_wrong() -> None:
    lives = [lived(index, 0.5 * index, 0.5 * index + 1, 0.5 * index + 3, 4) for index in range(50)]
    assert littles_law_gap(lives) < 1e-12
    assert littles_law_gap([]) == 0.0
