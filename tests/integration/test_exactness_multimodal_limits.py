"""Which requests with images are refused, and would a comparison notice what a move leaves behind?"""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.vllm import images
from instance.vllm.codec import decode_described, decode_request, encode_described, encode_request
from instance.vllm.refusals import MAX_SUBMISSION_BYTES, why_unmovable
from migration.types import Description, Refusal, RequestId
from tests.support.exactness import Seen
from tests.support.image_comparison import (
    BLOCK,
    CHUNK,
    FIRST_IMAGE,
    Start,
    comparisons,
    kit_of,
    one_image,
    params,
    step_to,
)
from tests.support.image_model import (
    image_front,
    submission_from,
)
from tests.support.pair import Sabotage
from tests.support.vllm_kit import VllmKit

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def kit() -> VllmKit:
    return kit_of()


@pytest.fixture(scope="module")
def chunking() -> VllmKit:
    """Engines that need several steps for a prompt, and whose encoder cache holds one image."""
    return kit_of(max_num_batched_tokens=CHUNK)


compare = pytest.fixture(comparisons, name="compare")


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
