"""Who has the beginning of a prompt, what an index of it keeps, and how much it counts."""

from __future__ import annotations

import pytest

from instance.messages import ALL_CACHED, CachedBlocks, StepTotals
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams, Rule
from orchestrator.policy.prefixes import PrefixIndex, hash_of
from orchestrator.policy.slo import Wanted
from orchestrator.policy.targets import Targets
from tests.support.idle_report import report
from tests.support.slow_prefixes import cached_blocks

A, B = InstanceId("a"), InstanceId("b")
MEMBERS = [(A, Epoch(1)), (B, Epoch(1))]
PROMPT = tuple(range(100, 120))


def index_of(*messages: CachedBlocks, max_hashes: int = 100) -> PrefixIndex:
    index = PrefixIndex(max_hashes)
    index.set_members(MEMBERS)
    for message in messages:
        assert index.on_cached(message)
        index.check_integrity(MEMBERS)
    return index


def saved(index: PrefixIndex, prefix: tuple[int, ...] = PROMPT) -> list[float] | None:
    found = index.saved_blocks(prefix)
    return None if found is None else found.tolist()


def test_a_prefix_ends_with_the_first_block_that_is_not_there() -> None:
    index = index_of(
        cached_blocks("a", ALL_CACHED, 9, [*PROMPT[:3], *PROMPT[4:7]]), cached_blocks("b", ALL_CACHED, 1, PROMPT[:5])
    )
    assert saved(index) == [3, 5]
    assert saved(index, PROMPT[:2]) == [2, 2]
    assert saved(index, PROMPT[4:6]) == [2, 1]
    assert saved(index, (1, *PROMPT)) is None
    assert saved(index, ()) is None


def test_what_goes_and_what_comes_is_known_from_then_on() -> None:
    index = index_of(cached_blocks("a", ALL_CACHED, 4, PROMPT[:4]))
    assert index.on_cached(cached_blocks("a", 4, 7, PROMPT[4:6], PROMPT[2:3]))
    assert saved(index) == [2, 0]
    assert index.on_cached(cached_blocks("a", 5, 9, PROMPT[2:3])), "who knows more than its beginning needs can take it"
    assert saved(index) == [6, 0]
    assert index.on_cached(cached_blocks("a", ALL_CACHED, 12, PROMPT[:1])), "all of it replaces what was known"
    assert saved(index) == [1, 0] and index.num_hashes == 1


@pytest.mark.parametrize(
    "message",
    [
        cached_blocks("a", 5, 9, [1]),
        cached_blocks("a", 2, 4, [1]),
        cached_blocks("a", ALL_CACHED, 3, [1]),
        cached_blocks("a", 4, 9, [1], epoch=2),
        cached_blocks("c", ALL_CACHED, 9, [1]),
        CachedBlocks("a", 1, 16, 4, 9, b"1234567"),
        CachedBlocks("a", 1, 16, 4, 9, b"", b"123"),
        CachedBlocks("a", 1, 0, 4, 9, b"12345678"),
        CachedBlocks("a", 1, 16, -2, 9, b"12345678"),
    ],
    ids=["gap", "old", "all-but-old", "epoch", "stranger", "added", "removed", "size", "begin"],
)
def test_what_is_missing_something_old_of_a_stranger_or_broken_changes_nothing(message: CachedBlocks) -> None:
    index = index_of(cached_blocks("a", ALL_CACHED, 4, PROMPT[:4]))
    assert not index.on_cached(message)
    index.check_integrity(MEMBERS)
    assert saved(index) == [4, 0] and index.cached_from(A) == 4 and index.num_hashes == 4


def test_the_next_subscription_asks_for_what_is_not_known() -> None:
    index = index_of()
    assert index.cached_from(A) == ALL_CACHED
    index.on_cached(cached_blocks("a", ALL_CACHED, 4, PROMPT))
    index.on_cached(cached_blocks("a", 6, 9))
    assert (index.cached_from(A), index.cached_from(B)) == (4, ALL_CACHED)
    index.set_members([(A, Epoch(2))])
    assert index.cached_from(A) == ALL_CACHED, "another incarnation has an empty cache"
    assert index.num_hashes == 0 and saved(index) is None


def test_who_leaves_is_forgotten_and_who_comes_gets_its_bit_and_nothing_else() -> None:
    index = index_of(cached_blocks("a", ALL_CACHED, 4, PROMPT[:4]), cached_blocks("b", ALL_CACHED, 4, PROMPT[:2]))
    index.set_members([(InstanceId("c"), Epoch(1)), (B, Epoch(1))])
    assert saved(index) == [0, 2] and index.num_hashes == 2
    assert index.on_cached(cached_blocks("c", ALL_CACHED, 4, PROMPT[:1]))
    assert saved(index) == [1, 2]
    index.clear()
    assert saved(index) is None and index.cached_from(B) == ALL_CACHED


def test_beyond_the_bound_the_oldest_of_the_largest_go() -> None:
    index = index_of(
        cached_blocks("a", ALL_CACHED, 8, range(8)), cached_blocks("b", ALL_CACHED, 2, [1, 2]), max_hashes=10
    )
    index.on_cached(cached_blocks("b", 2, 4, [8, 9]))
    assert [one for one in range(8) if saved(index, (one,)) == [1, 1 if one in {1, 2} else 0]] == [2, 3, 4, 5, 6, 7]
    assert saved(index, (1,)) == [0, 1] and saved(index, (9,)) == [0, 1] and index.num_hashes == 10


def test_what_prompts_begin_with_is_spared_once_and_then_has_to_be_asked_for_again() -> None:
    index = index_of(cached_blocks("a", ALL_CACHED, 10, range(10)), max_hashes=10)
    assert saved(index, (0, 1)) == [2, 0]
    index.on_cached(cached_blocks("a", 10, 12, [10, 11]))
    assert saved(index, (2,)) is None and saved(index, (3,)) is None
    assert index.saved_blocks((0, 1)) is not None
    for first in range(12, 40, 4):
        index.on_cached(cached_blocks("a", first, first + 4, range(first, first + 4)))
        index.check_integrity(MEMBERS)
    assert saved(index, (0,)) is None, "nobody has asked for it since"


def test_of_what_there_is_no_room_for_the_newest_are_taken() -> None:
    index = index_of(cached_blocks("a", ALL_CACHED, 30, range(30)), max_hashes=10)
    assert saved(index, (19,)) is None and saved(index, tuple(range(20, 30))) == [10, 0]
    assert index.on_cached(cached_blocks("b", ALL_CACHED, 30, range(100, 130)))
    assert saved(index, tuple(range(25, 30))) == [5, 0] and saved(index, tuple(range(125, 130))) == [0, 5]


def test_a_hash_is_the_last_bytes_of_vllms() -> None:
    assert hash_of(bytes(24) + bytes(range(1, 9))) == 0x0102030405060708
    index = index_of(CachedBlocks("a", 1, 16, ALL_CACHED, 1, bytes(range(1, 9))))
    assert saved(index, (hash_of(bytes(range(9))),)) == [1, 0]


# ---- the choice
def book_of(params: DispatchParams, **has: int) -> DispatchBook:
    """a has 100 blocks free, b 90; both have so many blocks of the prompt cached."""
    book = DispatchBook(params)
    book.set_members(MEMBERS)
    book.on_report(report("a", free_blocks=100), 0.0)
    book.on_report(report("b", free_blocks=90), 0.0)
    for name, num_blocks in has.items():
        book.on_cached(cached_blocks(name, ALL_CACHED, num_blocks, PROMPT[:num_blocks]))
    return book


def chosen(book: DispatchBook) -> Choice:
    choice = book.choose(21, 0.0, prefix=PROMPT)
    assert isinstance(choice, Choice)
    book.check_integrity()
    return choice


@pytest.mark.parametrize(
    ("weight", "has", "instance"),
    [
        (1.0, {"b": 11}, "b"),
        (1.0, {"b": 9}, "a"),
        (1.0, {"a": 2, "b": 11}, "a"),
        (0.0, {"b": 20}, "a"),
    ],
)
def test_a_block_that_is_saved_outweighs_a_block_that_is_free(
    weight: float, has: dict[str, int], instance: str
) -> None:
    book = book_of(DispatchParams(slow_start_s=0.0, prefix_weight=weight), **has)
    assert chosen(book).instance == instance


def test_of_equals_the_one_with_the_emptier_cache_is_chosen_so_that_an_idle_fleet_fills_all() -> None:
    book = DispatchBook(DispatchParams(slow_start_s=0.0))
    book.set_members(MEMBERS)
    for name in "ab":
        book.on_report(report(name), 0.0)
    book.on_cached(cached_blocks("a", ALL_CACHED, 20, range(500, 520)))
    assert chosen(book).instance == "b"
    book.on_cached(cached_blocks("b", ALL_CACHED, 20, range(600, 630)))
    assert chosen(book).instance == "a"


@pytest.mark.parametrize(
    ("more_running", "weight", "instance"), [(1, 1.0, "b"), (2, 1.0, "a"), (2, 4.0, "b"), (15, 4.0, "a")]
)
def test_what_is_cached_outweighs_the_requests_that_hold_as_many_blocks(
    more_running: int, weight: float, instance: str
) -> None:
    """Each that runs holds 19 blocks; memory is plentiful, and 20 of the 21 blocks of the prompt are cached."""
    book = DispatchBook(DispatchParams(slow_start_s=0.0, prefix_weight=weight))
    book.set_members(MEMBERS)
    for name, num_running in (("a", 5), ("b", 5 + more_running)):
        free = 10_000 - 19 * num_running
        book.on_report(report(name, total_blocks=10_000, free_blocks=free, num_running=num_running), 0.0)
    book.on_cached(cached_blocks("b", ALL_CACHED, 20, PROMPT))
    assert chosen(book).instance == instance


def test_the_reason_says_what_is_saved_and_the_whole_demand_counts_as_sent() -> None:
    book = book_of(DispatchParams(slow_start_s=0.0), b=15)
    choice = chosen(book)
    assert choice.reason == "score 84.00 highest of 2 (0 dispatched since its report, 15 blocks saved)"
    book.on_dispatched(choice.instance, 21, 0.0)
    assert book.view(0.0).instances[1].dispatched_blocks == 21
    assert chosen(book).instance == "a", "nine of 21 blocks more are used there: a prefix draws no herd"


def test_round_robin_and_a_weight_of_zero_ask_for_nothing_and_forget() -> None:
    book = book_of(DispatchParams(slow_start_s=0.0), b=15)
    assert (book.cached_from(A), book.cached_from(B), book.hashed_block_size) == (ALL_CACHED, 15, 16)
    for params in (DispatchParams(rule=Rule.ROUND_ROBIN), DispatchParams(prefix_weight=0.0)):
        book.set_params(params)
        book.on_cached(cached_blocks("a", ALL_CACHED, 3, PROMPT[:3]))
        assert (book.cached_from(B), book.hashed_block_size) == (None, None)
        assert "saved" not in chosen(book).reason
    book.set_params(DispatchParams())
    assert book.cached_from(B) == ALL_CACHED


def test_a_target_is_met_where_most_of_the_prompt_need_not_be_computed() -> None:
    """A step of 16 tokens takes 1 s here: the whole prompt 20 of them, a quarter of it five, which attend to all."""
    book = book_of(DispatchParams(slow_start_s=0.0), b=15)
    for row, name in enumerate("ab"):
        book.on_report(
            report(name, free_blocks=100 - 90 * row, step=1, max_step_tokens=16, steps=one_second_each()), 0.0
        )
    ttft = Targets(ttft_s=10.0)
    plain = book.choose(21, 0.0, (), Wanted(320, ttft))
    choice = book.choose(21, 0.0, (), Wanted(320, ttft), PROMPT)
    assert isinstance(plain, Choice) and isinstance(choice, Choice)
    assert plain.predicted is not None and choice.predicted is not None
    assert (plain.instance, plain.predicted.meets) == ("a", False)
    assert (choice.instance, choice.predicted.meets) == ("b", True)
    assert plain.predicted.ttft_s / 4 < choice.predicted.ttft_s < plain.predicted.ttft_s / 4 * 1.05


def one_second_each() -> StepTotals:
    """A hundred steps of 16 prompt tokens."""
    return StepTotals(num_steps=100, num_prefill_tokens=1600, busy_s=100.0)
