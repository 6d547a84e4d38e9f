"""Does a request whose engine is gone go on elsewhere as if nothing had happened? Real engines, and its tokens alone.

As in test_exactness.py each kind of request runs twice, in batches of one. The negative controls leave one thing out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.types import Rescue
from instance.vllm.codec import RequestState, decode_state, encode_state
from tests.support.cases import CASES
from tests.support.exactness_suite import Compare, comparisons
from tests.support.vllm_kit import shared_kit


@pytest.fixture
def compare() -> Iterator[Compare]:
    yield from comparisons(shared_kit())


@pytest.mark.parametrize("case", [*CASES])
def test_a_request_whose_engine_died_goes_on_at_its_next_token(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected, revived = comparison.undisturbed(), comparison.revived(deaths=(20,))
    assert revived.tokens == expected.tokens
    assert (revived.finish_reason, revived.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert revived.prompt_logprobs == expected.prompt_logprobs, "they are told once"
    assert len(revived.logprobs) == len(expected.logprobs)
    assert revived.num_prefill_reports == 1, "usage is counted once"


@pytest.mark.parametrize("case", ["greedy", "penalties, seeded", "json"])
def test_it_may_lose_several_engines_and_tokens_that_reached_nobody(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected = comparison.undisturbed()
    assert comparison.revived(deaths=(4, 13, 22), num_lost=2).tokens == expected.tokens


def _without(**changes: object) -> Callable[[Rescue], Rescue]:
    def alter(rescue: Rescue) -> Rescue:
        state: RequestState = msgspec.structs.replace(decode_state(rescue.state), **changes)
        return replace(rescue, state=encode_state(state))

    return alter


def test_control_a_sampler_that_begins_anew_is_noticed(compare: Compare) -> None:
    comparison = compare("seeded")
    expected = comparison.undisturbed()
    altered = comparison.revived(deaths=(20,), alter=_without(generator=None))
    assert altered.tokens[:20] == expected.tokens[:20] and altered.tokens != expected.tokens


@pytest.mark.parametrize("case", ["min_tokens", "penalties", "json", "max_tokens at the edge"])
def test_control_output_that_goes_on_as_prompt_is_noticed(case: str, compare: Compare) -> None:
    """What a gateway would do that sends prompt and output as a new prompt."""
    comparison = compare(case)
    expected = comparison.undisturbed()
    assert comparison.prompted_anew(at=20).tokens != expected.tokens
