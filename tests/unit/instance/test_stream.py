"""Do tokens get their offsets, and do dead requests stay dead?"""

from __future__ import annotations

from instance.messages import OutputEntry
from instance.stream import StreamTable, Tombstones
from instance.types import EngineOutput, Wishes
from migration.types import RequestId

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")


def output(request_id: RequestId, *tokens: int, finish: int | None = None) -> EngineOutput:
    return EngineOutput(request_id, tokens, finish, None, ())


def test_offsets_count_the_tokens_of_a_request() -> None:
    streams = StreamTable()
    streams.open(A, "g1", 0, now_s=0.0)
    assert streams.entries([output(A, 7)]) == {"g1": (OutputEntry("a", 0, (7,)),)}
    assert streams.entries([output(A, 8, 9)]) == {"g1": (OutputEntry("a", 1, (8, 9)),)}
    assert streams.next_offset(A) == 3


def test_one_step_gives_one_frame_a_gateway_in_order() -> None:
    streams = StreamTable()
    for request_id, gateway in ((A, "g1"), (B, "g2"), (C, "g1")):
        streams.open(request_id, gateway, 0, now_s=0.0)
    entries = streams.entries([output(A, 1), output(B, 2), output(C, 3)])
    assert {gateway: [e.request_id for e in frame] for gateway, frame in entries.items()} == {
        "g1": ["a", "c"],
        "g2": ["b"],
    }


def test_a_stream_that_is_handed_over_goes_on_at_the_next_offset() -> None:
    source, destination = StreamTable(), StreamTable()
    source.open(A, "g", 0, now_s=0.0)
    source.entries([output(A, 1, 2, 3)])
    destination.open(A, "g", 3, now_s=1.0)
    source.close(A)
    assert source.entries([output(A, 4)]) == {}
    assert destination.entries([output(A, 4)])["g"][0].offset == 3


def test_a_finish_closes_the_stream_and_keeps_what_came_with_it() -> None:
    streams = StreamTable()
    streams.open(A, "g", 0, now_s=0.0)
    (entry,) = streams.entries([EngineOutput(A, (5,), 0, "stop", (b"x",))])["g"]
    assert (entry.finish_reason, entry.stop_reason, entry.extra) == (0, "stop", (b"x",))
    assert A not in streams and len(streams) == 0
    assert streams.entries([output(A, 6)]) == {}


def test_age_and_gateway_of_unknown_requests_are_nothing() -> None:
    streams = StreamTable()
    assert (streams.gateway(A), streams.next_offset(A), streams.age_s(A, 5.0)) == (None, None, 0.0)
    streams.open(A, "g", 0, now_s=2.0)
    assert streams.age_s(A, 5.0) == 3.0
    streams.close(A)
    streams.close(A)


def test_tombstones_are_bounded_and_forget_the_oldest_first() -> None:
    tombstones = Tombstones(bound=3)
    tombstones.add(["a", "b", "c"])
    tombstones.add(["a"])
    tombstones.add(["d"])
    assert len(tombstones) == 3
    assert ["a" in tombstones, "b" in tombstones, "c" in tombstones, "d" in tombstones] == [True, False, True, True]


def test_wishes_stand_beside_their_stream_and_end_with_it() -> None:
    streams, wishes = StreamTable(), Wishes(0.5, None, 1.25)
    streams.open(A, "g", 0, now_s=2.0, wishes=wishes)
    streams.open(B, "g", 0, now_s=2.0)
    assert (streams.wishes(A), streams.wishes(B), streams.wishes(C)) == (wishes, None, None)
    assert wishes.after(streams.age_s(A, 3.5)) == Wishes(0.5, None, 2.75)
    assert wishes.after(-1.0) == wishes, "a clock that was set back takes no time away"
    streams.close(A)
    assert streams.wishes(A) is None
