"""Does a request with a LoRA adapter go on elsewhere with that adapter, and is any other one refused?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from instance.vllm.codec import (
    decode_described,
    decode_request,
    encode_described,
    encode_request,
)
from migration.types import Description, Refusal, RequestId
from tests.support.adapters import RANK, adapter_of, write_adapter
from tests.support.exactness import Comparison
from tests.support.pair import EnginePair, Refused, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, shared_kit, start_engine, submission_of

pytestmark = pytest.mark.timeout(300)

PROMPT = 200
FLAGS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    "max_loras": 1,
    "max_cpu_loras": 4,
    "max_num_batched_tokens": 1024,
}


def params(**values: object) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(**{"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, **values})


CASES = {
    "greedy": params(logprobs=2),
    "penalties, seeded": params(temperature=1.0, seed=9, frequency_penalty=0.7, repetition_penalty=1.2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, LoRARequest]:
    return {name: adapter_of(write_adapter(folder / name, seed), seed) for name, seed in (("red", 1), ("blue", 2))}


@pytest.fixture(scope="module")
def kit() -> VllmKit:
    """Engines with room for one adapter in a step."""
    return VllmKit(start_engine(**FLAGS), start_engine(**FLAGS))


@pytest.fixture
def pair(kit: VllmKit) -> Iterator[EnginePair]:
    pair = EnginePair(kit)
    yield pair
    pair.drain()
    pair.close()


@pytest.fixture
def compare(kit: VllmKit) -> Iterator[Callable[..., Comparison]]:
    made: list[Comparison] = []

    def make(adapter: LoRARequest | None, case: str = "greedy", key: int = 1) -> Comparison:
        made.append(Comparison(kit, key, PROMPT, CASES[case], adapter))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


def start(pair: EnginePair, adapter: LoRARequest | None, num_tokens: int, key: int = 1) -> RequestId:
    """A request that has decoded so far at the first engine."""
    request_id = pair.new_id()
    submission = submission_of(request_id, prompt_of(key, PROMPT), params()(), lora_request=adapter)
    assert pair.first.add(submission) is None
    pair.decode_until(pair.first, request_id, num_tokens)
    return request_id


@pytest.mark.parametrize("case", [*CASES])
@pytest.mark.parametrize("name", ["red", "blue", None])
def test_a_request_with_an_adapter_moves_exactly_over_several_hops(
    name: str | None, case: str, compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    comparison = compare(adapters[name] if name else None, case)
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(5, 20, 25, 41)) == expected


def test_a_request_that_has_not_run_moves_with_its_adapter(
    compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    comparison = compare(adapters["red"])
    expected = comparison.undisturbed()
    request_id, _ = comparison.move_at_once()
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_a_cached_prefix_of_another_adapter_is_not_taken_for_its_own(
    pair: EnginePair, compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    """1. The destination has computed the prompt with the other adapter. 2. It computes it with this one. 3. Only the
    second is a hit."""
    expected = compare(adapters["red"]).undisturbed().tokens
    second = pair.second
    hits = []
    for name in ("blue", "red"):
        other = pair.new_id("other")
        submission = submission_of(other, prompt_of(1, PROMPT), params(max_tokens=2)(), lora_request=adapters[name])
        assert second.add(submission) is None
        pair.finish(second, other)
        request_id = start(pair, adapters["red"], 20)
        hits.append(pair.ferry(request_id, pair.first, second).num_cached_tokens)
        pair.finish(second, request_id)
        assert pair.tokens(request_id) == list(expected)
        if name == "blue":
            assert second.reset_prefix_cache()
    assert hits == [0, 192]


# ---- negative controls


def test_control_the_adapters_change_what_is_said(
    compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    said = {compare(adapter).undisturbed().tokens for adapter in (None, *adapters.values())}
    assert len(said) == 3


def test_control_an_adapter_left_out_on_the_way_is_noticed(
    pair: EnginePair, compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    """Both halves must forget it: one alone is refused (see below)."""
    expected = compare(adapters["red"]).undisturbed().tokens
    request_id = start(pair, adapters["red"], 20)
    forgetful = Sabotage(alter_description=partial(without_adapter, and_identity=True))
    pair.ferry(request_id, pair.first, pair.second, sabotage=forgetful)
    pair.finish(pair.second, request_id)
    assert pair.tokens(request_id)[:20] == list(expected[:20])
    assert pair.tokens(request_id) != list(expected)


def without_adapter(description: Description, *, and_identity: bool) -> Description:
    described = decode_described(description.payload)
    core = decode_request(described.core)
    core.lora_request = None
    adapter = None if and_identity else described.adapter
    altered = msgspec.structs.replace(described, core=encode_request(core), adapter=adapter)
    return replace(description, payload=encode_described(altered))


# ---- what is refused, and why


def test_a_description_whose_adapter_and_request_disagree_is_refused(
    pair: EnginePair, adapters: dict[str, LoRARequest]
) -> None:
    request_id = start(pair, adapters["red"], 5)
    description = without_adapter(pair.describe(pair.first, request_id), and_identity=False)
    with pytest.raises(Refused, match="not the described one"):
        pair.reserve(pair.second, description)


def test_an_engine_without_lora_refuses_adapters_of_its_own_clients_and_of_others(
    pair: EnginePair, adapters: dict[str, LoRARequest]
) -> None:
    plain = shared_kit().second
    request_id = start(pair, adapters["red"], 5)
    description = pair.describe(pair.first, request_id)
    refusal = plain.reserve(pair.new_migration(), description, 2)
    assert isinstance(refusal, Refusal)
    submission = submission_of(pair.new_id(), prompt_of(1, PROMPT), params()(), lora_request=adapters["red"])
    refused = plain.add(submission)
    assert refused is not None and refused.final and "--enable-lora" in refused.reason


def test_an_adapter_whose_files_differ_here_is_refused(
    pair: EnginePair, folder: Path, adapters: dict[str, LoRARequest]
) -> None:
    """1. An adapter is loaded at the source. 2. Its files change. 3. The source does not describe it any more; a
    destination that loads the new files refuses the old description."""
    green = adapter_of(write_adapter(folder / "green", 3), 3)
    request_id = start(pair, green, 5)
    description = pair.describe(pair.first, request_id)
    write_adapter(folder / "green", 4)
    with pytest.raises(Refused, match="other files here"):
        pair.reserve(pair.second, description)
    assert "have changed" in str(pair.first.describe(request_id))
    pair.finish(pair.first, request_id)


def test_an_adapter_whose_path_is_missing_is_refused_and_the_engine_goes_on(
    pair: EnginePair, folder: Path, adapters: dict[str, LoRARequest]
) -> None:
    grey = adapter_of(write_adapter(folder / "grey", 5), 5)
    request_id = start(pair, grey, 5)
    description = pair.describe(pair.first, request_id)
    shutil.rmtree(folder / "grey")
    with pytest.raises(Refused, match="does not load"):
        pair.reserve(pair.second, description)
    refused = pair.second.add(submission_of(pair.new_id(), prompt_of(1, PROMPT), params()(), lora_request=grey))
    assert refused is not None and refused.final and "does not load" in refused.reason
    assert pair.second.load().reserved_blocks == 0
    moved = start(pair, None, 3, key=2)
    pair.ferry(moved, pair.first, pair.second)
    pair.finish(pair.second, moved)
    pair.finish(pair.first, request_id)


def test_an_adapter_that_vllm_has_dropped_and_cannot_load_again_is_refused(pair: EnginePair, folder: Path) -> None:
    """1. Five adapters are used, of which vLLM keeps four. 2. The first one's folder is gone. 3. Without a look before
    the step, the engine would end with it."""
    made = [adapter_of(write_adapter(folder / f"many-{number}", number), number) for number in range(10, 15)]
    for adapter in made:
        pair.finish(pair.first, start(pair, adapter, 3))
    shutil.rmtree(made[0].lora_path)
    submission = submission_of(pair.new_id(), prompt_of(1, PROMPT), params()(), lora_request=made[0])
    refusal = pair.first.add(submission)
    assert refusal is not None and "does not load" in refusal.reason
    pair.finish(pair.first, start(pair, made[-1], 3))


def test_a_number_that_means_another_adapter_here_is_refused(
    pair: EnginePair, folder: Path, adapters: dict[str, LoRARequest]
) -> None:
    """Two gateways that count for themselves: vLLM would run whichever of the two it has loaded first."""
    start(pair, adapters["red"], 2)
    double = adapter_of(write_adapter(folder / "double", 6), adapters["red"].lora_int_id)
    refused = pair.first.add(submission_of(pair.new_id(), prompt_of(1, PROMPT), params()(), lora_request=double))
    assert refused is not None and "is red here, not double" in refused.reason


# ---- adapter slots


def test_a_destination_whose_adapter_slots_are_taken_refuses(
    pair: EnginePair, adapters: dict[str, LoRARequest]
) -> None:
    other = pair.new_id("other")
    submission = submission_of(other, prompt_of(7, PROMPT), params()(), lora_request=adapters["blue"])
    assert pair.second.add(submission) is None
    pair.decode_until(pair.second, other, 2)
    request_id = start(pair, adapters["red"], 5)
    with pytest.raises(Refused, match="adapter slots"):
        pair.ferry(request_id, pair.first, pair.second)
    pair.finish(pair.second, other)
    pair.ferry(request_id, pair.first, pair.second)
    pair.finish(pair.second, request_id)


def test_a_stopped_request_whose_adapter_slot_was_given_away_waits_for_one_and_loses_nothing(
    pair: EnginePair, compare: Callable[..., Comparison], adapters: dict[str, LoRARequest]
) -> None:
    """1. It is stopped. 2. A request with the other adapter takes the one slot. 3. It is resumed: vLLM dies of two."""
    expected = compare(adapters["red"]).undisturbed().tokens
    request_id = start(pair, adapters["red"], 10)
    pair.stop(pair.first, request_id)
    other = pair.new_id("other")
    submission = submission_of(other, prompt_of(7, PROMPT), params()(), lora_request=adapters["blue"])
    assert pair.first.add(submission) is None
    pair.decode_until(pair.first, other, 2)
    pair.first.resume(request_id)
    pair.finish(pair.first, request_id, other)
    assert pair.tokens(request_id) == list(expected)
