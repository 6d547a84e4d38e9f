"""Does every subscriber know what is cached, whatever is lost, repeated or late? Against sets kept by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instance.cached import CachedBook, CacheNotes
from instance.messages import ALL_CACHED, CachedBlocks
from instance.types import CachedChanges
from tests.support.known_blocks import KnownBlocks

NUM_BLOCKS = 6
"""As many as a message holds, so that none is left out; more changes than the log keeps."""


def h(number: int) -> bytes:
    return number.to_bytes(8, "big")


BLOCK = st.integers(0, NUM_BLOCKS - 1)
CHANGES = st.lists(st.tuples(BLOCK, st.booleans()), max_size=8)
WHICH = st.integers(0, 1 << 16)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("change"), CHANGES),
        st.tuples(st.just("anew"), st.sets(BLOCK)),
        st.tuples(st.just("send"), st.none()),
        st.tuples(st.just("deliver"), WHICH),
        st.tuples(st.just("deliver the last"), WHICH),
        st.tuples(st.just("subscribe"), st.none()),
        st.tuples(st.just("hear the subscription"), WHICH),
    ),
    max_size=60,
)


class World:
    """One instance, one subscriber, and all that was ever said: each message may come never, late, or many times."""

    def __init__(self, log: int) -> None:
        self.book = CachedBook("i0", 1, 16, max_hashes=log)
        self.cached: set[bytes] = set()
        self.after: dict[int, set[bytes]] = {}
        """What was cached when the messages that end there were made."""
        self.known = KnownBlocks()
        self.said: list[CachedBlocks] = []
        self.asked: list[int] = []
        self.note(CachedChanges((), is_anew=True))

    def note(self, changes: CachedChanges) -> None:
        if changes.is_anew:
            self.cached = set()
        for block_hash, is_cached in changes.changes:
            (self.cached.add if is_cached else self.cached.discard)(block_hash)
        self.book.note(changes)

    def send(self) -> None:
        for address, message in self.book.take_due():
            assert address == "a"
            self.said.append(message)
            self.after[message.end] = set(self.cached)

    def deliver(self, index: int) -> None:
        if self.said:
            self.known.hear(self.said[index % len(self.said)])

    def hear_subscription(self, index: int) -> None:
        if self.asked:
            self.book.subscribe("a", self.asked[index % len(self.asked)])

    def check(self) -> None:
        self.book.check_integrity()
        if self.known.cached_from != ALL_CACHED:
            assert self.known.hashes == self.after[self.known.cached_from]


@given(log=st.sampled_from([NUM_BLOCKS, 12, 1000]), steps=STEPS)
def test_a_subscriber_knows_the_cache_as_it_was_and_after_one_renewal_as_it_is(log: int, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    world = World(log)
    for what, value in steps:
        match what:
            case "change":
                world.note(CachedChanges(tuple((h(number), is_cached) for number, is_cached in value)))
            case "anew":
                world.note(CachedChanges(tuple((h(number), True) for number in value), is_anew=True))
            case "send":
                world.send()
            case "deliver":
                world.deliver(value)
            case "deliver the last":
                world.deliver(-1)
            case "subscribe":
                world.asked.append(world.known.cached_from)
            case "hear the subscription":
                world.hear_subscription(value)
        world.check()
    num_said = len(world.said)
    world.book.subscribe("a", world.known.cached_from)
    world.send()
    assert len(world.said) <= num_said + 1
    if len(world.said) > num_said:
        world.deliver(-1)
    assert world.known.hashes == world.cached


@given(steps=st.lists(st.one_of(st.tuples(BLOCK, st.booleans()), st.just("reset"), st.just("take")), max_size=60))
def test_what_notes_tell_adds_up_to_what_is_there(steps: list[object]) -> None:
    notes, cached, heard = CacheNotes(max_changes=4), dict[bytes, None](), set[bytes]()

    def take() -> None:
        changes = notes.take(lambda: cached)
        if changes is not None and changes.is_anew:
            heard.clear()
        for block_hash, is_cached in () if changes is None else changes.changes:
            (heard.add if is_cached else heard.discard)(block_hash)
        assert heard == set(cached)

    for step in steps:
        match step:
            case (int(number), bool(is_cached)):
                if is_cached:
                    cached[h(number)] = None
                else:
                    cached.pop(h(number), None)
                notes.note(h(number), is_cached)
            case "reset":
                cached.clear()
                notes.void()
            case "take":
                take()
    take()
