"""Which requests with images may run here, and which may move?

A step computes an image's embeddings when it computes the part of a prompt that they stand in; afterwards they live on
in KV only. So an image travels as the pixels it was submitted with, and a destination encodes it again if its part of
the prompt is not computed yet, or must be once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE = "image"


def why_never_movable(config: Any) -> str | None:
    """One line that says why no request with an image can leave or enter an engine of this `VllmConfig`, or None."""
    model = config.model_config
    if not model.is_multimodal_model:
        return "it has multimodal inputs, and its model takes none"
    facts = (
        (config.speculative_config is not None, "it has an image, and speculative decoding is on"),
        (model.uses_mrope, "it has an image, and its model counts positions in several dimensions (M-RoPE)"),
        (model.is_mm_prefix_lm, "it has an image, and its model reads images in both directions"),
        (
            model.is_multimodal_raw_input_only_model or model.requires_raw_input_tokens,
            "it has an image, and its model reads raw inputs beside embeddings",
        ),
    )
    return next((reason for is_so, reason in facts if is_so), None)


def why_unmovable(features: Sequence[Any], has_adapter: bool) -> str | None:
    """The same for one request. `features`: its MultiModalFeatureSpecs."""
    others = sorted({str(feature.modality) for feature in features} - {IMAGE})
    facts = (
        (bool(others), f"it has multimodal inputs other than images ({', '.join(others)})"),
        (any(_is_embedded(feature) for feature in features), "it has an image that was embedded by its sender"),
        (bool(features) and has_adapter, "it has both an image and a LoRA adapter"),
    )
    return next((reason for is_so, reason in facts if is_so), None)


def why_unservable(scheduler: Any, features: Sequence[Any]) -> str | None:
    """One line that says why this engine could never run such a request, or None: vLLM would wait without end, or end
    with the step that looks for the image."""
    room = min(scheduler.encoder_cache_manager.cache_size, scheduler.max_num_encoder_input_tokens)
    for feature in features:
        if feature.data is None:
            return f"its {feature.modality} came without data"
        if feature.mm_position.get_num_embeds() > room:
            num_embeds = feature.mm_position.get_num_embeds()
            return f"its {feature.modality} of {num_embeds} embeddings does not fit into an encoder cache of {room}"
    return None


def check_references(scheduler: Any, owners: set[str]) -> None:
    """Raise AssertionError unless only `owners` hold embeddings in the encoder cache."""
    manager = scheduler.encoder_cache_manager
    holders = {*manager.request_cached_ids, *(holder for holders in manager.cached.values() for holder in holders)}
    assert holders <= owners, f"embeddings of {sorted(holders - owners)}, who are gone"


def _is_embedded(feature: Any) -> bool:
    return feature.data is not None and any("embeds" in str(name) for name in feature.data)
