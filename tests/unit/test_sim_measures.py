"""Are the simulator's measures what their definitions say, in cases that can be reckoned by hand?"""

from __future__ import annotations

import math
from random import Random

import pytest

from instance.spec import MigrationSummary
from instance.types import Submission
from migration.types import RequestId
from orchestrator.policy.targets import Targets
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.copying import LinkParams, Links, SimMover
from orchestrator.sim.engine import Ask, LengthEngine, encode
from orchestrator.sim.fragmentation import fragmented_blocks
from orchestrator.sim.gaps import RUN_S, Gaps, together
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.losses import Loss, Losses
from orchestrator.sim.measures import SHARES, curves, fleet_measures
from orchestrator.sim.paired import half_width, ratio, t_95
from orchestrator.sim.presence import Presence
from orchestrator.sim.score import Beside, attainment, by_kind
from orchestrator.sim.series import MAX_POINTS, Glimpse, Moment, series_of, series_of_each
from orchestrator.sim.steptime import StepTimes


def lived(index: int, ttft_s: float, tpot_s: float, num_tokens: int, error: str = "", kind: str = "") -> Lived:
    arrival = Arrival(index, float(index), 1, num_tokens, num_tokens, kind=kind)
    first_s = index + ttft_s
    return Lived(arrival, index, first_s, first_s + tpot_s * (num_tokens - 1), num_tokens, True, error)


# ---------------------------------------------------------------------- gaps between tokens
def test_the_tokens_of_a_run_lie_evenly_and_a_standstill_is_one_gap() -> None:
    gaps = Gaps()
    assert gaps.add(0.08, 4) == pytest.approx(0.02)
    assert gaps.add(2.1, 4) == pytest.approx(2.1 - 3 * 0.05)  # before four steps of 50 ms at most
    assert gaps.add(0.3, 1) == 0.3  # a step with a prompt in it
    assert gaps.num == 9 and gaps.mean_s == pytest.approx(2.48 / 9)
    assert gaps.quantile_s(0.4) == pytest.approx(0.02, abs=0.0005)
    assert gaps.quantile_s(0.7) == pytest.approx(0.05, abs=0.0005)
    assert gaps.quantile_s(0.8) == pytest.approx(0.3, abs=0.0005)
    assert gaps.quantile_s(1.0) == pytest.approx(1.95)
    assert math.isnan(Gaps().quantile_s(0.5)) and math.isnan(Gaps().mean_s)


def test_gaps_of_several_kinds_are_put_together() -> None:
    one, other = Gaps(), Gaps()
    one.add(0.01, 1)
    other.add(3.0, 1)
    both = together([one, other])
    assert (both.num, both.quantile_s(1.0)) == (2, 3.0) and both.mean_s == pytest.approx(1.505)
    assert both.quantile_s(0.5) == pytest.approx(0.01, abs=0.0005)


def test_a_longest_gap_is_never_told_too_long_and_hardly_too_short() -> None:
    rng = Random(1)
    for _ in range(500):
        num_tokens = rng.randint(1, 12)
        step_s = rng.uniform(0.001, RUN_S / num_tokens)
        stood_still_s = rng.choice((0.0, rng.expovariate(2.0)))
        found_s, true_s = Gaps().add(stood_still_s + num_tokens * step_s, num_tokens), stood_still_s + step_s
        assert true_s - RUN_S < found_s <= true_s + 1e-12


# ---------------------------------------------------------------------- preemptions
def test_a_preemption_lasts_until_all_is_computed_again() -> None:
    """Four blocks of four tokens, steps of a second. Both requests have 8 of 9 tokens computed when at 5 s the first
    needs a third block: the second one gives its two up. At 12 s the first has its 12 tokens, and the step that ends at
    13 s computes the second's 9 tokens again."""
    engine = run_jumping(small_engine())
    for name in ("first", "second"):
        ask = Ask(num_prompt=4, num_answer=12, max_tokens=12)
        engine.add(Submission(RequestId(name), name, 0, 4, 12, encode(ask)))
    now_s = 0.0
    ended: dict[str, float] = {}
    while engine.has_work():
        ends_s = engine.runs.begin(now_s, 0.0)
        assert ends_s is not None
        outputs = engine.runs.end().result.outputs
        ended |= {one.request_id: ends_s for one in outputs if one.finish_reason is not None}
        now_s = ends_s
    losses = engine.batch.losses.by_request
    assert list(losses) == ["second"]
    loss = losses[RequestId("second")]
    assert (loss.num_preemptions, loss.tokens) == (1, 8) and loss.seconds == pytest.approx(13.0 - 5.0)
    assert not engine.batch.losses.is_any_open
    assert ended == pytest.approx({"first": 12.0, "second": 19.0})


async def small_engine() -> LengthEngine:
    config = LengthConfig(num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=4, max_num_batched_tokens=64)
    return LengthEngine(config, StepTimes(1.0, 0.0), SimMover("one", Links(LinkParams()), 1))


def test_who_is_preempted_again_before_all_is_computed_waits_on() -> None:
    losses, name = Losses(), RequestId("r0")
    losses.got_token(name, 1.0)
    assert losses.by_request == {}
    losses.preempted(name, 100, 2.0)
    losses.preempted(name, 40, 5.0)  # half way through
    losses.got_token(name, 9.0)
    losses.got_token(name, 10.0)
    losses.preempted(name, 7, 20.0)
    losses.got_token(name, 20.5)
    assert losses.by_request[name] == Loss(3, 147, 7.5)


def test_losses_and_gaps_belong_to_their_kind() -> None:
    lives = [lived(0, 1, 1, 3, kind="urgent"), lived(1, 1, 1, 3, kind="normal"), lived(2, 1, 1, 3, kind="normal")]
    gaps = {"urgent": Gaps(), "normal": Gaps()}
    gaps["urgent"].add(0.5, 1)
    gaps["normal"].add(1.5, 1)
    losses = {RequestId("r0"): Loss(1, 10, 2.0), RequestId("r2"): Loss(2, 30, 4.0)}
    found = by_kind(lives, 0.0, Beside(gaps, losses))
    assert {kind: (one.num_preemptions, one.lost_s, one.lost_tokens) for kind, one in found.items()} == {
        "": (3, 6.0, 40),
        "urgent": (1, 2.0, 10),
        "normal": (2, 4.0, 30),
    }
    assert {kind: (one.itl_s.mean, one.itl_s.n) for kind, one in found.items()} == {
        "": (1.0, 2),
        "urgent": (0.5, 1),
        "normal": (1.5, 1),
    }


# ---------------------------------------------------------------------- memory
def test_fragmented_is_what_blocked_heads_could_have_of_all_that_is_free() -> None:
    assert fragmented_blocks([(10, 30), (25, 0), (5, 8)]) == 38
    assert fragmented_blocks([(10, 36), (25, 0), (5, 8)]) == 8, "after the smaller one, 32 are left"
    assert fragmented_blocks([(10, 5), (25, 0)]) == 0, "it waits for something else than blocks"
    assert fragmented_blocks([(2, 50), (3, 0)]) == 0, "all together would not do"
    assert fragmented_blocks([]) == 0


# ---------------------------------------------------------------------- targets, instances
def test_targets_are_met_by_whole_answers_in_time() -> None:
    lives = [lived(0, 0.5, 0.05, 10), lived(1, 1.5, 0.05, 10), lived(2, 0.5, 0.2, 10), lived(3, 0.5, 0.05, 10, "lost")]
    lives += [lived(4, 0.5, 0.0, 1)]  # a single token has no second one to be late
    assert attainment(lives, Targets(1.0, 0.1)) == 2 / 5
    assert attainment(lives, Targets(1.0, None)) == 3 / 5
    assert attainment(lives, Targets(None, 0.1)) == 3 / 5
    assert math.isnan(attainment(lives)) and math.isnan(attainment([], Targets(1.0)))


def test_a_request_s_own_targets_come_before_those_of_all() -> None:
    arrival = Arrival(0, 0.0, 1, 1, 1, targets=Targets(ttft_s=0.2))
    own = Lived(arrival, 0.0, 0.5, 0.5, 1, True)
    assert attainment([own], Targets(1.0)) == attainment([own]) == 0.0


def test_an_instance_is_paid_for_from_when_it_was_asked_for_until_it_is_gone() -> None:
    presence = Presence({"old": 0.0, "stopped": 0.0, "started": 40.0, "late": 200.0}, {"stopped": 30.0, "old": 500.0})
    assert presence.seconds(10.0, 100.0) == 90 + 20 + 60
    with pytest.raises(ValueError, match="no span of time"):
        presence.seconds(2.0, 1.0)


def test_moves_are_counted_by_outcome_and_their_bytes_whatever_it_was() -> None:
    summaries = [
        moved("committed", 100, stopped_s=0.02),
        moved("committed", 0, stopped_s=0.5),  # one that waited, without KV
        moved("cancelled", 30, stopped_s=0.0),
    ]
    moments = [Moment(0.0, {"a": GLIMPSE}, 0, 0.0), Moment(1.0, {"a": GLIMPSE, "b": GLIMPSE}, 2, 0.5)]
    found = fleet_measures(moments, 12.0, summaries, [0.1, 0.3])
    assert found.outcomes == {"committed": 2, "cancelled": 1}
    assert (found.moved_bytes, found.mean_instances, found.instance_s) == (130, 1.5, 12.0)
    assert found.fragmentation.mean == 0.25 and found.downtime_s.mean == pytest.approx(0.2)
    assert (found.stopped_s.n, found.stopped_s.mean) == (1, 0.02)


GLIMPSE = Glimpse(3.0, 5, 2, 1)


def moved(outcome: str, num_bytes: int, stopped_s: float) -> MigrationSummary:
    return MigrationSummary("m", "r0", "a", "b", outcome, "", 0, num_bytes, 0, 0, 0, num_bytes, 1.0, stopped_s, 0)


# ---------------------------------------------------------------------- series, curves
def test_a_series_tells_the_spread_of_those_that_take_requests() -> None:
    draining = Glimpse(-math.inf, 7, 1, 0)
    instances = {"a": GLIMPSE, "b": Glimpse(-1.0, 0, 3, 4), "c": Glimpse(8.0, 9, 1, 0), "d": draining}
    moments = [Moment(0.0, instances, 3, 0.25), Moment(1.0, {"a": draining}, 3, 0.0)]
    found = series_of(moments)
    assert (found.freeness_min[0], found.freeness_median[0], found.freeness_max[0]) == (-1.0, 3.0, 8.0)
    assert math.isnan(found.freeness_min[1]) and math.isnan(found.freeness_median[1])
    assert (found.instances, found.free_blocks, found.running, found.waiting) == ([4, 1], [21, 7], [7, 1], [5, 0])
    assert found.moves == [3, 3]
    each = {one.instance: one for one in series_of_each(moments)}
    assert each["b"].running[0] == 3 and math.isnan(each["b"].running[1])
    assert math.isnan(each["d"].freeness[0]) and each["d"].free_blocks[0] == 7


def test_a_long_series_is_thinned() -> None:
    found = series_of([Moment(float(at), {}, at, 0.0) for at in range(2 * MAX_POINTS + 1)])
    assert len(found.at_s) <= MAX_POINTS and found.at_s[:3] == [0.0, 3.0, 6.0] and found.moves[:3] == [0, 3, 6]


def test_curves_are_of_those_answered_and_count_the_failed() -> None:
    lives = [lived(index, float(index), 0.0, 1, "lost" if index == 100 else "") for index in range(112)]
    found = curves(lives)[""]
    assert (found.num_done, found.num_failed) == (100, 1)  # the first 11 do not count
    assert found.ttft_s[0] == 11.0 and found.ttft_s[-1] == 111.0 and len(found.ttft_s) == len(SHARES)
    assert found.ttft_s[SHARES.index(0.5)] == pytest.approx(60.5, abs=0.5)


# ---------------------------------------------------------------------- paired days
def test_a_ratio_is_of_each_day_and_its_interval_of_student_s_t() -> None:
    found = ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0)) and found.verdict == "worse"
    found = ratio([1.0, 1.0], [math.e, 1.0])  # logarithms 1 and 0: mean 1/2, half width 12.706 / 2
    assert math.log(found.mean) == pytest.approx(0.5)
    assert math.log(found.high) == pytest.approx(0.5 + 12.706 / 2) and found.verdict == "not told"
    assert ratio([3.0, 4.0, 5.0], [1.5, 2.1, 2.4]).verdict == "better"


def test_days_without_a_figure_are_left_out_and_one_day_has_no_interval() -> None:
    found = ratio([2.0, math.nan, 0.0, 1.0], [4.0, 1.0, 1.0, math.nan])
    assert found.mean == pytest.approx(2.0) and math.isnan(found.low) and found.verdict == "not told"
    assert math.isnan(ratio([math.nan], [1.0]).mean)
    assert math.isnan(half_width([1.0]))


def test_student_s_t_is_that_of_the_tables() -> None:
    assert [t_95(degrees) for degrees in (1, 9, 30)] == [12.706, 2.262, 2.042]
    assert [t_95(degrees) for degrees in (31, 39, 60, 120)] == pytest.approx([2.040, 2.023, 2.000, 1.980], abs=6e-4)
    with pytest.raises(ValueError, match="at least 1"):
        t_95(0)
