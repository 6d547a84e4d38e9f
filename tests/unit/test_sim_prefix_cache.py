"""What does a simulated prefix cache find, and by which hashes is it told of?"""

from __future__ import annotations

import pytest

from instance.types import CachedChanges, Submission
from migration.types import RequestId
from orchestrator.policy.prefixes import hash_of
from orchestrator.sim.copying import LinkParams, Links, SimMover
from orchestrator.sim.engine import Ask, LengthEngine, encode
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.prefix_cache import NOTHING, PrefixCache, prefix_hashes
from orchestrator.sim.steptime import StepTimes

BLOCK, ID = 16, 512


def test_prompts_that_begin_alike_have_the_same_hashes_up_to_there() -> None:
    one, other = (prefix_hashes(ids, ID, 2_000, BLOCK) for ids in ((7, 8, 9, 10), (7, 8, 11, 10)))
    assert len(one) == len(other) == 2_000 // BLOCK
    assert one[: 1_024 // BLOCK] == other[: 1_024 // BLOCK]
    assert not set(one[1_024 // BLOCK :]) & set(other[1_024 // BLOCK :]), (
        "the fourth id is the same, what is before not"
    )
    assert len(set(one)) == len(one) and all(0 <= block < 1 << 64 for block in one)


def test_only_whole_blocks_that_the_ids_tell_of_are_known() -> None:
    assert len(prefix_hashes((1, 2), ID, 5_000, BLOCK)) == 2 * ID // BLOCK
    assert len(prefix_hashes((1, 2), ID, 600, BLOCK)) == 600 // BLOCK
    one, other = (prefix_hashes(ids, ID, 1_024, 48) for ids in ((1, 2), (1, 3)))
    assert one[:10] == other[:10]
    assert one[10] != other[10], "tokens 480 to 528 are of both ids"
    assert prefix_hashes((), ID, 100, BLOCK) == prefix_hashes((1,), ID, BLOCK - 1, BLOCK) == ()


def test_a_run_of_cached_blocks_ends_where_one_is_missing() -> None:
    cache = PrefixCache(BLOCK, ID)
    chain = cache.chain("one", (1,), 512)
    cache.add(chain, 0, 2 * BLOCK)
    cache.add(chain, 3 * BLOCK, 5 * BLOCK)
    found = cache.find(cache.chain("another", (1,), 512), 512)
    assert found.blocks == chain.known[:2] and found.num_held == 2
    assert cache.find(cache.chain("a third", (2,), 512), 512) == NOTHING
    assert cache.find(cache.chain("another", (1,), 512), 2 * BLOCK - 1).blocks == chain.known[:1]


def test_what_is_beyond_the_prompt_is_found_by_the_request_itself_only() -> None:
    cache = PrefixCache(BLOCK, ID)
    chain = cache.chain("one", (1,), 100)
    cache.add(chain, 0, 12 * BLOCK)
    assert cache.release(chain) == 0
    assert cache.find(cache.chain("one", (1,), 100), 1_000).num_free == 12
    assert len(cache.find(cache.chain("another", (1,), 100), 1_000).blocks) == 100 // BLOCK


def test_a_cache_of_which_somebody_holds_a_part_is_not_reset() -> None:
    cache = PrefixCache(BLOCK, ID)
    chain = cache.chain("one", (1,), 512)
    cache.add(chain, 0, 2 * BLOCK)
    assert not cache.reset()
    cache.release(chain)
    assert cache.find(chain, 512).num_free == 2
    assert cache.reset()
    assert cache.find(chain, 512) == NOTHING
    assert cache.take_changes() == CachedChanges((), is_anew=True)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_an_engine_tells_of_its_blocks_by_the_hashes_that_a_gateway_sends(prefix_cache: bool) -> None:
    async def tell() -> None:
        config = LengthConfig(prefix_cache=prefix_cache)
        engine = LengthEngine(config, StepTimes(), SimMover("one", Links(LinkParams()), 1))
        assert engine.take_cached_changes() == (CachedChanges((), is_anew=True) if prefix_cache else None)
        engine.add(Submission(RequestId("r"), "r", 0, 700, 1, encode(Ask(700, 1, 1, prefix_ids=(5, 6)))))
        engine.step()
        told = engine.take_cached_changes()
        if not prefix_cache:
            assert told is None
            return
        assert told is not None and all(is_cached for _, is_cached in told.changes)
        assert tuple(hash_of(block) for block, _ in told.changes) == prefix_hashes((5, 6), ID, 700, BLOCK)

    run_jumping(tell())
