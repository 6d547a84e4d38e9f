"""What does a request put out whose engine guesses tokens ahead, and in which steps? Two engines, a process each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from vllm.sampling_params import SamplingParams

from instance.types import Submission
from migration.types import RequestId
from tests.support.engine_process import EngineProcess
from tests.support.exactness import Comparison, Seen
from tests.support.pair import Sabotage, Shape
from tests.support.vllm_kit import VllmKit, engine_argv, prompt_of, submission_of

NUM_GUESSES = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": NUM_GUESSES, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PERIOD = 20
"""The prompt repeats itself after so many tokens, and the answer repeats some of it."""


def repeating_prompt(key: int, num_tokens: int) -> list[int]:
    return (prompt_of(key, PERIOD) * -(-num_tokens // PERIOD))[:num_tokens]


@dataclass(frozen=True)
class ProcessKit:
    """`EngineKit` over two engines with ngram guesses, in a process each."""

    first: EngineProcess
    second: EngineProcess

    def submission(self, request_id: RequestId, shape: Shape) -> Submission:
        made = SamplingParams(temperature=0.0, max_tokens=shape.max_tokens, ignore_eos=True)
        prompt = repeating_prompt(shape.prompt_key, shape.num_prompt_tokens)
        return submission_of(request_id, prompt, made, shape.priority)


@contextmanager
def guessing_engines(logs: Path, **flags: Any) -> Iterator[ProcessKit]:
    """Two engines that guess by `NGRAM`, for as long as the context lasts. `flags`: as of `engine_argv`."""
    argv = engine_argv(speculative_config=json.dumps(NGRAM), **flags)
    started = [EngineProcess(argv, logs / f"{name}.log") for name in ("first", "second")]
    try:
        for engine in started:
            engine.wait()
        yield ProcessKit(*started)
    finally:
        for engine in started:
            engine.close()


@dataclass(frozen=True)
class Run:
    """What one request put out, and in which steps."""

    seen: Seen
    steps: tuple[tuple[int, ...], ...]
    """Tokens of each step, by stay."""


class Guessing(Comparison):
    """Of a prompt that repeats itself."""

    def __init__(
        self, kit: ProcessKit, params: Callable[[], SamplingParams], key: int = 2, num_prompt_tokens: int = 200
    ) -> None:
        super().__init__(cast("VllmKit", kit), key, num_prompt_tokens, params)  # it asks for no more than the port
        self._prompt = repeating_prompt(key, num_prompt_tokens)

    def run(self, hops: Sequence[int] = (), sabotage: Sabotage | None = None) -> Run:
        """As `migrated`, and tells the steps."""
        request_id = self.start()
        here, there = self.first, self.second
        ends = [0]
        for at in hops:
            self.pair.decode_until(here, request_id, at)
            assert not self.pair.is_finished(request_id), f"it finished before token {at}"
            self.pair.ferry(request_id, here, there, sabotage=sabotage, num_stages=1)
            ends.append(len(self.pair.outputs[request_id]))
            here, there = there, here
        self.pair.finish(here, request_id)
        lengths = self.steps(request_id)
        ends.append(len(lengths))
        stays = tuple(lengths[first:end] for first, end in pairwise(ends))
        return Run(self.seen(request_id), stays)

    def steps(self, request_id: RequestId) -> tuple[int, ...]:
        return tuple(len(output.token_ids) for output in self.pair.outputs[request_id])

    def add_others(self, num_first: int, num_second: int) -> list[RequestId]:
        added = [self.pair.add(self.first, Shape(90 + 30 * i, 60, prompt_key=30 + i)) for i in range(num_first)]
        return added + [
            self.pair.add(self.second, Shape(80 + 25 * i, 60, prompt_key=40 + i)) for i in range(num_second)
        ]


def flat(run: Run) -> tuple[int, ...]:
    return tuple(count for stay in run.steps for count in stay)
