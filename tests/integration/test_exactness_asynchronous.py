"""Does a request move exactly between engines that schedule asynchronously, as engines on GPUs do?

A step is in flight there when a move begins: the tokens of it come after the stop has been asked for, blocks are given
back only once it is done, and the runner is told of a request's tokens only where it cannot know them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.vllm.scheduler import FerryAsyncScheduler
from migration.types import StoppedRequest
from tests.support.adapters import RANK, adapter_of, write_adapter
from tests.support.asynchronous import asynchronous_scheduling, shared_asynchronous_kit
from tests.support.cases import CASES, params
from tests.support.exactness import Comparison
from tests.support.exactness_suite import PROMPT, Compare, MovesExactly, comparisons
from tests.support.vllm_kit import VllmKit, shared_kit, start_engine
from tests.support.windowed_model import MIXED, windowed_model_path

pytestmark = pytest.mark.timeout(300)

CHUNK = 288


def kit_of(**flags: Any) -> VllmKit:
    with asynchronous_scheduling():
        return VllmKit(start_engine(**flags), start_engine(**flags))


@pytest.fixture(scope="module")
def chunking() -> VllmKit:
    """Engines that need several steps for a long prompt."""
    return kit_of(max_num_batched_tokens=CHUNK)


@pytest.fixture(scope="module")
def windowed() -> VllmKit:
    return kit_of(model=windowed_model_path(MIXED), num_gpu_blocks_override=161, max_num_batched_tokens=512)


@pytest.fixture
def compare(chunking: VllmKit) -> Iterator[Compare]:
    yield from comparisons(chunking)


@pytest.fixture
def chunk() -> int:
    return CHUNK


class TestAsynchronousScheduling(MovesExactly):
    """What the suite says of every pair of engines."""


def test_control_a_step_is_in_flight_when_the_next_one_is_scheduled(compare: Compare) -> None:
    comparison = compare("greedy")
    pair, first = comparison.pair, comparison.first
    assert isinstance(first._scheduler, FerryAsyncScheduler)
    request_id = comparison.start()
    pair.decode_until(first, request_id, 5)
    num_seen = len(pair.tokens(request_id))
    assert first.try_stop(request_id) is None, "nothing is in flight"
    stopped = pair.stop(first, request_id)
    assert isinstance(stopped, StoppedRequest)
    assert stopped.num_output_tokens == len(pair.tokens(request_id)) > num_seen


@pytest.mark.parametrize("at", [1, 2, 23, 24, 25, 26, 66])
def test_the_moment_of_the_migration_does_not_matter(at: int, compare: Compare) -> None:
    comparison = compare("greedy")
    assert comparison.migrated(hops=(at,)) == comparison.undisturbed()


@pytest.mark.parametrize("case", ["greedy", "seeded", "penalties"])
def test_windows_move_exactly(case: str, windowed: VllmKit, compare: Compare) -> None:
    """What has left a window is given back while a step that sees it is in flight."""
    comparison = compare(case, kit=windowed)
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(3, 11, 19, 27, 35, 43)) == expected


def test_adapters_move_exactly(tmp_path: Path) -> None:
    kit = kit_of(enable_lora=True, max_lora_rank=RANK, max_loras=1, max_num_batched_tokens=1024)
    adapter = adapter_of(write_adapter(tmp_path / "red", 1), 1)
    comparison = Comparison(kit, 3, PROMPT, CASES["greedy"], adapter)
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(3, 11, 19)) == expected
    comparison.close()


def test_a_request_moves_to_an_engine_that_schedules_synchronously_and_back() -> None:
    """Both write the same KV and keep the same state of a request at rest."""
    kit = VllmKit(shared_asynchronous_kit().first, shared_kit().second)
    assert kit.first.facts.kv_fingerprint == kit.second.facts.kv_fingerprint
    comparison = Comparison(kit, 5, PROMPT, params(temperature=1.0, seed=4, frequency_penalty=0.4, logprobs=2))
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(3, 11, 19, 27)) == expected
    comparison.close()
