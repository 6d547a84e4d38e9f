"""Do requests survive being thrown to and fro between two busy engines, with faults on the way? And is every block
there after?

1. Requests of several kinds run on both engines. 2. At random moments one is moved, or its migration breaks off
after the
reservation or after the stop, or its client leaves. 3. Every request that was not aborted has the tokens of an
undisturbed run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams

from instance.engine import Engine
from migration.types import Refusal, RequestId, StoppedRequest
from tests.support.asynchronous import shared_asynchronous_kit
from tests.support.pair import EnginePair, Refused
from tests.support.vllm_kit import VllmKit, prompt_of, shared_kit, submission_of

NUM_REQUESTS = 24
NUM_TOKENS = 60
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 21},
    {"temperature": 0.0, "frequency_penalty": 0.6, "logprobs": 1},
    {"temperature": 0.9, "seed": 22, "presence_penalty": 0.5, "top_p": 0.95},
)


def submission(request_id: RequestId, number: int) -> Any:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **KINDS[number % len(KINDS)])
    return submission_of(request_id, prompt_of(500 + number, 60 + 13 * number), params)


class _Traffic:
    """The world of the story: who runs where, and what has been done to them."""

    def __init__(self, kit: VllmKit, seed: int) -> None:
        self.random = random.Random(seed)
        self.pair = EnginePair(kit)
        self.where: dict[RequestId, Engine] = {}
        self.aborted: set[RequestId] = set()
        self.counts = {"moved": 0, "refused": 0, "broken off": 0, "aborted": 0}

    def other(self, engine: Engine) -> Engine:
        return self.pair.second if engine is self.pair.first else self.pair.first

    def running(self) -> list[RequestId]:
        return [i for i in self.where if not self.pair.is_finished(i) and i not in self.aborted]

    def step(self) -> None:
        for engine in (self.pair.first, self.pair.second):
            if engine.has_work():
                self.pair.step(engine)

    def disturb(self) -> None:
        live = [request_id for request_id in self.running() if len(self.pair.tokens(request_id)) < NUM_TOKENS - 8]
        if not live:
            return
        request_id = self.random.choice(live)
        match self.random.randrange(10):
            case 0:
                self.where[request_id].abort((request_id,))
                self.aborted.add(request_id)
                self.counts["aborted"] += 1
            case 1 | 2:
                self.break_off(request_id)
            case _:
                self.move(request_id)

    def move(self, request_id: RequestId) -> None:
        source = self.where[request_id]
        try:
            self.pair.ferry(request_id, source, self.other(source), num_stages=self.random.randrange(3))
        except Refused:
            self.counts["refused"] += 1
            return
        self.where[request_id] = self.other(source)
        self.counts["moved"] += 1

    def break_off(self, request_id: RequestId) -> None:
        source, destination = self.where[request_id], self.other(self.where[request_id])
        migration = self.pair.new_migration()
        reservation = destination.reserve(migration, self.pair.describe(source, request_id), 2)
        if isinstance(reservation, Refusal):
            self.counts["refused"] += 1
            return
        self.step()
        if not self.pair.is_finished(request_id) and self.random.random() < 0.5:
            assert isinstance(self.pair.stop(source, request_id), StoppedRequest)
            self.step()
            source.resume(request_id)
        destination.cancel(migration)
        self.counts["broken off"] += 1


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kit_of", [shared_kit, shared_asynchronous_kit])
def test_requests_survive_being_thrown_to_and_fro(kit_of: Callable[[], VllmKit], seed: int) -> None:
    kit = kit_of()
    world = _Traffic(kit, seed)
    numbers: dict[RequestId, int] = {}
    for number in range(NUM_REQUESTS):
        request_id = world.pair.new_id("thrown")
        engine = world.random.choice((world.pair.first, world.pair.second))
        assert engine.add(submission(request_id, number)) is None
        world.where[request_id], numbers[request_id] = engine, number
        for _ in range(world.random.randrange(6)):
            world.step()
            world.disturb()
    while world.running():
        world.step()
        if world.random.random() < 0.5:
            world.disturb()
    world.pair.drain()
    assert world.counts["moved"] > 20 and world.counts["broken off"] > 3, world.counts
    alone = EnginePair(kit)
    for request_id, number in numbers.items():
        if request_id not in world.aborted:
            again = alone.new_id()
            assert alone.first.add(submission(again, number)) is None
            alone.finish(alone.first, again)
            assert world.pair.tokens(request_id) == alone.tokens(again), f"request {number} was altered"
    alone.drain()
    alone.close()
    world.pair.close()
