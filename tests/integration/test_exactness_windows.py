"""Does a request move exactly when some layers see only a sliding window, and KV lies in several groups?

A window's blocks are given back while the request decodes on, and while it is being copied: what has left the window at
either side is not needed, and what has not must be there, in every group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams

from instance.types import RequestStatus
from instance.vllm import compat
from migration.types import BlockRange, RequestId, StoppedRequest
from tests.support.exactness import Comparison
from tests.support.pair import EnginePair, Refused, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, start_engine, submission_of
from tests.support.windowed_model import MIXED, SLIDING, windowed_model_path

pytestmark = pytest.mark.timeout(300)

FLAGS: dict[str, Any] = {"num_gpu_blocks_override": 161, "max_num_batched_tokens": 512}
PROMPT = 200
WINDOWED_GROUPS = (0, 1)
FULL_GROUP = 2
NUM_GROUPS = 3


def params(**values: object) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(**{"temperature": 0.0, "max_tokens": 50, "ignore_eos": True, "logprobs": 1, **values})


CASES = {
    "greedy": params(),
    "seeded": params(temperature=1.0, seed=5),
    "long": params(max_tokens=250),
    "penalties": params(frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.3),
}


def kit_of(layers: str, **changes: object) -> VllmKit:
    flags = {**FLAGS, **changes}
    model = windowed_model_path(layers)
    return VllmKit(start_engine(model=model, **flags), start_engine(model=model, **flags))


@pytest.fixture(scope="module")
def mixed() -> VllmKit:
    return kit_of(MIXED)


@pytest.fixture(scope="module")
def sliding() -> VllmKit:
    return kit_of(SLIDING)


@pytest.fixture(scope="module")
def chunking() -> VllmKit:
    """Engines that need several steps for a prompt."""
    return kit_of(MIXED, max_num_batched_tokens=64)


@pytest.fixture
def compare() -> Iterator[Callable[..., Comparison]]:
    made: list[Comparison] = []

    def make(kit: VllmKit, num_prompt_tokens: int = PROMPT, case: str = "greedy", key: int = 1) -> Comparison:
        made.append(Comparison(kit, key, num_prompt_tokens, CASES[case]))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


def started(comparison: Comparison, num_tokens: int) -> RequestId:
    request_id = comparison.start()
    comparison.pair.decode_until(comparison.first, request_id, num_tokens)
    return request_id


@pytest.mark.parametrize("num_prompt_tokens", [1, 30, 31, 32, 33, 61, 62, 63, 64, 65, 95, 96, 97, 128, 200, 500])
def test_it_moves_exactly_around_the_edges_of_blocks_and_windows(
    num_prompt_tokens: int, mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed, num_prompt_tokens)
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(1, 2, 17, 33, 34)) == expected


@pytest.mark.parametrize("case", ["greedy", "seeded", "penalties"])
def test_each_kind_of_sampling_moves_exactly_over_several_hops(
    case: str, mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed, case=case)
    expected = comparison.undisturbed()
    assert len(set(expected.logprobs)) > 10, "its output is too dull to show a difference"
    assert comparison.migrated(hops=(3, 11, 19, 27, 35, 43)) == expected


@pytest.mark.parametrize("num_prompt_tokens", [33, 64, 96, 200])
def test_a_model_of_sliding_layers_only_moves_exactly(
    num_prompt_tokens: int, sliding: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(sliding, num_prompt_tokens)
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(1, 17, 33, 34)) == expected


@pytest.mark.parametrize("steps_between", [5, 20])
def test_the_window_may_pass_blocks_while_they_are_copied(
    steps_between: int, mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed)
    pair, expected = comparison.pair, comparison.undisturbed()
    request_id = started(comparison, 4)
    pair.ferry(request_id, comparison.first, comparison.second, steps_between=steps_between)
    pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_what_left_the_window_before_it_was_copied_is_no_cached_prefix_at_the_destination(
    mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    """1. Blocks are reserved at 204 tokens. 2. The source decodes to 244, and gives back the windows' fifth blocks.
    3. Only then they are copied, as they are by now. 4. A prompt that ends where those blocks would be seen computes
    them itself."""
    comparison = compare(mixed)
    pair, first, second = comparison.pair, comparison.first, comparison.second
    text = [*prompt_of(1, PROMPT), *comparison.undisturbed().tokens]
    shorter = text[:197]
    assert second.reset_prefix_cache()
    expected = run(pair, mixed, shorter)
    request_id = started(comparison, 4)
    migration, _ = pair.reserve(second, pair.describe(first, request_id))
    pair.decode_until(first, request_id, 44)
    grown = second.grow(migration, PROMPT + 45)
    pair.open(second, migration, grown.block_table)  # type: ignore[union-attr]
    stopped = pair.stop(first, request_id)
    assert isinstance(stopped, StoppedRequest)
    pair.push(first, second, migration, stopped.block_table, BlockRange(0, 8))
    pair.close_tickets(migration, first, second)
    second.commit(migration, stopped.state)
    assert first.release(request_id)
    pair.finish(second, request_id)
    assert run(pair, mixed, shorter) == expected


def run(pair: EnginePair, kit: VllmKit, prompt: list[int]) -> list[int]:
    """Tokens that the second engine puts out after this prompt."""
    request_id = pair.new_id("other")
    assert kit.second.add(submission_of(request_id, prompt, params(max_tokens=20)())) is None
    pair.finish(kit.second, request_id)
    return pair.tokens(request_id)


def test_a_prefix_that_the_destination_holds_in_every_group_is_not_copied(
    mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed)
    expected = comparison.undisturbed()
    request_id = started(comparison, 20)
    run(comparison.pair, mixed, prompt_of(1, PROMPT))
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second)
    assert ferried.num_cached_tokens == 192
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_a_half_computed_prompt_moves_exactly_to_where_more_of_it_is_cached(
    chunking: VllmKit, compare: Callable[..., Comparison]
) -> None:
    """The destination holds the full group's blocks of the whole prompt, the windows' only of its beginning and end."""
    comparison = compare(chunking, 300)
    expected = comparison.undisturbed()
    request_id = comparison.start()
    for num_tokens in (300, 97):
        run(comparison.pair, chunking, prompt_of(1, 300)[:num_tokens])
    for _ in range(2):
        comparison.pair.step(comparison.first)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second)
    assert (ferried.settled_tokens, ferried.num_cached_tokens) == (256, 96)
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_a_preempted_request_moves(chunking: VllmKit, compare: Callable[..., Comparison]) -> None:
    """1. Requests nearly fill the blocks. 2. They grow; the youngest is preempted. 3. It goes on elsewhere."""
    comparison = compare(chunking, 700, "long")
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed().tokens
    assert first.reset_prefix_cache() and second.reset_prefix_cache()
    others = [pair.new_id("other") for _ in range(4)]
    for i, other in enumerate(others):
        assert first.add(submission_of(other, prompt_of(20 + i, 700), CASES["long"]())) is None
    request_id = pair.new_id()
    assert first.add(submission_of(request_id, prompt_of(1, 700), CASES["long"]())) is None

    def is_preempted() -> bool:
        status = {view.request_id: view.status for view in first.requests()}
        return status.get(request_id) is RequestStatus.PREEMPTED

    pair.step_until(first, lambda: is_preempted() or pair.is_finished(request_id))
    assert is_preempted()
    ferried = pair.ferry(request_id, first, second)
    assert ferried.settled_tokens == 0
    pair.finish(second, request_id)
    pair.finish(first, *others)
    assert pair.tokens(request_id) == list(expected)


def test_a_destination_without_room_in_all_groups_refuses_and_keeps_nothing(
    chunking: VllmKit, compare: Callable[..., Comparison]
) -> None:
    """Four others hold about 32 of 160 blocks each; the request that comes needs 35, 29 of them in the full group."""
    comparison = compare(chunking, 900)
    pair, first, second = comparison.pair, comparison.first, comparison.second
    request_id = started(comparison, 3)
    others = [pair.new_id("other") for _ in range(4)]
    for i, other in enumerate(others):
        assert second.add(submission_of(other, prompt_of(30 + i, 800), params(max_tokens=200)())) is None
    pair.decode_until(second, others[-1], 1)
    free = second.load().free_blocks
    with pytest.raises(Refused, match="free KV blocks"):
        pair.ferry(request_id, first, second)
    assert second.load().free_blocks == free
    pair.finish(second, *others)
    pair.ferry(request_id, first, second)
    pair.finish(second, request_id)


def test_the_load_counts_the_blocks_of_all_groups_and_no_null_block(
    mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed, 500)
    request_id = started(comparison, 3)
    (view,) = comparison.first.requests()
    load = comparison.first.load()
    assert view.num_blocks == comparison.first.facts.total_blocks - load.free_blocks
    pair = comparison.pair
    migration, reservation = pair.reserve(comparison.second, pair.describe(comparison.first, request_id))
    held = {block for group in reservation.block_table for block in group if block}
    load = comparison.second.load()
    assert load.reserved_blocks == len(held) == comparison.second.facts.total_blocks - load.free_blocks
    comparison.second.cancel(migration)


@pytest.mark.parametrize(
    ("kinds", "sizes", "reason"),
    [
        (("FullAttentionManager", "SlidingWindowManager"), (32, 32), None),
        (("FullAttentionManager", "MambaManager"), (32, 32), "kind that kvferry does not move yet (MambaManager)"),
        (("FullAttentionManager", "SlidingWindowManager"), (32, 64), "blocks of several sizes (32, 64)"),
    ],
)
def test_groups_of_other_kinds_or_unequal_blocks_are_refused_with_the_reason(
    kinds: tuple[str, ...], sizes: tuple[int, ...], reason: str | None
) -> None:
    groups = [type(kind, (), {"block_size": size})() for kind, size in zip(kinds, sizes, strict=True)]
    coordinator = SimpleNamespace(single_type_managers=groups)
    scheduler: Any = SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(runner_type="generate", is_encoder_decoder=False),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    told = compat.why_engine_unmovable(config, scheduler)
    assert told is None if reason is None else reason in str(told)


# ---- negative controls


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_control_a_block_left_out_in_one_group_is_noticed(
    group: int, mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed, key=70)
    expected = comparison.undisturbed()
    moved = comparison.migrated(hops=(20,), sabotage=Sabotage(blank=(group, 5)))
    assert (moved.tokens, moved.logprobs) != (expected.tokens, expected.logprobs)
    assert moved.tokens[:20] == expected.tokens[:20]


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_control_the_first_block_matters_in_the_full_group_only(
    group: int, mixed: VllmKit, compare: Callable[..., Comparison]
) -> None:
    comparison = compare(mixed, key=71)
    expected = comparison.undisturbed()
    moved = comparison.migrated(hops=(20,), sabotage=Sabotage(blank=(group, 0)))
    assert (moved == expected) is (group in WINDOWED_GROUPS)
    assert (moved != expected) is (group == FULL_GROUP)


def test_control_a_tail_that_is_not_copied_is_noticed(mixed: VllmKit, compare: Callable[..., Comparison]) -> None:
    comparison = compare(mixed, key=72)
    expected = comparison.undisturbed()
    moved = comparison.migrated(hops=(20,), sabotage=Sabotage(skip_tail=True))
    assert (moved.tokens, moved.logprobs) != (expected.tokens, expected.logprobs)
