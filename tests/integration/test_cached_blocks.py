"""Are the hashes that a real engine tells those that vLLM gives the prompt, and do they come and go as its blocks do?

What a gateway computes for a prompt must be what an instance tells of it; the shared suite (tests/contract) sees to the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from instance.messages import HASH_BYTES
from instance.vllm import compat
from instance.vllm.cached import CacheWatch, NotingMap, group_of
from instance.vllm.codec import decode_request
from instance.vllm.host import VllmEngine
from migration.types import RequestId
from tests.contract.cached_suite import Told
from tests.support.pair import EnginePair
from tests.support.vllm_kit import BLOCK_SIZE, VllmKit, prompt_of, shared_kit, start_engine, submission_of
from tests.support.windowed_model import MIXED, SLIDING, windowed_model_path

pytestmark = pytest.mark.timeout(300)

PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@pytest.fixture
def pair() -> Iterator[EnginePair]:
    pair = EnginePair(shared_kit())
    yield pair
    pair.drain()
    pair.close()


def pool_of(engine: VllmEngine) -> Any:
    return engine._scheduler.kv_cache_manager.block_pool


def hashes_of(prompt: list[int], cache_salt: str | None = None) -> list[bytes]:
    """As vLLM computes them for the request as it travels, and shortens them in its KV events."""
    submission = submission_of(RequestId("r"), prompt, PARAMS, cache_salt=cache_salt)
    hasher = get_request_block_hasher(BLOCK_SIZE, get_hash_fn_by_name("sha256"))
    request = Request.from_engine_core_request(decode_request(submission.payload), hasher)
    return [block_hash[-HASH_BYTES:] for block_hash in request.block_hashes]


def run(pair: EnginePair, engine: VllmEngine, prompt: list[int], cache_salt: str | None = None) -> None:
    request_id = pair.new_id()
    assert engine.add(submission_of(request_id, prompt, PARAMS, cache_salt=cache_salt)) is None
    pair.finish(engine, request_id)


@pytest.mark.parametrize("cache_salt", [None, "a tenant's"])
def test_a_prompt_is_told_by_the_hashes_that_vllm_gives_it(pair: EnginePair, cache_salt: str | None) -> None:
    engine, prompt = pair.kit.first, prompt_of(700, 5 * BLOCK_SIZE + 3)
    assert isinstance(engine, VllmEngine)
    told = Told(engine)
    run(pair, engine, prompt, cache_salt)
    assert told.hear()
    assert list(told.hashes) == hashes_of(prompt, cache_salt)
    assert set(hashes_of(prompt)).isdisjoint(hashes_of(prompt, "another tenant's"))


def test_two_requests_that_compute_the_same_block_leave_it_cached_until_the_second_copy_goes(pair: EnginePair) -> None:
    """vLLM keeps both copies under one hash: it is told once, and is gone with the last. A request for prompt logprobs
    reads nothing from the cache."""
    engine, prompt = pair.kit.first, prompt_of(701, 2 * BLOCK_SIZE + 3)
    assert isinstance(engine, VllmEngine)
    told = Told(engine)
    requests = [pair.new_id() for _ in range(2)]
    for request_id in requests:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
        assert engine.add(submission_of(request_id, prompt, params)) is None
    pair.finish(engine, *requests)
    assert told.hear()
    assert list(told.hashes) == hashes_of(prompt)
    pool = pool_of(engine)
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    assert len(cached) == 4
    for number, block_id in enumerate(cached):
        pool.evict_blocks({block_id})
        told.hear()
        left = {block.block_hash for block in pool.blocks if block.block_hash is not None}
        assert len(told.hashes) == len(left), f"after {number + 1} of {len(cached)}"
    assert told.hashes == {}


def test_before_somebody_asks_vllm_keeps_its_own_map(pair: EnginePair) -> None:
    """A reset makes a new one; ours is put in its place by the next question."""
    engine, prompt = pair.kit.second, prompt_of(702, 2 * BLOCK_SIZE + 3)
    assert isinstance(engine, VllmEngine)
    assert engine.reset_prefix_cache()
    assert type(pool_of(engine).cached_block_hash_to_block) is BlockHashToBlockMap
    run(pair, engine, prompt)
    changes = engine.take_cached_changes()
    assert changes is not None and changes.is_anew
    assert [block_hash for block_hash, _ in changes.changes] == hashes_of(prompt)
    assert type(pool_of(engine).cached_block_hash_to_block) is NotingMap
    request_id = pair.new_id()
    assert engine.add(submission_of(request_id, prompt, PARAMS)) is None
    pair.finish(engine, request_id)
    assert engine.take_cached_changes() is None, "its blocks were found in the map that was taken over"


def test_a_map_of_another_kind_is_left_alone(pair: EnginePair) -> None:
    """What a later vLLM may have in its place."""
    engine = pair.kit.first
    assert isinstance(engine, VllmEngine)
    pool = pool_of(engine)
    own = pool.cached_block_hash_to_block
    unknown: dict[bytes, object] = {}
    pool.cached_block_hash_to_block = unknown
    try:
        assert compat.why_cache_untold(engine._scheduler) == "vLLM's dict lacks _cache"
        watch = CacheWatch(engine._scheduler, BLOCK_SIZE)
        assert watch.take() is None and pool.cached_block_hash_to_block is unknown
    finally:
        pool.cached_block_hash_to_block = own
    assert compat.why_cache_untold(engine._scheduler) is None


def test_blocks_of_another_size_than_the_fleets_are_not_told(pair: EnginePair) -> None:
    engine = pair.kit.first
    assert isinstance(engine, VllmEngine)
    assert group_of(engine._scheduler, BLOCK_SIZE) == 0
    assert group_of(engine._scheduler, 2 * BLOCK_SIZE) is None
    assert CacheWatch(engine._scheduler, 2 * BLOCK_SIZE).take() is None


@pytest.mark.parametrize(
    ("layers", "flags", "is_told"),
    [
        (MIXED, {"num_gpu_blocks_override": 161}, True),
        (SLIDING, {"num_gpu_blocks_override": 161}, False),
        (None, {"no_enable_prefix_caching": True}, False),
    ],
    ids=["full attention beside windows", "windows only", "without a prefix cache"],
)
def test_full_attention_is_told_of_and_nothing_else(layers: str | None, flags: dict[str, Any], is_told: bool) -> None:
    engine = start_engine(model=None if layers is None else windowed_model_path(layers), **flags)
    pair = EnginePair(VllmKit(engine, engine))
    try:
        prompt = prompt_of(703, 8 * BLOCK_SIZE + 3)
        if is_told:
            told = Told(engine)
            run(pair, engine, prompt)
            assert told.hear()
            assert list(told.hashes) == hashes_of(prompt), "also those that every window has left"
        else:
            run(pair, engine, prompt)
            assert engine.take_cached_changes() is None
            assert type(pool_of(engine).cached_block_hash_to_block) is BlockHashToBlockMap
    finally:
        pair.drain()
        pair.close()
