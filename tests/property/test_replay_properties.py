"""Is every frame taken exactly once, in whatever order and however often it comes? Against a plain set."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from instance.replay import MAX_SESSIONS, STAMP_BYTES, WINDOW_FRAMES, ReplayGuard, Session

WINDOW = 16


def stamps_of(session: Session, num_frames: int) -> list[bytes]:
    return [session.stamp() for _ in range(num_frames)]


def number_of(stamp: bytes) -> int:
    return int.from_bytes(stamp[8:], "big")


SAID_AGAIN = st.lists(st.tuples(st.integers(0, 3), st.integers(0, WINDOW - 1)), max_size=150)
"""(sender, frame) pairs."""


@given(order=st.permutations([(sender, frame) for sender in range(4) for frame in range(WINDOW)]), again=SAID_AGAIN)
def test_any_interleaving_with_repetitions_delivers_each_frame_exactly_once(
    order: list[tuple[int, int]], again: list[tuple[int, int]]
) -> None:
    """As many frames a session as the window has, so that none is ever too old."""
    sent = [stamps_of(Session(), WINDOW) for _ in range(4)]
    guard = ReplayGuard(window_frames=WINDOW)
    heard = [*order[::2], *again, *order[1::2], *again, *order]
    taken = [pair for pair in heard if guard.admit(sent[pair[0]][pair[1]])]
    guard.check_integrity()
    assert sorted(taken) == sorted(order), "each once, none lost"
    assert taken == list(dict.fromkeys(heard)), "and the first time it came"


@given(numbers=st.lists(st.integers(0, 60), max_size=200))
def test_what_is_taken_is_new_and_not_older_than_the_window(numbers: list[int]) -> None:
    sent, guard = stamps_of(Session(), 61), ReplayGuard(window_frames=WINDOW)
    seen: set[int] = set()
    for number in numbers:
        is_fresh = number not in seen and number > max(seen, default=0) - WINDOW
        assert guard.admit(sent[number]) is is_fresh
        guard.check_integrity()
        if is_fresh:
            seen.add(number)


@given(numbers=st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_no_number_a_member_gone_mad_may_write_costs_memory_or_raises(numbers: list[int]) -> None:
    guard, name = ReplayGuard(), Session().stamp()[:8]
    for number in numbers:
        guard.admit(name + number.to_bytes(8, "big"))
        guard.check_integrity()
    assert guard.num_sessions <= 1


@given(speakers=st.lists(st.integers(0, 6), max_size=100))
def test_beyond_the_bound_the_session_that_has_been_silent_longest_is_forgotten(speakers: list[int]) -> None:
    sessions, guard = [Session() for _ in range(7)], ReplayGuard(max_sessions=3)
    lately: list[int] = []
    for speaker in speakers:
        stamp = sessions[speaker].stamp()
        assert guard.admit(stamp), "a living member is never silenced"
        lately = [*(one for one in lately if one != speaker), speaker][-3:]
        assert not guard.admit(stamp)
        guard.check_integrity()
    assert guard.num_sessions == len(lately)


def test_a_repetition_keeps_no_session_alive() -> None:
    old, guard = Session().stamp(), ReplayGuard(max_sessions=2)
    assert guard.admit(old)
    assert guard.admit(Session().stamp())
    assert not guard.admit(old)
    assert guard.admit(Session().stamp())
    assert guard.admit(old), "it was forgotten: this is the one replay that is taken"


def test_sessions_and_stamps_differ() -> None:
    session = Session()
    stamps = [*stamps_of(session, 1000), *(Session().stamp() for _ in range(1000))]
    assert len(set(stamps)) == 2000 and {len(stamp) for stamp in stamps} == {STAMP_BYTES}
    assert [number_of(stamp) for stamp in stamps[:1000]] == list(range(1000))


def test_a_full_memory_is_bounded() -> None:
    tracemalloc.start()
    try:
        guard = ReplayGuard()
        for session in range(MAX_SESSIONS + 10):
            for number in (0, WINDOW_FRAMES - 1):  # the widest window there is
                assert guard.admit(session.to_bytes(8, "big") + number.to_bytes(8, "big"))
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert guard.num_sessions == MAX_SESSIONS
    assert num_bytes < 2_000_000, num_bytes
