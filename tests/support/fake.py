"""How does a test make fake engines that can push blocks to each other?"""

from __future__ import annotations

import time
from collections.abc import Callable

from instance.fake import FakeEngine
from instance.fake_model import FakeRequest, encode_fake
from instance.fake_scheduler import FakeConfig
from instance.types import Submission
from migration.transports import CarrierParams, KVStore, MemoryHub, RankMover, open_receiver, open_sender
from migration.types import RequestId
from tests.support.pair import Shape

TOKEN = b"test"


def memory_mover(name: str, hub: MemoryHub) -> Callable[[KVStore], RankMover]:
    params = CarrierParams(chunk_bytes=512)

    def make(store: KVStore) -> RankMover:
        receiver = open_receiver(store, f"memory://{name}", TOKEN, params, hub)
        return RankMover(open_sender(store, TOKEN, params, hub), receiver, push_timeout_s=5.0, num_threads=2)

    return make


def prompt_of(shape: Shape) -> tuple[int, ...]:
    return tuple((shape.prompt_key * 7919 + i * i * 31 + i) % 32_000 for i in range(shape.num_prompt_tokens))


class FakeKit:
    """Two fake engines over one memory hub."""

    def __init__(self, config: FakeConfig) -> None:
        hub = MemoryHub()
        self.first = FakeEngine(config, memory_mover("first", hub))
        self.second = FakeEngine(config, memory_mover("second", hub))

    def submission(self, request_id: RequestId, shape: Shape) -> Submission:
        return Submission(
            request_id=request_id,
            external_id=f"client-{request_id}",
            priority=shape.priority,
            num_prompt_tokens=shape.num_prompt_tokens,
            max_tokens=shape.max_tokens,
            payload=encode_fake(FakeRequest(prompt_of(shape), shape.max_tokens, arrived_s=time.time())),
        )

    def close(self) -> None:
        self.first.close()
        self.second.close()
