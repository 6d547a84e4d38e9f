"""What must every engine keep free beside urgent requests? The headroom of their levels, from who comes later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from instance.headroom import Headroom
from instance.types import RequestStatus
from migration.types import RequestId
from tests.support.pair import EnginePair, Shape

URGENT = -10


@contextmanager
def headroom(pair: EnginePair, blocks: int, urgent: int = URGENT) -> Iterator[None]:
    """Of the level of `urgent`, on both engines; engines may outlive a test."""
    levels: Headroom = ((urgent, blocks), (0, 0))
    for engine in (pair.first, pair.second):
        engine.set_headroom(levels)
    try:
        yield
    finally:
        for engine in (pair.first, pair.second):
            engine.set_headroom(())


def all_of_it(pair: EnginePair) -> int:
    return pair.first.facts.total_blocks


def urgent_one(pair: EnginePair, num_tokens: int, key: int) -> RequestId:
    """It runs, and has given two tokens of so many."""
    urgent = pair.add(pair.first, Shape(40, num_tokens, prompt_key=key, priority=URGENT))
    pair.decode_until(pair.first, urgent, 2)
    return urgent


def status(pair: EnginePair, request: RequestId) -> RequestStatus:
    return {view.request_id: view.status for view in pair.first.requests()}[request]


class HeadroomContract:
    """Of `EngineContract`."""

    def test_beside_an_urgent_one_nothing_is_begun_that_takes_its_headroom_and_no_token_changes(
        self, pair: EnginePair
    ) -> None:
        shapes = (Shape(40, 25, prompt_key=301, priority=URGENT), Shape(45, 20, prompt_key=302))
        expected = [pair.run_alone(pair.first, shape) for shape in shapes]
        with headroom(pair, all_of_it(pair)):
            urgent = pair.add(pair.first, shapes[0])
            pair.decode_until(pair.first, urgent, 3)
            held = pair.add(pair.first, shapes[1])
            pair.finish(pair.first, urgent)
            assert pair.tokens(held) == [], "it came while the urgent one ran"
            pair.finish(pair.first, held)
        assert [pair.tokens(request) for request in (urgent, held)] == expected

    def test_who_leaves_the_headroom_free_is_begun(self, pair: EnginePair) -> None:
        size = pair.first.facts.block_size
        with headroom(pair, all_of_it(pair) // 2):
            urgent = pair.add(pair.first, Shape(size, 3 * size, prompt_key=303, priority=URGENT))
            pair.decode_until(pair.first, urgent, 2)
            beside = pair.add(pair.first, Shape(2 * size, 5, prompt_key=304))
            pair.finish(pair.first, beside)
            assert not pair.is_finished(urgent)
            pair.finish(pair.first, urgent)

    def test_who_is_as_urgent_or_more_is_not_held_back(self, pair: EnginePair) -> None:
        with headroom(pair, all_of_it(pair)):
            first = urgent_one(pair, 60, 305)
            others = [
                pair.add(pair.first, Shape(30, 5, prompt_key=306 + more, priority=URGENT - more)) for more in range(2)
            ]
            pair.finish(pair.first, *others)
            assert not pair.is_finished(first)
            pair.finish(pair.first, first)

    def test_what_runs_goes_on_when_an_urgent_one_comes(self, pair: EnginePair) -> None:
        with headroom(pair, all_of_it(pair)):
            running = pair.add(pair.first, Shape(40, 30, prompt_key=308))
            pair.decode_until(pair.first, running, 2)
            urgent = pair.add(pair.first, Shape(40, 60, prompt_key=309, priority=URGENT))
            pair.finish(pair.first, running)
            assert pair.tokens(urgent) and not pair.is_finished(urgent)
            pair.finish(pair.first, urgent)

    def test_headroom_that_is_lifted_holds_nobody_back_any_more(self, pair: EnginePair) -> None:
        with headroom(pair, all_of_it(pair)):
            urgent = urgent_one(pair, 60, 310)
            held = pair.add(pair.first, Shape(40, 5, prompt_key=311))
            pair.decode_until(pair.first, urgent, 8)
            assert status(pair, held) is RequestStatus.WAITING
            pair.first.set_headroom(())
            pair.finish(pair.first, held)
            assert not pair.is_finished(urgent)
            pair.finish(pair.first, urgent)

    def test_who_is_raised_to_the_urgent_ones_is_begun(self, pair: EnginePair) -> None:
        with headroom(pair, all_of_it(pair)):
            urgent = urgent_one(pair, 60, 312)
            held = pair.add(pair.first, Shape(40, 5, prompt_key=313))
            pair.decode_until(pair.first, urgent, 8)
            assert pair.first.set_priority(held, URGENT).status is RequestStatus.WAITING
            pair.finish(pair.first, held)
            assert not pair.is_finished(urgent)
            pair.finish(pair.first, urgent)

    def test_who_has_come_with_its_kv_is_begun(self, pair: EnginePair) -> None:
        shape = Shape(40, 30, prompt_key=314)
        expected = pair.run_alone(pair.second, shape)
        with headroom(pair, all_of_it(pair)):
            urgent = urgent_one(pair, 90, 315)
            moved = pair.add(pair.second, shape)
            pair.decode_until(pair.second, moved, 4)
            pair.ferry(moved, pair.second, pair.first)
            pair.finish(pair.first, moved)
            assert not pair.is_finished(urgent)
            pair.finish(pair.first, urgent)
        assert pair.tokens(moved) == expected
