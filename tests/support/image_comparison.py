"""How is a request with images compared, moved and unmoved? Prompts, engines, and the comparison."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams

from instance.types import Submission
from migration.types import RequestId
from tests.support.exactness import Comparison
from tests.support.image_model import NUM_IMAGE_TOKENS, Picture, image_front, image_model_path
from tests.support.vllm_kit import VllmKit, prompt_of, start_engine

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


def comparisons() -> Iterator[Start]:
    """What a fixture does: makes them, and closes them at the end."""
    made: list[Comparison] = []

    def make(kit: VllmKit, prompt: Prompt, case: str = "greedy") -> Comparison:
        made.append(ImageComparison(kit, prompt, case))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


def new_picture() -> Picture:
    return Picture(next(_SEEDS))


def one_image(picture: Picture | None = None, leading: int = LEADING) -> list[int | Picture]:
    return [*prompt_of(1, leading), picture or new_picture(), *prompt_of(2, BETWEEN)]


def two_images(*pictures: Picture) -> list[int | Picture]:
    first, second = pictures or (new_picture(), new_picture())
    return [*one_image(first), second, *prompt_of(3, TRAILING)]


@functools.cache
def kit_of(**flags: Any) -> VllmKit:
    """One pair for the whole test process."""
    model = image_model_path()
    return VllmKit(start_engine(model=model, **flags), start_engine(model=model, **flags))


def step_to(comparison: Comparison, num_steps: int) -> RequestId:
    request_id = comparison.start()
    for _ in range(num_steps):
        comparison.pair.step(comparison.first)
    return request_id
