"""Is a request refused when just so many wait, also in a burst that comes between two looks at the engine's load?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instance.fake_scheduler import FakeConfig
from instance.waiting_room import WaitingRoom
from migration.types import RequestId
from tests.support.fake import FakeKit
from tests.support.pair import Shape

SHORT, LONG = Shape(num_prompt_tokens=8, max_tokens=8), Shape(num_prompt_tokens=100, max_tokens=8)


@pytest.fixture
def kit() -> Iterator[FakeKit]:
    made = FakeKit(FakeConfig(max_num_seqs=1, max_model_len=64))
    yield made
    made.close()


def test_a_burst_is_counted_request_by_request_and_a_new_load_counts_anew(kit: FakeKit) -> None:
    engine, room = kit.first, WaitingRoom(max_waiting=3)
    before = engine.load()
    answers = [room.add(engine, kit.submission(RequestId(f"r{number}"), SHORT), before) for number in range(5)]
    assert answers == [None, None, None, room.refusal, room.refusal]
    assert engine.load().num_waiting == 3, "what was refused is not there"
    assert room.add(engine, kit.submission(RequestId("late"), SHORT), engine.load()) is room.refusal
    engine.step()
    assert room.add(engine, kit.submission(RequestId("now"), SHORT), engine.load()) is None, "one runs, two wait"


def test_what_the_engine_refuses_takes_no_place(kit: FakeKit) -> None:
    engine, room = kit.first, WaitingRoom(max_waiting=1)
    load = engine.load()
    refusal = room.add(engine, kit.submission(RequestId("long"), LONG), load)
    assert refusal is not None and refusal.final
    assert room.add(engine, kit.submission(RequestId("short"), SHORT), load) is None
