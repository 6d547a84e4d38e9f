"""What may be asked of an engine while a step is in flight? It schedules asynchronously here, as engines on GPUs do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from migration.types import NotStopped, StoppedRequest
from tests.support.asynchronous import asynchronous_scheduling, shared_asynchronous_kit
from tests.support.cases import params
from tests.support.exactness import Comparison
from tests.support.pair import EnginePair, Refused, Shape
from tests.support.vllm_kit import VllmKit, prompt_of, start_engine, submission_of

pytestmark = pytest.mark.timeout(300)

GREEDY = params(logprobs=1, max_tokens=40)
PROMPT = 200


@pytest.fixture
def pair() -> Iterator[EnginePair]:
    pair = EnginePair(shared_asynchronous_kit())
    yield pair
    pair.drain()
    pair.close()


@pytest.fixture(scope="module")
def single() -> VllmKit:
    """Engines with one sequence slot."""
    with asynchronous_scheduling():
        return VllmKit(*(start_engine(max_num_seqs=1) for _ in range(2)))


@pytest.fixture
def single_pair(single: VllmKit) -> Iterator[EnginePair]:
    pair = EnginePair(single)
    yield pair
    pair.drain()
    pair.close()


def added(pair: EnginePair, engine: Any, key: int, num_prompt_tokens: int, **sampling: Any) -> Any:
    request_id = pair.new_id()
    made = params(**{"max_tokens": 40, **sampling})()
    assert engine.add(submission_of(request_id, prompt_of(key, num_prompt_tokens), made)) is None
    return request_id


def test_a_prefix_that_another_request_is_still_computing_is_not_settled(pair: EnginePair) -> None:
    """Both are scheduled in one step; the second finds the first one's blocks in the cache, not yet written."""
    assert pair.first.reset_prefix_cache()
    one, two = added(pair, pair.first, 1, PROMPT), added(pair, pair.first, 1, PROMPT)
    pair.step(pair.first)
    for request_id in (one, two):
        progress = pair.first.progress(request_id)
        assert progress is not None and progress.settled_tokens == 0
        assert pair.describe(pair.first, request_id).settled_tokens == 0
    pair.decode_until(pair.first, two, 1)
    later = pair.first.progress(two)
    assert later is not None and later.settled_tokens >= PROMPT


def test_what_arrived_with_its_kv_stays_settled_while_its_first_step_is_in_flight(pair: EnginePair) -> None:
    request_id = added(pair, pair.first, 2, PROMPT)
    pair.decode_until(pair.first, request_id, 3)
    ferried = pair.ferry(request_id, pair.first, pair.second)
    pair.step(pair.second)
    progress = pair.second.progress(request_id)
    assert progress is not None and progress.settled_tokens >= ferried.settled_tokens


@pytest.mark.parametrize("num_steps", [0, 1])
def test_one_that_is_resumed_while_its_token_is_in_flight_goes_on(num_steps: int) -> None:
    comparison = Comparison(shared_asynchronous_kit(), 3, PROMPT, GREEDY)
    pair, first, expected = comparison.pair, comparison.first, comparison.undisturbed()
    request_id = comparison.start()
    pair.decode_until(first, request_id, 5)
    assert first.try_stop(request_id) is None, "nothing is in flight"
    for _ in range(num_steps):
        pair.step(first)
    first.resume(request_id)
    pair.finish(first, request_id)
    assert comparison.seen(request_id) == expected
    comparison.close()


@pytest.mark.parametrize("comes_to_rest", [False, True])
def test_one_that_is_resumed_without_a_slot_goes_on_when_there_is_one(
    comes_to_rest: bool, single_pair: EnginePair
) -> None:
    """1. One is stopped, and another takes its slot. 2. That is stopped too, in flight or at rest. 3. Both are resumed,
    the first into the slot; it leaves, and the other one has never missed a step."""
    pair, first = single_pair, single_pair.first
    alone = added(pair, first, 5, 60)
    pair.finish(first, alone)
    assert first.reset_prefix_cache()
    one = added(pair, first, 4, 60)
    pair.decode_until(first, one, 3)
    assert isinstance(pair.stop(first, one), StoppedRequest)
    other = added(pair, first, 5, 60)
    pair.decode_until(first, other, 3)
    assert first.try_stop(other) is None
    if comes_to_rest:
        pair.step(first)
        assert isinstance(first.try_stop(other), StoppedRequest)
    first.resume(one)
    first.resume(other)
    first.check_integrity()
    first.abort((one,))
    pair.finish(first, other)
    assert pair.tokens(other) == pair.tokens(alone)


def test_one_that_is_stopped_again_after_it_was_resumed_in_flight_stands_still(single_pair: EnginePair) -> None:
    pair, first = single_pair, single_pair.first
    one = added(pair, first, 6, 60)
    pair.decode_until(first, one, 3)
    pair.stop(first, one)
    other = added(pair, first, 7, 60)
    pair.decode_until(first, other, 3)
    assert first.try_stop(other) is None
    first.resume(one)
    first.resume(other)
    assert isinstance(pair.stop(first, other), StoppedRequest)
    pair.finish(first, one)
    num_tokens = len(pair.tokens(other))
    first.resume(other)
    pair.finish(first, other)
    assert len(pair.tokens(other)) == 40 > num_tokens


def test_one_that_finishes_by_the_token_in_flight_while_it_is_stopped_has_finished(pair: EnginePair) -> None:
    request_id = pair.add(pair.first, Shape(40, 3, prompt_key=3))
    pair.decode_until(pair.first, request_id, 2)
    assert pair.first.try_stop(request_id) is None
    pair.step(pair.first)
    assert pair.is_finished(request_id)
    assert pair.first.try_stop(request_id) is NotStopped.FINISHED
    assert not pair.first.release(request_id)


def test_one_whose_prompt_is_in_flight_is_refused_where_it_would_wait_with_its_kv(
    pair: EnginePair, single: VllmKit
) -> None:
    """Nothing of it is settled when it is described, so it looks like one that waits."""
    full = EnginePair(VllmKit(pair.kit.first, single.second))  # type: ignore[arg-type]
    other = added(full, full.second, 8, 50, max_tokens=300)
    full.decode_until(full.second, other, 2)
    request_id = added(full, full.first, 9, PROMPT)
    full.step(full.first)
    with pytest.raises(Refused, match="slots are taken"):
        full.ferry(request_id, full.first, full.second)
    full.finish(full.first, request_id)
    full.drain()
    full.close()


def test_the_id_of_an_aborted_request_is_refused_while_its_step_is_in_flight(pair: EnginePair) -> None:
    shape = Shape(40, 30, prompt_key=5)
    request_id = pair.add(pair.first, shape)
    pair.decode_until(pair.first, request_id, 3)
    pair.first.abort((request_id,))
    refusal = pair.first.add(pair.kit.submission(request_id, shape))
    assert refusal is not None and not refusal.final and "in flight" in refusal.reason
    pair.step_until(pair.first, lambda: not pair.first.has_work())
    pair.outputs[request_id].clear()
    pair.add(pair.first, shape, request_id)
    pair.finish(pair.first, request_id)
    assert len(pair.tokens(request_id)) == 30
