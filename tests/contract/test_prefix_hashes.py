"""Are a gateway's hashes of a prompt those that vLLM's engine makes of it? By vLLM's own code, without an engine."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256, sha256_cbor
from vllm.v1.engine import EngineCoreRequest

from orchestrator.gateway.prefixes import no_hashes, prefix_hashes
from orchestrator.policy.prefixes import MAX_HASHED_BLOCKS
from tests.support.engine_hashes import hashes_of, request_of

SIZE = 16
PROMPT = [7 * number % 1000 for number in range(100)]
LORA = LoRARequest("ours", 1, "/nowhere")
IMAGE = MultiModalFeatureSpec(None, "image", "an-image", PlaceholderRange(offset=20, length=8))


def configuration(algorithm: str = "sha256", enabled: bool = True) -> Any:
    return SimpleNamespace(enable_prefix_caching=enabled, prefix_caching_hash_algo=algorithm)


def as_the_engine(request: EngineCoreRequest, algorithm: Any = sha256) -> tuple[int, ...]:
    return hashes_of(request, SIZE, algorithm)


@pytest.mark.parametrize(
    "more",
    [{}, {"lora_request": LORA}, {"cache_salt": "a tenant's"}, {"mm_features": [IMAGE]}],
    ids=["plain", "lora", "salt", "image"],
)
def test_hashes_are_the_engines_with_all_that_enters_them(more: dict[str, Any]) -> None:
    hashes = prefix_hashes(configuration())(request_of(PROMPT, **more), SIZE)
    assert hashes == as_the_engine(request_of(PROMPT, **more))[:6]
    assert len(set(hashes)) == 6
    plain = as_the_engine(request_of(PROMPT))
    assert [one == other for one, other in zip(hashes, plain, strict=False)] == [
        not more or (number == 0 and "mm_features" in more) for number in range(6)
    ], "they chain: all that follow differ as well"


def test_another_algorithm_gives_other_hashes_which_are_the_engines_too() -> None:
    hashes = prefix_hashes(configuration("sha256_cbor"))(request_of(PROMPT), SIZE)
    assert hashes == as_the_engine(request_of(PROMPT), sha256_cbor)[:6] != as_the_engine(request_of(PROMPT))[:6]


def test_the_block_with_the_last_token_is_left_out_as_it_is_always_computed() -> None:
    hashes = prefix_hashes(configuration())
    assert [len(hashes(request_of(PROMPT[:number]), SIZE)) for number in (1, 16, 17, 32, 33)] == [0, 0, 1, 1, 2]


def test_of_a_long_prompt_only_the_beginning_is_hashed_and_the_request_stays_as_it_is() -> None:
    tokens = list(range(SIZE * (MAX_HASHED_BLOCKS + 9)))
    grammar = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputsParams(regex="a+"))
    request = request_of(tokens, grammar)
    hashes = prefix_hashes(configuration())(request, SIZE)
    assert hashes == as_the_engine(request)[:MAX_HASHED_BLOCKS]
    assert request.prompt_token_ids == tokens and request.sampling_params is grammar


def test_what_does_not_read_the_cache_has_no_hashes() -> None:
    hashes = prefix_hashes(configuration())
    assert hashes(request_of(PROMPT, params=SamplingParams(prompt_logprobs=1)), SIZE) == ()
    assert hashes(request_of(PROMPT, sampling_params=None), SIZE) == ()
    without = request_of(PROMPT)
    without.prompt_token_ids = None
    assert hashes(without, SIZE) == ()


def test_where_no_other_process_knows_the_hashes_there_are_none_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with caplog.at_level(logging.INFO, logger="orchestrator.gateway.prefixes"):
        assert prefix_hashes(configuration("xxhash")) is no_hashes
        assert prefix_hashes(configuration(enabled=False)) is no_hashes
    random_seed, off = (record.getMessage() for record in caplog.records)
    assert "set PYTHONHASHSEED to one value for all, or use sha256" in random_seed
    assert off == "prefix caching is off: requests are dispatched without regard to it"
    assert prefix_hashes(configuration()) is not no_hashes
    assert as_the_engine(request_of(PROMPT))[:6] == prefix_hashes(configuration())(request_of(PROMPT), SIZE), (
        "untouched by that"
    )


def test_what_vllm_cannot_hash_costs_no_request_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    hashes = prefix_hashes(configuration())
    broken = request_of(PROMPT, mm_features=[object()])
    assert hashes(broken, SIZE) == hashes(broken, SIZE) == ()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "a prompt could not be hashed, nor may others be"
    ]
    assert hashes(request_of(PROMPT), SIZE)
