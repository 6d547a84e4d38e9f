"""Which ways to guess can an engine move, and has vLLM still the defect for which it moves no sampled request?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.request import Request

from instance.vllm import speculation
from tests.integration.test_exactness_speculative import SAMPLED, params
from tests.support.guessing import NUM_GUESSES
from tests.support.vllm_kit import prompt_of


@pytest.mark.parametrize("sampling", SAMPLED)
def test_a_sampled_request_that_does_run_is_not_moved(sampling: dict[str, Any]) -> None:
    """As on a GPU: what it draws depends on the guesses."""
    made = params(**sampling)()
    assert speculation.why_unservable(made, NUM_GUESSES, is_cpu=False) is None
    told = speculation.why_unmovable(Request("a", prompt_of(1, 100), made, None), NUM_GUESSES)
    assert "sampled" in str(told)


def test_vllm_s_cpu_kernel_still_spreads_sampling_parameters_into_a_copy_that_is_dropped() -> None:
    """When this fails, vLLM has mended it: `speculation.why_unservable` and what refers to it can go."""
    current_platform.import_kernels()
    spread = torch.full((3,), -1, dtype=torch.int32)
    cpu_triton_utils._expand_kernel_impl(
        spread, torch.tensor([5, 7], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32), 0, 0
    )
    assert spread.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"method": "eagle"}, "speculative decoding by eagle"),
        ({"method": "ngram_gpu"}, "speculative decoding by ngram_gpu"),
        ({"per_batch": [(1, 4, 3)]}, "depends on the batch"),
        ({"async_scheduling": True}, "asynchronous"),
        ({"use_v2_model_runner": True}, "V2"),
        ({"lora_config": object()}, "LoRA"),
        ({"metrics": "summary"}, "measured"),
    ],
)
def test_other_ways_to_guess_are_refused_for_the_whole_engine(changes: dict[str, object], reason: str | None) -> None:
    values: dict[str, Any] = {
        "method": "ngram",
        "per_batch": None,
        "async_scheduling": False,
        "metrics": "none",
    } | changes
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=values["method"], num_speculative_tokens_per_batch_size=values["per_batch"]
        ),
        scheduler_config=SimpleNamespace(async_scheduling=values["async_scheduling"]),
        use_v2_model_runner=values.get("use_v2_model_runner", False),
        lora_config=values.get("lora_config"),
        observability_config=SimpleNamespace(per_request_spec_decode_metrics=values["metrics"]),
    )
    told = speculation.why_engine_unmovable(config)
    assert told is None if reason is None else reason in str(told)
