"""What does an engine do with a request whose state no engine exports? It refuses it, and the source goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from instance.vllm import refusals
from instance.vllm.codec import PREFILL_FIELDS, RequestState, decode_state, encode_state
from tests.support.exactness import Comparison
from tests.support.pair import Refused, Sabotage
from tests.support.vllm_kit import MAX_MODEL_LEN, prompt_of, shared_kit

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def comparison() -> Iterator[Comparison]:
    made = Comparison(shared_kit(), 5, 200, lambda: SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    yield made
    made.close()


def more_output(*token_ids: int) -> Callable[[RequestState], dict[str, Any]]:
    return lambda state: {"output_token_ids": [*state.output_token_ids, *token_ids]}


WRONG: dict[str, tuple[Callable[[RequestState], dict[str, Any]], str]] = {
    "a token beyond the vocabulary": (more_output(1 << 20), "a token outside the"),
    "a token that fits into no integer": (more_output(1 << 40), "a token outside the"),
    "a negative token": (more_output(-1), "a token outside the"),
    "more tokens than the context": (more_output(*[5] * MAX_MODEL_LEN), f"into a context of {MAX_MODEL_LEN}"),
    "never run, with output": (lambda _: {"has_run": False}, "has not run, and comes with tokens"),
    "more computed than there is": (lambda _: {"computed_tokens": 500}, "computed more tokens than it has"),
    "a prefill to report": (lambda _: {"prefill_stats": (0,) * len(PREFILL_FIELDS)}, "its prefill is not reported"),
    "another output": (lambda state: {"output_token_ids": state.output_token_ids[1:]}, "does not continue"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_no_engine_exports_is_refused(wrong: str, comparison: Comparison) -> None:
    """Taken in, it would end the destination's engine with its next step, or go on with other tokens."""
    change, reason = WRONG[wrong]

    def alter(state: bytes) -> bytes:
        return encode_state(msgspec.structs.replace(decode_state(state), **change(decode_state(state))))

    expected = comparison.undisturbed()
    request_id = comparison.start()
    comparison.pair.decode_until(comparison.first, request_id, 10)
    with pytest.raises(Refused, match=reason):
        comparison.pair.ferry(request_id, comparison.first, comparison.second, sabotage=Sabotage(alter_state=alter))
    assert comparison.second.load().reserved_blocks == 0
    comparison.pair.finish(comparison.first, request_id)
    assert comparison.seen(request_id) == expected
    assert comparison.migrated(hops=(10,)) == expected  # unaltered, it moves


@pytest.mark.parametrize(
    ("num_output", "status", "is_refused"),
    [
        (0, RequestStatus.PREEMPTED, True),
        (1, RequestStatus.PREEMPTED, False),
        (0, RequestStatus.WAITING, False),
    ],
)
def test_prompt_logprobs_of_a_prefill_that_was_preempted_stay_with_their_runner(
    num_output: int, status: RequestStatus, is_refused: bool
) -> None:
    """vLLM's runner keeps what it has of them over a preemption, and no other runner would begin to collect them."""
    request = Request("a", prompt_of(1, 100), SamplingParams(prompt_logprobs=2), None)
    request.append_output_token_ids([7] * num_output)
    request.status = status
    reason = refusals.why_unmovable(request)
    assert ("prompt logprobs" in str(reason)) is is_refused, reason


def test_a_budget_for_thinking_is_refused() -> None:
    request = Request("a", prompt_of(1, 100), SamplingParams(thinking_token_budget=10), None)
    assert "thinking" in str(refusals.why_unmovable(request))
