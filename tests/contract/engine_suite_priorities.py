"""What must every engine do when a request becomes more, or less, urgent?"""

from __future__ import annotations

import pytest

from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import (
    Description,
    RequestId,
)
from tests.support.pair import EnginePair, Sabotage, Shape

UNKNOWN = RequestId("nobody-knows-this-one")


class PriorityContract:
    """Of `EngineContract`."""

    def test_a_waiting_request_takes_its_place_by_its_new_priority(self, pair: EnginePair) -> None:
        engine, size = pair.first, pair.first.facts.block_size
        first, second, third = (
            pair.add(engine, Shape(blocks * size - 1, 20, prompt_key=90 + blocks)) for blocks in (1, 2, 4)
        )
        assert engine.load().head_of_line_blocks == 1
        assert engine.set_priority(third, -5) == PriorityAnswer(PriorityOutcome.SET, 0, RequestStatus.WAITING)
        assert engine.load().head_of_line_blocks == 4
        engine.set_priority(second, -6)
        assert engine.load().head_of_line_blocks == 2
        assert engine.set_priority(second, 7).previous == -6
        assert engine.load().head_of_line_blocks == 4
        assert engine.set_priority(third, 0).previous == -5
        assert engine.load().head_of_line_blocks == 1, "among equals the first to come is the first again"
        assert engine.load().waiting_blocks == 7
        assert [(view.request_id, view.priority) for view in engine.requests()] == [(first, 0), (second, 7), (third, 0)]
        engine.check_integrity()
        pair.finish(engine, first, second, third)

    @pytest.mark.parametrize("at", [0, 1, 9])
    def test_another_priority_changes_no_token(self, pair: EnginePair, at: int) -> None:
        shape = Shape(75, 40, prompt_key=95)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        beside = pair.add(pair.first, Shape(50, 40, prompt_key=96))
        pair.decode_until(pair.first, request, at)
        for priority in (-10, 3, -10):
            assert pair.first.set_priority(request, priority).outcome is PriorityOutcome.SET
            pair.step(pair.first)
        pair.finish(pair.first, request, beside)
        assert pair.tokens(request) == expected

    def test_a_running_request_runs_at_its_new_priority(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 30, prompt_key=97, priority=2))
        pair.decode_until(pair.first, request, 3)
        assert pair.first.set_priority(request, -10) == PriorityAnswer(PriorityOutcome.SET, 2, RequestStatus.RUNNING)
        assert pair.first.load().running_by_priority == ((-10, 1),)
        assert [view.priority for view in pair.first.requests()] == [-10]
        description = pair.describe(pair.first, request)
        migration, _ = pair.reserve(pair.second, description)
        pair.second.cancel(migration)

    def test_a_priority_changed_while_the_copy_is_under_way_moves_along(self, pair: EnginePair) -> None:
        shape = Shape(75, 60, prompt_key=98, priority=4)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 5)

        def change_after_it_was_described(description: Description) -> Description:
            assert pair.first.set_priority(request, -7).outcome is PriorityOutcome.SET
            return description

        sabotage = Sabotage(alter_description=change_after_it_was_described)
        ferried = pair.ferry(request, pair.first, pair.second, sabotage=sabotage)
        assert ferried.committed.priority == -7
        assert [view.priority for view in pair.second.requests()] == [-7]
        pair.decode_until(pair.second, request, 20)
        assert pair.second.load().running_by_priority == ((-7, 1),)
        pair.ferry(request, pair.second, pair.first)
        assert [view.priority for view in pair.first.requests()] == [-7], "and moves on with it"
        pair.finish(pair.first, request)
        assert pair.tokens(request) == expected

    def test_one_that_has_just_arrived_can_be_changed_before_its_first_step(self, pair: EnginePair) -> None:
        shape = Shape(75, 60, prompt_key=99)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 5)
        pair.ferry(request, pair.first, pair.second)
        answer = pair.second.set_priority(request, -3)
        assert (answer.outcome, answer.status) == (PriorityOutcome.SET, RequestStatus.PREEMPTED)
        pair.second.check_integrity()
        pair.finish(pair.second, request)
        assert pair.tokens(request) == expected

    def test_a_stopped_request_keeps_its_priority_until_it_is_resumed(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 30, prompt_key=100))
        pair.decode_until(pair.first, request, 7)
        pair.stop(pair.first, request)
        answer = pair.first.set_priority(request, -10)
        assert answer.outcome is PriorityOutcome.ON_THE_MOVE and answer.reason
        assert [view.priority for view in pair.first.requests()] == [0]
        pair.first.resume(request)
        assert pair.first.set_priority(request, -10).outcome is PriorityOutcome.SET
        pair.finish(pair.first, request)

    def test_the_priority_of_one_that_is_gone_cannot_be_set(self, pair: EnginePair) -> None:
        finished = pair.add(pair.first, Shape(20, 2, prompt_key=101))
        pair.finish(pair.first, finished)
        moved = pair.add(pair.first, Shape(45, 30, prompt_key=102))
        pair.decode_until(pair.first, moved, 3)
        pair.ferry(moved, pair.first, pair.second)
        for request in (UNKNOWN, finished, moved):
            answer = pair.first.set_priority(request, -10)
            assert answer.outcome is PriorityOutcome.NOT_HERE and answer.reason
        assert [view.priority for view in pair.second.requests()] == [0]
