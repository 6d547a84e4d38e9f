"""Does a request with images move exactly, also while the part of its prompt that holds an image is being computed?

An image's embeddings are in KV once its part of the prompt is computed, and nowhere else after that. A destination that
takes over earlier has never seen the image, and must encode it from the pixels that travelled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams

from instance.types import RequestStatus, Submission
from instance.vllm import images
from instance.vllm.codec import decode_described, decode_request, encode_described, encode_request
from instance.vllm.host import VllmEngine
from instance.vllm.refusals import MAX_SUBMISSION_BYTES, why_unmovable
from migration.types import Description, Refusal, RequestId
from tests.support.exactness import Comparison, Seen
from tests.support.image_model import (
    NUM_IMAGE_TOKENS,
    Picture,
    image_front,
    image_model_path,
    submission_from,
)
from tests.support.pair import EnginePair, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, start_engine, submission_of

pytestmark = pytest.mark.timeout(300)

BLOCK = 32
CHUNK = 64
"""Prompt tokens that a chunking engine computes in a step."""
LEADING, BETWEEN, TRAILING = 40, 60, 30
FIRST_IMAGE = range(LEADING, LEADING + NUM_IMAGE_TOKENS)
SECOND_IMAGE = range(FIRST_IMAGE.stop + BETWEEN, FIRST_IMAGE.stop + BETWEEN + NUM_IMAGE_TOKENS)
NUM_PROMPT = SECOND_IMAGE.stop + TRAILING
_SEEDS = itertools.count(1)
"""Every test has images of its own: an engine that has encoded one keeps the embeddings a while."""

Prompt = Sequence[int | Picture]
Start = Callable[..., Comparison]


def params(**values: object) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(**{"temperature": 0.0, "max_tokens": 50, "ignore_eos": True, "logprobs": 1, **values})


CASES = {
    "greedy": params(),
    "seeded": params(temperature=1.0, seed=5, top_p=0.9),
    "logprobs": params(logprobs=5, prompt_logprobs=2),
    "penalties": params(frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.3),
    "long": params(max_tokens=250),
}


class ImageComparison(Comparison):
    """Of a prompt with images in it."""

    def __init__(self, kit: VllmKit, prompt: Prompt, case: str) -> None:
        super().__init__(kit, 0, 0, CASES[case])
        self.prompt = prompt

    def _submission(self, request_id: RequestId) -> Submission:
        return image_front().submission(request_id, self.prompt, self._params())


def one_image(picture: Picture | None = None, leading: int = LEADING) -> list[int | Picture]:
    return [*prompt_of(1, leading), picture or Picture(next(_SEEDS)), *prompt_of(2, BETWEEN)]


def two_images(*pictures: Picture) -> list[int | Picture]:
    first, second = pictures or (Picture(next(_SEEDS)), Picture(next(_SEEDS)))
    return [*one_image(first), second, *prompt_of(3, TRAILING)]


def kit_of(**flags: Any) -> VllmKit:
    model = image_model_path()
    return VllmKit(start_engine(model=model, **flags), start_engine(model=model, **flags))


@pytest.fixture(scope="module")
def kit() -> VllmKit:
    return kit_of()


@pytest.fixture(scope="module")
def chunking() -> VllmKit:
    """Engines that need several steps for a prompt, and whose encoder cache holds one image."""
    return kit_of(max_num_batched_tokens=CHUNK)


@pytest.fixture
def compare() -> Iterator[Start]:
    made: list[Comparison] = []

    def make(kit: VllmKit, prompt: Prompt, case: str = "greedy") -> Comparison:
        made.append(ImageComparison(kit, prompt, case))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


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


def step_to(comparison: Comparison, num_steps: int) -> RequestId:
    request_id = comparison.start()
    for _ in range(num_steps):
        comparison.pair.step(comparison.first)
    return request_id


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
    picture = Picture(next(_SEEDS))
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
    picture = Picture(next(_SEEDS))
    comparison = compare(kit, one_image(picture))
    pair, second = comparison.pair, comparison.second
    expected = comparison.undisturbed()
    num_prompt = len(prompt_of(1, LEADING)) + NUM_IMAGE_TOKENS + BETWEEN
    for there, num_cached in (
        (picture, num_prompt // BLOCK * BLOCK),
        (Picture(next(_SEEDS)), LEADING // BLOCK * BLOCK),
    ):
        request_id = step_to(comparison, 20)
        finished(pair, second, one_image(there))
        ferried = pair.ferry(request_id, comparison.first, second)
        assert ferried.num_cached_tokens == num_cached
        pair.finish(second, request_id)
        assert comparison.seen(request_id) == expected


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"uses_mrope": True}, "M-RoPE"),
        ({"is_mm_prefix_lm": True}, "both directions"),
        ({"is_multimodal_raw_input_only_model": True}, "raw inputs"),
        ({"requires_raw_input_tokens": True}, "raw inputs"),
        ({"is_multimodal_model": False}, "takes none"),
        ({}, None),
    ],
)
def test_models_whose_images_are_more_than_embeddings_keep_them(change: dict[str, bool], reason: str | None) -> None:
    plain = {
        "is_multimodal_model": True,
        "uses_mrope": False,
        "is_mm_prefix_lm": False,
        "is_multimodal_raw_input_only_model": False,
        "requires_raw_input_tokens": False,
    }
    model = SimpleNamespace(**{**plain, **change})
    told = images.why_never_movable(SimpleNamespace(model_config=model, speculative_config=None))
    assert told is None if reason is None else reason in str(told)


def test_inputs_other_than_images_embedded_images_and_images_with_an_adapter_stay() -> None:
    image = SimpleNamespace(modality="image", data={"pixel_values": None})
    assert images.why_unmovable([image], has_adapter=False) is None
    assert "LoRA" in str(images.why_unmovable([image], has_adapter=True))
    assert "(audio)" in str(images.why_unmovable([image, SimpleNamespace(modality="audio", data={})], False))
    embedded = SimpleNamespace(modality="image", data={"image_embeds": None})
    assert "embedded by its sender" in str(images.why_unmovable([embedded], has_adapter=False))


def test_the_reason_of_the_model_holds_for_requests_with_images_only(kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, one_image())
    request = kit.first._scheduler.requests[comparison.start()]
    assert why_unmovable(request, "not with this model") == "not with this model"
    request.mm_features = []
    assert why_unmovable(request, "not with this model") is None


def test_a_submission_too_large_for_a_message_stays_where_it_is(kit: VllmKit, compare: Start) -> None:
    pair = compare(kit, one_image()).pair
    request_id = pair.new_id()
    request = image_front().request(request_id, one_image(), params()())
    request.trace_headers = {"large": "x" * MAX_SUBMISSION_BYTES}
    assert kit.first.add(submission_from(request)) is None
    refusal = kit.first.describe(request_id)
    assert isinstance(refusal, Refusal) and "larger than" in refusal.reason
    (view,) = kit.first.requests()
    assert not view.movable
    pair.finish(kit.first, request_id)


def test_an_image_without_its_data_is_no_request(kit: VllmKit) -> None:
    """What a front end sends that believes the engine to have the image already; vLLM would end with the step."""
    request = image_front().request(RequestId("hash-only"), one_image(), params()())
    request.mm_features[0].data = None
    refusal = kit.first.add(submission_from(request))
    assert refusal is not None and refusal.final and "without data" in refusal.reason


def test_an_image_larger_than_the_encoder_cache_is_no_request(kit: VllmKit) -> None:
    request = image_front().request(RequestId("large"), one_image(), params()())
    cache = SimpleNamespace(cache_size=63)
    scheduler = SimpleNamespace(encoder_cache_manager=cache, max_num_encoder_input_tokens=64)
    assert "encoder cache of 63" in str(images.why_unservable(scheduler, request.mm_features))
    cache.cache_size = 64
    assert images.why_unservable(scheduler, request.mm_features) is None


# ---- negative controls


def test_control_another_image_says_something_else(kit: VllmKit, compare: Start) -> None:
    tokens = {compare(kit, one_image()).undisturbed().tokens for _ in range(3)}
    assert len(tokens) == 3


@pytest.mark.parametrize("block", [1, 2])
def test_control_a_block_of_the_image_that_is_not_copied_is_noticed(block: int, kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, one_image())
    assert FIRST_IMAGE.start < block * BLOCK + BLOCK and block * BLOCK < FIRST_IMAGE.stop
    expected = comparison.undisturbed()
    moved = comparison.migrated(hops=(20,), sabotage=Sabotage(blank=(0, block)))
    assert differs(moved, expected) and moved.tokens[:20] == expected.tokens[:20]


def test_control_a_tail_that_is_not_copied_is_noticed(kit: VllmKit, compare: Start) -> None:
    comparison = compare(kit, one_image())
    expected = comparison.undisturbed()
    assert differs(comparison.migrated(hops=(20,), sabotage=Sabotage(skip_tail=True)), expected)


@pytest.mark.parametrize(("num_steps", "matters"), [(1, True), (2, False)])
def test_control_other_pixels_under_the_same_name_matter_before_the_image_is_computed(
    num_steps: int, matters: bool, chunking: VllmKit, compare: Start
) -> None:
    """So the destination encodes what has travelled, and nothing that it has from elsewhere."""
    comparison = compare(chunking, one_image())
    expected = comparison.undisturbed()
    request_id = step_to(comparison, num_steps)
    comparison.pair.ferry(
        request_id,
        comparison.first,
        comparison.second,
        num_stages=1,
        steps_between=0,
        sabotage=Sabotage(alter_description=with_other_pixels),
    )
    comparison.pair.finish(comparison.second, request_id)
    assert differs(comparison.seen(request_id), expected) is matters


def with_other_pixels(description: Description) -> Description:
    described = decode_described(description.payload)
    request = decode_request(described.core)
    assert request.mm_features is not None
    (feature,) = request.mm_features
    (other,) = image_front().request(RequestId("other"), one_image(), params()()).mm_features
    assert feature.identifier != other.identifier
    feature.data = other.data
    altered = msgspec.structs.replace(described, core=encode_request(request))
    return Description(
        description.request_id,
        encode_described(altered),
        description.settled_tokens,
        description.kv_fingerprint,
        description.block_size,
        description.num_preemptions,
    )


def differs(moved: Seen, expected: Seen) -> bool:
    return (moved.tokens, moved.logprobs) != (expected.tokens, expected.logprobs)
