"""Streams of output across repeats, reordering and changes of owner."""

from __future__ import annotations

import pytest

from instance.messages import OutputEntry
from migration.types import Epoch, InstanceId, RequestId
from orchestrator.gateway.relay import Owner, OwnerMoved, Relay

R = RequestId("r")
A: Owner = (InstanceId("a"), Epoch(1))
B: Owner = (InstanceId("b"), Epoch(1))


def tokens(offset: int, *ids: int, finish: int | None = None, extra: tuple[bytes, ...] = ()) -> OutputEntry:
    return OutputEntry("r", offset, ids, finish_reason=finish, extra=extra)


def relay() -> Relay:
    it = Relay()
    it.open(R, A)
    return it


def test_entries_in_order_pass_through_and_are_kept() -> None:
    it = relay()
    assert it.on_entries(A, (tokens(0, 7), tokens(1, 8, 9))).entries == (tokens(0, 7), tokens(1, 8, 9))
    assert it.tokens(R) == (7, 8, 9)
    it.check_integrity()


def test_an_entry_seen_before_is_dropped() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 7),))
    assert it.on_entries(A, (tokens(0, 7),)).entries == ()
    assert it.num_duplicates == 1
    assert it.tokens(R) == (7,)


def test_an_early_entry_is_held_until_the_gap_is_filled() -> None:
    it = relay()
    assert it.on_entries(B, (tokens(1, 8),)).entries == ()
    assert it.has_gap(R)
    assert it.on_entries(A, (tokens(0, 7),)).entries == (tokens(0, 7), tokens(1, 8))
    assert not it.has_gap(R)


def test_the_first_frame_of_the_destination_may_overtake_the_last_of_the_source() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 1),))
    ahead = it.on_entries(B, (tokens(2, 3),))
    assert ahead.moves == (OwnerMoved(R, A, B, 2),)
    late = it.on_entries(A, (tokens(1, 2),))
    assert late.entries == (tokens(1, 2), tokens(2, 3))
    assert late.moves == ()
    assert it.owner(R) == B


def test_an_announcement_changes_the_owner_before_its_first_token() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 1),))
    assert it.on_owner_changed(R, B, 1) == (OwnerMoved(R, A, B, 1),)
    assert it.owned_by(B) == (R,)
    assert it.on_owner_changed(R, A, 0) == (), "an older announcement changes nothing"
    assert it.owner(R) == B


def test_the_end_closes_the_stream_and_nothing_follows() -> None:
    it = relay()
    assert it.on_entries(A, (tokens(0, 1, finish=1), tokens(1, 2))).entries == (tokens(0, 1, finish=1),)
    assert R not in it
    assert it.on_entries(A, (tokens(0, 1, finish=1),)).entries == ()


def test_an_end_without_tokens_waits_for_the_tokens_before_it() -> None:
    it = relay()
    assert it.on_entries(A, (tokens(1, finish=2),)).entries == ()
    assert it.on_entries(A, (tokens(0, 5),)).entries == (tokens(0, 5), tokens(1, finish=2))


def test_a_partly_seen_entry_is_cut() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 1, 2),))
    assert it.on_entries(B, (tokens(1, 2, 3),)).entries == (tokens(2, 3),)
    assert it.tokens(R) == (1, 2, 3)


def test_a_partly_seen_entry_with_data_of_its_own_cannot_be_cut_and_is_dropped() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 1, 2),))
    assert it.on_entries(B, (tokens(1, 2, 3, extra=(b"x",)),)).entries == ()
    assert it.num_overlaps == 1


def test_an_end_that_comes_with_tokens_seen_before_still_ends_the_stream() -> None:
    it = relay()
    it.on_entries(A, (tokens(0, 1, 2),))
    assert it.on_entries(A, (tokens(0, 1, 2, finish=0),)).entries == (tokens(2, finish=0),)
    assert R not in it


def test_held_entries_are_bounded() -> None:
    it = Relay(max_held_entries=3)
    it.open(R, A)
    for offset in range(1, 6):
        it.on_entries(A, (tokens(offset, offset),))
        it.check_integrity()
    assert it.num_overflows == 2
    assert it.on_entries(A, (tokens(0, 0),)).entries == tuple(tokens(offset, offset) for offset in range(4))


def test_an_open_stream_cannot_start_again() -> None:
    it = relay()
    with pytest.raises(ValueError, match="the stream of r is open already"):
        it.open(R, B)
    assert it.owner(R) == A


def test_a_closed_stream_lets_nothing_through() -> None:
    it = relay()
    it.close(R)
    it.close(R)
    assert it.on_entries(A, (tokens(0, 1),)).entries == ()
    assert len(it) == 0
