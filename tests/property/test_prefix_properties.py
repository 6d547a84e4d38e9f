"""The index of cached prefixes against one set an instance, and whatever is lost, repeated or late on the way to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.messages import ALL_CACHED, CachedBlocks
from migration.types import Epoch, InstanceId
from orchestrator.policy.prefixes import PrefixIndex
from tests.support.slow_prefixes import SlowIndex, cached_blocks

NAMES = tuple("abcdefghijkl")
"""More than the bits of a byte."""
HASHES = tuple(2**63 + number for number in range(12))


class Cache:
    """An instance's prefix cache that tells its changes as the protocol says, from any of them on."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.epoch = name, epoch
        self.hashes: dict[int, None] = {}
        self.changed: list[int] = []

    def change(self, one: int) -> None:
        if one in self.hashes:
            del self.hashes[one]
        else:
            self.hashes[one] = None
        self.changed.append(one)

    def tell(self, begin: int, end: int | None = None) -> CachedBlocks:
        """Only the whole of it can be told up to before now: a message has the state after its last change."""
        if begin == ALL_CACHED:
            return cached_blocks(self.name, begin, len(self.changed), self.hashes, (), self.epoch)
        touched = dict.fromkeys(self.changed[begin:])
        added = [one for one in touched if one in self.hashes]
        removed = [one for one in touched if one not in self.hashes]
        return cached_blocks(self.name, begin, len(self.changed), added, removed, self.epoch)


def members_of(caches: dict[str, Cache]) -> list[tuple[InstanceId, Epoch]]:
    return [(InstanceId(name), Epoch(cache.epoch)) for name, cache in caches.items()]


def act(
    rng: random.Random, caches: dict[str, Cache], index: PrefixIndex, said: list[CachedBlocks]
) -> CachedBlocks | None:
    """One thing happens; what is heard of it by the index, if anything."""
    if not caches or rng.random() < 0.04:
        name = rng.choice(NAMES)
        caches.pop(name, None)
        if rng.random() < 0.8:
            caches[name] = Cache(name, rng.getrandbits(40))  # no epoch is given twice, so late messages are told apart
        index.set_members(members_of(caches))
        return None
    cache = rng.choice(list(caches.values()))
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 6)):
            cache.change(rng.choice(HASHES))
        return None
    if said and rng.random() < 0.2:
        return rng.choice(said)  # again, or too late
    known = index.cached_from(InstanceId(cache.name))
    begin = known if rng.random() < 0.6 else rng.randint(ALL_CACHED, len(cache.changed))
    said.append(cache.tell(begin))
    return said[-1] if rng.random() < 0.8 else None  # lost


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_the_index_finds_what_a_set_for_each_instance_finds(seed: int) -> None:
    rng = random.Random(seed)
    caches: dict[str, Cache] = {}
    said: list[CachedBlocks] = []
    index, slow = PrefixIndex(), SlowIndex()
    for _ in range(150):
        heard = act(rng, caches, index, said)
        slow.set_members([(name, cache.epoch) for name, cache in caches.items()])
        if heard is not None:
            index.on_cached(heard)
            slow.on_cached(heard)
        index.check_integrity(members_of(caches))
        prefix = tuple(rng.sample(HASHES, rng.randint(0, 6)))
        saved = index.saved_blocks(prefix)
        expected = [slow.saved_blocks(name, prefix) for name in caches]
        assert ([0] * len(caches) if saved is None else list(saved)) == expected
        assert (saved is None) == (not any(expected))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_one_subscription_that_is_answered_puts_right_whatever_was_lost(seed: int) -> None:
    rng = random.Random(seed)
    caches: dict[str, Cache] = {}
    said: list[CachedBlocks] = []
    index = PrefixIndex()
    for _ in range(80):
        heard = act(rng, caches, index, said)
        if heard is not None:
            index.on_cached(heard)
    for cache in caches.values():
        index.on_cached(cache.tell(index.cached_from(InstanceId(cache.name))))
    for one in HASHES:
        saved = index.saved_blocks([one])
        has = [one in cache.hashes for cache in caches.values()]
        assert ([False] * len(has) if saved is None else list(saved)) == has


def test_control_a_lost_message_leaves_the_index_wrong_until_then() -> None:
    cache, index = Cache("a", 1), PrefixIndex()
    index.set_members(members_of({"a": cache}))
    assert index.on_cached(cache.tell(ALL_CACHED))
    cache.change(HASHES[0])
    cache.tell(0)
    cache.change(HASHES[1])
    assert not index.on_cached(cache.tell(1)), "there is something before it"
    assert index.saved_blocks(HASHES[:1]) is None
    assert index.on_cached(cache.tell(index.cached_from(InstanceId("a"))))
    assert index.saved_blocks(HASHES[:2]) == pytest.approx([2.0])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_however_much_instances_have_the_index_keeps_within_its_bound(seed: int, max_hashes: int) -> None:
    """And never says that somebody has what it has not."""
    rng = random.Random(seed)
    caches: dict[str, Cache] = {}
    said: list[CachedBlocks] = []
    index, slow = PrefixIndex(max_hashes), SlowIndex()
    for _ in range(100):
        heard = act(rng, caches, index, said)
        slow.set_members([(name, cache.epoch) for name, cache in caches.items()])
        if heard is not None:
            index.on_cached(heard)
            slow.on_cached(heard)
        index.check_integrity(members_of(caches))
        assert index.num_hashes <= max_hashes
        assert index.num_hashes == min(index.num_hashes, sum(map(len, slow.hashes.values())))
        prefix = tuple(rng.sample(HASHES, rng.randint(1, 4)))
        saved = index.saved_blocks(prefix)
        for row, name in enumerate(caches):
            assert saved is None or saved[row] <= slow.saved_blocks(name, prefix)
