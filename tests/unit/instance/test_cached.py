"""Who is told what of an instance's prefix cache, and what is told anew?"""

from __future__ import annotations

import pytest

from instance.cached import CachedBook, CacheNotes
from instance.messages import ALL_CACHED, CachedBlocks
from instance.report import MAX_SUBSCRIBERS
from instance.types import CachedChanges


def h(number: int) -> bytes:
    return number.to_bytes(8, "big")


def changes(**numbers: bool) -> CachedChanges:
    """`_1=True`: block 1 has appeared."""
    return CachedChanges(tuple((h(int(name[1:])), is_cached) for name, is_cached in numbers.items()))


def anew(*numbers: int) -> CachedChanges:
    return CachedChanges(tuple((h(number), True) for number in numbers), is_anew=True)


def all_of(*numbers: int) -> bytes:
    return b"".join(h(number) for number in numbers)


def book_of(*numbers: int, max_hashes: int = 100) -> CachedBook:
    book = CachedBook("i0", 3, 16, max_hashes)
    book.note(anew(*numbers))
    return book


def only(book: CachedBook) -> CachedBlocks:
    """The one message that is due, to "a"."""
    book.check_integrity()
    ((address, message),) = book.take_due()
    assert address == "a"
    return message


def told(book: CachedBook) -> CachedBook:
    """With a subscriber who was told everything."""
    book.subscribe("a", ALL_CACHED)
    assert only(book).begin == ALL_CACHED
    return book


# ---- the agent's half
def test_who_knows_nothing_is_told_all_in_order_of_appearance_and_then_nothing() -> None:
    book = book_of(5, 2, 9)
    book.subscribe("a", ALL_CACHED)
    assert only(book) == CachedBlocks("i0", 3, 16, ALL_CACHED, 1, all_of(5, 2, 9))
    assert book.take_due() == ()


def test_an_empty_cache_is_told_too_so_that_its_subscriber_stops_asking_for_all() -> None:
    book = book_of()
    book.subscribe("a", ALL_CACHED)
    assert only(book).added == b""


def test_nothing_is_told_before_the_engine_has_said_something() -> None:
    book = CachedBook("i0", 3, 16)
    book.subscribe("a", ALL_CACHED)
    book.note(None)
    assert book.take_due() == ()


def test_changes_are_told_once_with_the_state_after_the_last_of_them() -> None:
    book = told(book_of(1, 2))
    book.note(changes(_3=True, _1=False))
    book.note(changes(_4=True, _3=False))
    assert only(book) == CachedBlocks("i0", 3, 16, 1, 5, all_of(4), all_of(3, 1))
    assert book.take_due() == ()


def test_one_that_comes_back_is_told_as_the_latest() -> None:
    book = told(book_of(1, 2))
    book.note(changes(_1=False, _3=True))
    book.note(changes(_1=True))
    assert (only(book).added, only_all(book)) == (all_of(3, 1), all_of(2, 3, 1))


def only_all(book: CachedBook) -> bytes:
    book.subscribe("a", ALL_CACHED)
    return only(book).added


def test_what_is_no_change_is_not_counted() -> None:
    book = told(book_of(1))
    book.note(changes(_1=True, _7=False))
    assert book.take_due() == ()


def test_a_subscriber_who_has_not_heard_the_last_message_hears_of_it_again() -> None:
    book = told(book_of(1))
    book.note(changes(_2=True))
    lost = only(book)
    book.note(changes(_3=True))
    assert only(book).begin == lost.end
    book.subscribe("a", lost.begin)
    assert (again := only(book)).begin == lost.begin and again.added == all_of(2, 3)


def test_renewing_what_is_known_sends_nothing() -> None:
    book = told(book_of(1))
    book.subscribe("a", 1)
    assert book.take_due() == ()


def test_who_is_behind_the_log_is_told_all() -> None:
    book = told(book_of(1, max_hashes=3))
    book.note(changes(_2=True, _3=True, _4=True))
    book.subscribe("a", 1)
    assert only(book).begin == 1, "the log still reaches back"
    book.note(changes(_1=False))
    book.subscribe("a", 1)
    assert only(book) == CachedBlocks("i0", 3, 16, ALL_CACHED, 5, all_of(2, 3, 4))


def test_after_a_reset_everybody_is_told_all() -> None:
    book = told(book_of(1, 2))
    book.subscribe("b", 1)
    book.note(anew(7))
    assert dict(book.take_due()) == dict.fromkeys("ab", CachedBlocks("i0", 3, 16, ALL_CACHED, 2, all_of(7)))


def test_of_more_than_fit_into_a_message_the_latest_are_told() -> None:
    book = book_of(1, 2, max_hashes=3)
    book.note(changes(_3=True, _4=True))
    assert only_all(book) == all_of(2, 3, 4)


@pytest.mark.parametrize("number", [2, 10**15, -2, -(10**15)])
def test_a_number_that_was_never_counted_here_is_worth_nothing(number: int) -> None:
    book = told(book_of(1))
    book.subscribe("a", number)
    assert only(book).begin == ALL_CACHED


def test_who_wants_none_or_has_gone_is_told_nothing() -> None:
    book = book_of(1)
    for address in ("a", "b", "c"):
        book.subscribe(address, ALL_CACHED)
    book.subscribe("b", None)
    book.keep(("a", "b", "stranger"))
    assert only(book).added == all_of(1)
    assert book.is_wanted
    book.keep(())
    assert not book.is_wanted


def test_beyond_the_bound_the_subscriber_that_was_not_renewed_for_longest_leaves() -> None:
    book = book_of(1)
    for number in range(MAX_SUBSCRIBERS):
        book.subscribe(f"s{number}", ALL_CACHED)
    book.subscribe("s0", ALL_CACHED)
    book.subscribe("one more", ALL_CACHED)
    book.check_integrity()
    addresses = {address for address, _ in book.take_due()}
    assert len(addresses) == MAX_SUBSCRIBERS
    assert "s0" in addresses and "s1" not in addresses


# ---- the engine's half
def test_notes_begin_with_all_that_is_there_and_go_on_with_changes_in_order() -> None:
    notes = CacheNotes()
    notes.note(h(1), True)
    assert notes.take(lambda: [h(1)]) == anew(1), "nobody had asked yet"
    assert notes.take(lambda: [h(1)]) is None
    notes.note(h(2), True)
    notes.note(h(1), False)
    notes.note(h(2), False)
    assert notes.take(lambda: []) == CachedChanges(((h(2), True), (h(1), False), (h(2), False)))


def test_more_changes_than_are_kept_are_told_as_all_that_is_there() -> None:
    notes = CacheNotes(max_changes=2)
    notes.take(lambda: [])
    for number in range(3):
        notes.note(h(number), True)
    assert notes.is_void
    notes.note(h(3), True)
    assert notes.take(lambda: map(h, range(4))) == anew(0, 1, 2, 3)
    notes.note(h(4), True)
    assert notes.take(lambda: []) == changes(_4=True)


def test_after_a_reset_all_is_told() -> None:
    notes = CacheNotes()
    notes.take(lambda: [h(1)])
    notes.note(h(2), True)
    notes.void()
    assert notes.take(lambda: []) == anew()
