"""Does a request move exactly whose grammar holds only behind its reasoning?

vLLM asks a reasoning parser where the reasoning ends; several look for it in all that the request has put out so far.
The one here takes a token that the model says by itself for the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.support.exactness import Comparison, Seen
from tests.support.vllm_kit import VllmKit, start_engine

pytestmark = pytest.mark.timeout(300)

PROMPT = 200
END_AT = 12
"""The reasoning's end is this token of the output."""
PARSER = "kvferry_tests_end_token"


class EndToken(ReasoningParser):  # type: ignore[misc]  # it is imported lazily, and has no type
    """The reasoning ends with the first `token` behind the prompt."""

    token = -1

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return EndToken.token in list(input_ids)[PROMPT:]

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        return None, model_output

    def extract_reasoning_streaming(self, *args: Any, **kwargs: Any) -> None: ...


def free() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=1)


def constrained() -> SamplingParams:
    params = free()
    params.structured_outputs = StructuredOutputsParams(regex="[a-z ]{200,300}")
    params.structured_outputs._backend = "xgrammar"  # a gateway's InputProcessor chooses it
    return params


@pytest.fixture(scope="module")
def kit() -> VllmKit:
    ReasoningParserManager.register_module(PARSER, module=EndToken)
    return VllmKit(start_engine(reasoning_parser=PARSER), start_engine(reasoning_parser=PARSER))


@pytest.fixture
def comparison(kit: VllmKit) -> Iterator[Comparison]:
    def of(params: Callable[[], SamplingParams]) -> Comparison:
        return Comparison(kit, prompt_key=3, num_prompt_tokens=PROMPT, params=params)

    plain = of(free)
    said = plain.undisturbed().tokens
    plain.close()
    EndToken.token = said[END_AT]
    assert EndToken.token not in said[:END_AT]
    made = of(constrained)
    yield made
    made.close()


def moved(comparison: Comparison, at: int, steps_between: int) -> Seen:
    request_id = comparison.start()
    pair = comparison.pair
    pair.decode_until(comparison.first, request_id, at)
    pair.ferry(request_id, comparison.first, comparison.second, steps_between=steps_between)
    pair.finish(comparison.second, request_id)
    return comparison.seen(request_id)


@pytest.mark.parametrize("at", [4, 9, 11, 12, 13, 20])
@pytest.mark.parametrize("steps_between", [0, 1, 4])
def test_the_grammar_begins_behind_the_reasoning_wherever_it_ends(
    at: int, steps_between: int, comparison: Comparison
) -> None:
    """Before the description, between it and the commit, and afterwards."""
    expected = comparison.undisturbed()
    assert moved(comparison, at, steps_between) == expected


def test_control_the_grammar_matters(comparison: Comparison) -> None:
    """Another end of the reasoning, another answer."""
    expected = comparison.undisturbed()
    EndToken.token = expected.tokens[4]
    assert EndToken.token not in expected.tokens[:4]
    assert comparison.undisturbed().tokens != expected.tokens
