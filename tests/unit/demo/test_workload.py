"""Is the plan reproducible, uneven, and within what the model holds?"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from orchestrator.demo.prose import TOKENS_PER_DAY, diary
from orchestrator.demo.trace import TraceRow, read_trace
from orchestrator.demo.workload import Endpoint, Limits, PlannedRequest, Shape, from_trace, generate

LIMITS = Limits(max_prompt_tokens=500, max_output_tokens=400, max_requests=300, output_tokens_per_s=500.0)
SHAPE = Shape(duration_s=60.0)


def assert_within(plan: tuple[PlannedRequest, ...], limits: Limits, duration_s: float) -> None:
    assert 0 < len(plan) <= limits.max_requests
    assert [request.index for request in plan] == list(range(len(plan)))
    arrivals = [request.arrival_s for request in plan]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] >= 0 and arrivals[-1] <= duration_s + 1e-6
    for request in plan:
        assert 1 <= request.max_tokens <= limits.max_output_tokens
        assert request.min_tokens <= request.max_tokens
        # About four characters a token; a diary is rounded to whole days.
        assert len(request.text) <= 5 * (limits.max_prompt_tokens + TOKENS_PER_DAY)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    plan = generate(Random(7), SHAPE, LIMITS)
    assert plan == generate(Random(7), SHAPE, LIMITS)
    assert plan != generate(Random(8), SHAPE, LIMITS)


@pytest.mark.parametrize("seed", range(5))
def test_a_generated_plan_keeps_within_its_limits(seed: int) -> None:
    assert_within(generate(Random(seed), SHAPE, LIMITS), LIMITS, SHAPE.duration_s)


def test_a_generated_plan_mixes_endpoints_and_ways_of_sampling() -> None:
    plan = generate(Random(1), SHAPE, LIMITS)
    assert {request.endpoint for request in plan} == set(Endpoint)
    for share in (
        sum(request.sampling.seed is None for request in plan) / len(plan),
        sum(request.sampling.num_logprobs is not None for request in plan) / len(plan),
        sum(request.sampling.frequency_penalty > 0 for request in plan) / len(plan),
        sum(request.ignores_eos for request in plan) / len(plan),
    ):
        assert 0.05 < share < 0.95


def test_a_sampled_request_is_always_seeded_or_it_could_not_be_replayed() -> None:
    plan = generate(Random(1), SHAPE, LIMITS)
    assert all((request.sampling.temperature == 0) == (request.sampling.seed is None) for request in plan)


def test_a_generated_plan_comes_in_bursts() -> None:
    plan = generate(Random(3), SHAPE, LIMITS)
    per_second = [sum(int(request.arrival_s) == second for request in plan) for second in range(60)]
    assert max(per_second) >= 8
    assert sorted(per_second)[30] <= 2


def test_a_trace_is_squeezed_into_the_duration_and_stays_uneven() -> None:
    rows = [TraceRow(10.0 * number, 1_000 + 100 * number, 10 * (1 + number % 20)) for number in range(100)]
    plan = from_trace(Random(0), rows, 30.0, Limits(max_prompt_tokens=500, max_output_tokens=100))
    assert_within(plan, Limits(max_prompt_tokens=500, max_output_tokens=100), 30.0)
    assert plan[0].arrival_s == 0.0 and plan[-1].arrival_s == pytest.approx(30.0)
    assert len({request.max_tokens for request in plan}) > 5


def test_a_trace_of_short_requests_is_not_stretched() -> None:
    plan = from_trace(Random(0), [TraceRow(0.0, 20, 30), TraceRow(1.0, 10, 9)], 30.0, LIMITS)
    assert [request.max_tokens for request in plan] == [30, 9]


def test_a_trace_is_cut_to_the_output_budget_of_the_run() -> None:
    rows = [TraceRow(float(number), 100, 100) for number in range(1_000)]
    plan = from_trace(Random(0), rows, 10.0, Limits(output_tokens_per_s=200.0))
    assert len(plan) == 20


def test_a_trace_of_one_row_or_of_one_moment_still_makes_a_plan() -> None:
    assert len(from_trace(Random(0), [TraceRow(5.0, 9, 9)], 10.0, LIMITS)) == 1
    assert [r.arrival_s for r in from_trace(Random(0), [TraceRow(5.0, 9, 9)] * 3, 10.0, LIMITS)] == [0.0] * 3


@pytest.mark.parametrize("name", ["azure2023_code.csv.gz", "azure2023_conv.csv.gz", "mooncake_conversation.jsonl.gz"])
def test_the_real_traces_become_plans_within_the_limits(data_dir: Path, name: str) -> None:
    plan = from_trace(Random(0), read_trace(data_dir / "traces" / name), 60.0, LIMITS)
    assert_within(plan, LIMITS, 60.0)
    assert len({request.max_tokens for request in plan}) > 10


def test_a_diary_prompt_has_about_the_wanted_length() -> None:
    assert diary(Random(0), 10 * TOKENS_PER_DAY, 100).count("\n") == 10
