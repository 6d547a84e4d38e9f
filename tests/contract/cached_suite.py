"""What must an engine with a prefix cache tell of it? A suite beside `engine_suite`, with the same fixture `pair`."""

from __future__ import annotations

from instance.engine import Engine
from instance.messages import HASH_BYTES
from tests.contract.engine_suite_ends import a_large_share_of
from tests.support.pair import EnginePair, Shape


class Told:
    """What an engine has told of its prefix cache since it was emptied."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        assert engine.reset_prefix_cache()
        self.hashes: dict[bytes, None] = {}
        assert self.hear()
        assert self.hashes == {}, "a reset leaves nothing"

    def hear(self) -> bool:
        """Whether there was news."""
        changes = self._engine.take_cached_changes()
        if changes is None:
            return False
        if changes.is_anew:
            self.hashes.clear()
        for block_hash, is_cached in changes.changes:
            assert len(block_hash) == HASH_BYTES
            assert is_cached == (block_hash not in self.hashes), "it is no change"
            if is_cached:
                self.hashes[block_hash] = None
            else:
                del self.hashes[block_hash]
        return True


class CachedContract:
    """Subclass with a fixture `pair`, of engines that cache prefixes."""

    def test_the_full_blocks_of_a_prompt_are_told_once(self, pair: EnginePair) -> None:
        size, told = pair.first.facts.block_size, Told(pair.first)
        shape = Shape(4 * size + 3, 2, prompt_key=600)
        pair.run_alone(pair.first, shape)
        assert told.hear() and len(told.hashes) == 4
        assert not told.hear()
        pair.run_alone(pair.first, shape)
        assert not told.hear(), "what is found in the cache is not told again"

    def test_a_block_that_decoding_fills_is_told(self, pair: EnginePair) -> None:
        size, told = pair.first.facts.block_size, Told(pair.first)
        request = pair.add(pair.first, Shape(2 * size - 3, 8, prompt_key=601))
        pair.decode_until(pair.first, request, 1)
        assert told.hear() and len(told.hashes) == 1
        pair.finish(pair.first, request)
        assert told.hear() and len(told.hashes) == 2

    def test_engines_name_a_prompt_alike_and_other_prompts_otherwise(self, pair: EnginePair) -> None:
        size, told = pair.first.facts.block_size, (Told(pair.first), Told(pair.second))
        shape = Shape(3 * size + 1, 2, prompt_key=602)
        pair.run_alone(pair.first, shape)
        pair.run_alone(pair.second, shape)
        assert all(one.hear() for one in told)
        assert list(told[0].hashes) == list(told[1].hashes), "in order, from the first block on"
        pair.run_alone(pair.second, Shape(3 * size + 1, 2, prompt_key=603))
        assert told[1].hear() and len(told[1].hashes) == 6

    def test_what_is_evicted_is_told(self, pair: EnginePair) -> None:
        engine, told = pair.first, Told(pair.first)
        num_tokens = a_large_share_of(engine)
        pair.run_alone(engine, Shape(num_tokens, 2, prompt_key=604))
        told.hear()
        first = set(told.hashes)
        assert len(first) == num_tokens // engine.facts.block_size
        for key in range(605, 609):
            pair.run_alone(engine, Shape(num_tokens, 2, prompt_key=key))
            told.hear()
            assert len(told.hashes) <= engine.facts.total_blocks
        assert not first & told.hashes.keys()
        assert len(told.hashes) > len(first), "those of others are there"

    def test_a_reset_is_told_and_what_comes_after_it(self, pair: EnginePair) -> None:
        size, told = pair.first.facts.block_size, Told(pair.first)
        shape = Shape(2 * size + 1, 2, prompt_key=610)
        pair.run_alone(pair.first, shape)
        assert told.hear()
        before = list(told.hashes)
        assert pair.first.reset_prefix_cache()
        assert told.hear() and told.hashes == {}
        pair.run_alone(pair.first, shape)
        assert told.hear() and list(told.hashes) == before
        assert pair.first.reset_prefix_cache()
        pair.run_alone(pair.first, shape)
        assert told.hear() and list(told.hashes) == before, "also where nobody asked in between"

    def test_a_moved_request_brings_its_blocks_into_the_cache_of_the_destination(self, pair: EnginePair) -> None:
        size, here, there = pair.first.facts.block_size, Told(pair.first), Told(pair.second)
        request = pair.add(pair.first, Shape(3 * size + 5, 60, prompt_key=611))
        pair.decode_until(pair.first, request, 8)
        assert here.hear() and len(here.hashes) == 3
        prompt = list(here.hashes)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        there.hear()
        assert there.hashes == {}, "what is only reserved is not there yet"
        pair.second.cancel(migration)
        pair.ferry(request, pair.first, pair.second)
        assert there.hear() and list(there.hashes)[:3] == prompt

    def test_as_much_is_found_as_was_told(self, pair: EnginePair) -> None:
        size, there = pair.first.facts.block_size, Told(pair.second)
        pair.run_alone(pair.second, Shape(4 * size + 5, 2, prompt_key=612))
        assert there.hear() and len(there.hashes) == 4
        request = pair.add(pair.first, Shape(4 * size + 5, 30, prompt_key=612))
        pair.decode_until(pair.first, request, 2)
        assert pair.ferry(request, pair.first, pair.second).num_cached_tokens == 4 * size
