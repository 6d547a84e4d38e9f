"""Does a request with images move exactly, also while the part of its prompt that holds an image is being computed?

An image's embeddings are in KV once its part of the prompt is computed, and nowhere else after that. A destination that
takes over earlier has never seen the image, and must encode it from the pixels that travelled.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.types import RequestStatus
from instance.vllm.host import VllmEngine
from migration.types import Refusal, RequestId
from tests.support.image_comparison import (
    BETWEEN,
    BLOCK,
    CASES,
    CHUNK,
    FIRST_IMAGE,
    LEADING,
    NUM_PROMPT,
    SECOND_IMAGE,
    Prompt,
    Start,
    comparisons,
    kit_of,
    new_picture,
    one_image,
    params,
    step_to,
    two_images,
)
from tests.support.image_model import (
    NUM_IMAGE_TOKENS,
    image_front,
)
from tests.support.pair import EnginePair
from tests.support.vllm_kit import VllmKit, prompt_of, submission_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def kit() -> VllmKit:
    return kit_of()


@pytest.fixture(scope="module")
def chunking() -> VllmKit:
    """Engines that need several steps for a prompt, and whose encoder cache holds one image."""
    return kit_of(max_num_batched_tokens=CHUNK)


compare = pytest.fixture(comparisons, name="compare")


def encoded(engine: VllmEngine) -> frozenset[str]:
    """Names of the images whose embeddings the engine has."""
    return frozenset(engine._scheduler.encoder_cache_manager.cached)


def names_of(prompt: Prompt) -> list[str]:
    request = image_front().request(RequestId("named"), prompt, params()())
    return [feature.identifier for feature in request.mm_features]


def finished(pair: EnginePair, engine: VllmEngine, prompt: Prompt) -> list[int]:
    """Tokens that this engine puts out after this prompt."""
    request_id = pair.new_id("other")
    assert engine.add(image_front().submission(request_id, prompt, params(max_tokens=20)())) is None
    pair.finish(engine, request_id)
    return pair.tokens(request_id)


# ---- with the prompt computed


@pytest.mark.parametrize("case", ["greedy", "seeded", "logprobs", "penalties"])
@pytest.mark.parametrize("make_prompt", [one_image, two_images])
def test_each_kind_of_sampling_moves_exactly_over_several_hops(
    make_prompt: Callable[[], Prompt], case: str, kit: VllmKit, compare: Start
) -> None:
    comparison = compare(kit, make_prompt(), case)
    expected = comparison.undisturbed()
    assert len(set(expected.logprobs)) > 10, "its output is too dull to show a difference"
    assert comparison.migrated(hops=(1, 3, 11, 19, 33, 43)) == expected


@pytest.mark.parametrize("leading", [0, 1, 29, 31, 32, 64])
def test_it_moves_exactly_wherever_the_image_stands_in_its_blocks(leading: int, kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, one_image(leading=leading))
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(1, 2, 17, 33)) == expected


def test_a_destination_that_takes_over_behind_the_image_never_encodes_it(kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, one_image())
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(1,)) == expected
    assert not encoded(comparison.second) & {*names_of(comparison.prompt)}  # type: ignore[attr-defined]


def test_recomputed_at_the_destination_its_tokens_are_the_same(kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, two_images())
    expected = comparison.undisturbed()
    assert comparison.migrated(hops=(7, 20), without_kv=True).tokens == expected.tokens


def test_one_that_has_not_run_yet_moves(kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, two_images())
    expected = comparison.undisturbed()
    request_id, _ = comparison.move_at_once()
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


# ---- with the prompt half computed


@pytest.mark.parametrize(
    ("num_steps", "where"),
    [(1, "in the first image"), (2, "between them"), (3, "in the second image"), (4, "behind both")],
)
def test_a_half_computed_prompt_moves_exactly(num_steps: int, where: str, chunking: VllmKit, compare: Start) -> None:
    prompt = two_images()
    comparison, names = compare(chunking, prompt), names_of(prompt)
    expected = comparison.undisturbed()
    request_id = step_to(comparison, num_steps)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=1, steps_between=0)
    assert position(ferried.settled_tokens) == where
    assert not encoded(comparison.second) & {*names}
    comparison.pair.decode_until(comparison.second, request_id, 1)
    # Its cache holds one image: the last that it needed.
    assert encoded(comparison.second) & {*names} == ({names[1]} if num_steps < 4 else set())
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def position(num_tokens: int) -> str:
    edges = (
        (FIRST_IMAGE.start, "before both"),
        (FIRST_IMAGE.stop - 1, "in the first image"),
        (SECOND_IMAGE.start, "between them"),
        (SECOND_IMAGE.stop - 1, "in the second image"),
        (NUM_PROMPT - 1, "behind both"),
    )
    return next((where for edge, where in edges if num_tokens <= edge), "all of it")


def test_a_prompt_that_is_half_computed_before_its_image_moves_exactly(chunking: VllmKit, compare: Start) -> None:
    comparison = compare(chunking, one_image(leading=100))
    expected = comparison.undisturbed()
    request_id = step_to(comparison, 1)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=1, steps_between=0)
    assert ferried.settled_tokens == CHUNK
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


@pytest.mark.parametrize("case", ["greedy", "penalties"])
def test_it_moves_there_and_back_with_every_step_of_its_prompt(case: str, chunking: VllmKit, compare: Start) -> None:
    comparison = compare(chunking, two_images(), case)
    expected = comparison.undisturbed()
    request_id = comparison.start()
    here, there = comparison.first, comparison.second
    while not comparison.pair.tokens(request_id):
        comparison.pair.step(here)
        comparison.pair.ferry(request_id, here, there, num_stages=1, steps_between=0)
        here, there = there, here
    comparison.pair.finish(here, request_id)
    assert comparison.seen(request_id) == expected


def test_the_prompt_goes_on_being_computed_while_it_is_copied(chunking: VllmKit, compare: Start) -> None:
    comparison = compare(chunking, two_images())
    expected = comparison.undisturbed()
    request_id = step_to(comparison, 1)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second)
    assert position(ferried.settled_tokens) == "in the second image"
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_one_image_twice_is_encoded_once_and_moves_exactly(chunking: VllmKit, compare: Start) -> None:
    picture = new_picture()
    comparison = compare(chunking, two_images(picture, picture))
    expected = comparison.undisturbed()
    request_id = step_to(comparison, 1)
    comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=1, steps_between=0)
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_a_migration_that_is_called_off_leaves_it_computing_its_image(chunking: VllmKit, compare: Start) -> None:
    comparison = compare(chunking, two_images())
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed()
    request_id = step_to(comparison, 1)
    migration, _ = pair.reserve(second, pair.describe(first, request_id))
    assert not isinstance(pair.stop(first, request_id), Refusal)
    second.cancel(migration)
    first.resume(request_id)
    pair.finish(first, request_id)
    assert comparison.seen(request_id) == expected


def test_aborted_in_the_middle_of_its_image_it_leaves_no_embeddings_held(chunking: VllmKit, compare: Start) -> None:
    comparison = compare(chunking, two_images())
    request_id = step_to(comparison, 1)
    comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=1, steps_between=0)
    comparison.pair.step(comparison.second)
    comparison.second.abort((request_id,))
    for engine in (comparison.first, comparison.second):
        manager = engine._scheduler.encoder_cache_manager
        assert manager.request_cached_ids == {} and manager.num_freeable_slots == manager.cache_size


# ---- preempted, and with a prefix that is there already


@pytest.mark.parametrize("at_the_destination", [False, True])
def test_one_that_is_preempted_before_or_after_it_moves_computes_its_image_again(
    at_the_destination: bool, chunking: VllmKit, compare: Start
) -> None:
    """Requests nearly fill the 64 blocks; they grow, and the youngest, ours, is preempted."""
    comparison = compare(chunking, one_image(), "long")
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed().tokens
    crowded = second if at_the_destination else first
    others = [pair.new_id("other") for _ in range(3)]
    request_id = comparison.start()
    if at_the_destination:
        pair.decode_until(first, request_id, 1)
    else:
        first.abort((request_id,))
    for i, other in enumerate(others):
        assert crowded.add(submission_of(other, prompt_of(20 + i, 520), CASES["long"]())) is None
    pair.decode_until(crowded, others[-1], 1)
    if at_the_destination:
        pair.ferry(request_id, first, second)
    else:
        request_id = pair.new_id()
        assert first.add(comparison._submission(request_id)) is None
    pair.step_until(crowded, lambda: is_preempted(crowded, request_id) or pair.is_finished(request_id))
    assert is_preempted(crowded, request_id)
    if not at_the_destination:
        pair.ferry(request_id, first, second)
    pair.finish(second, request_id)
    pair.finish(crowded, *others)
    assert pair.tokens(request_id) == list(expected)


def is_preempted(engine: VllmEngine, request_id: RequestId) -> bool:
    return any(v.request_id == request_id and v.status is RequestStatus.PREEMPTED for v in engine.requests())


def test_a_prefix_with_the_same_image_is_not_copied_and_one_with_another_image_is(kit: VllmKit, compare: Start) -> None:
    picture = new_picture()
    comparison = compare(kit, one_image(picture))
    pair, second = comparison.pair, comparison.second
    expected = comparison.undisturbed()
    num_prompt = len(prompt_of(1, LEADING)) + NUM_IMAGE_TOKENS + BETWEEN
    for there, num_cached in (
        (picture, num_prompt // BLOCK * BLOCK),
        (new_picture(), LEADING // BLOCK * BLOCK),
    ):
        request_id = step_to(comparison, 20)
        finished(pair, second, one_image(there))
        ferried = pair.ferry(request_id, comparison.first, second)
        assert ferried.num_cached_tokens == num_cached
        pair.finish(second, request_id)
        assert comparison.seen(request_id) == expected
