"""Where is the tests' model that sees images, and what are submissions with images? Made once in a run."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams

from bench.models import pictured
from bench.models.pictured import NUM_IMAGE_TOKENS, Picture, question, write_pictured_model
from instance.types import Submission
from instance.vllm.codec import encode_request
from migration.types import RequestId
from tests.support.model import random_model_path
from tests.support.vllm_kit import engine_argv

__all__ = ["NUM_IMAGE_TOKENS", "Picture", "image_front", "image_model_path", "question", "submission_from"]


@functools.cache
def image_model_path() -> Path:
    return write_pictured_model(Path(tempfile.gettempdir()) / "kvferry-image-model-1", random_model_path())


class ImageFront(pictured.ImageFront):
    """As of the tests' engines."""

    def submission(self, request_id: RequestId, prompt: Sequence[int | Picture], params: SamplingParams) -> Submission:
        return submission_from(self.request(request_id, prompt, params))


def submission_from(request: Any) -> Submission:
    """Of an EngineCoreRequest."""
    request_id, params = RequestId(request.request_id), request.sampling_params
    payload = encode_request(request)
    num_prompt = len(request.prompt_token_ids)
    return Submission(request_id, request.external_req_id, request.priority, num_prompt, params.max_tokens, payload)


@functools.cache
def image_front() -> ImageFront:
    return ImageFront(engine_argv(image_model_path()))
