"""What must be true of a whole migration between any two engines?"""

from __future__ import annotations

import pytest

from migration.errors import CopyFailed
from migration.types import (
    BlockRange,
    Description,
)
from tests.contract.engine_suite_ends import a_large_share_of
from tests.support.pair import EnginePair, Refused, Shape


class MigrationContract:
    """Of `EngineContract`."""

    @pytest.mark.parametrize("at", [1, 9, 30])
    def test_a_moved_request_goes_on_at_its_next_token(self, pair: EnginePair, at: int) -> None:
        shape = Shape(75, 60, prompt_key=30 + at)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, at)
        ferried = pair.ferry(request, pair.first, pair.second)
        assert ferried.committed.request_id == request
        assert (ferried.committed.num_prompt_tokens, ferried.committed.max_tokens) == (75, 60)
        assert [view.request_id for view in pair.second.requests()] == [request]
        assert pair.first.requests() == ()
        pair.finish(pair.second, request)
        assert pair.tokens(request) == expected

    def test_a_request_moves_there_and_back_several_times(self, pair: EnginePair) -> None:
        shape = Shape(75, 70, prompt_key=80)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        here, there = pair.first, pair.second
        for at in (5, 17, 29, 41, 53):
            pair.decode_until(here, request, at)
            pair.ferry(request, here, there)
            here, there = there, here
        pair.finish(here, request)
        assert pair.tokens(request) == expected

    def test_a_waiting_request_moves(self, pair: EnginePair) -> None:
        shape = Shape(75, 10, prompt_key=81)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        ferried = pair.ferry(request, pair.first, pair.second)
        assert ferried.settled_tokens >= 0
        pair.finish(pair.second, request)
        assert pair.tokens(request) == expected

    @pytest.mark.parametrize("is_earlier", [True, False])
    def test_a_waiting_request_keeps_its_place_by_arrival_among_those_that_wait_there(
        self, pair: EnginePair, is_earlier: bool
    ) -> None:
        """It was sent to the other engine before, or after, what waits there."""
        share, size = a_large_share_of(pair.second), pair.second.facts.block_size
        running = [pair.add(pair.second, Shape(share - 1, 30, prompt_key=840 + i)) for i in range(2)]
        for other in running:
            pair.decode_until(pair.second, other, 1)
        there_shape, moved_shape = Shape(share - 1, 5, prompt_key=843), Shape(share - size - 1, 5, prompt_key=844)
        if is_earlier:
            moved, there = pair.add(pair.first, moved_shape), pair.add(pair.second, there_shape)
        else:
            there, moved = pair.add(pair.second, there_shape), pair.add(pair.first, moved_shape)
        assert pair.second.load().head_of_line_blocks == share // size
        pair.ferry(moved, pair.first, pair.second, without_kv=True)
        assert pair.second.load().num_waiting == 2
        assert pair.second.load().head_of_line_blocks == share // size - is_earlier
        first, last = (moved, there) if is_earlier else (there, moved)
        pair.step_until(pair.second, lambda: len(pair.tokens(first)) > 0)
        assert not pair.tokens(last)
        pair.finish(pair.second, moved, there, *running)

    def test_a_request_moves_without_its_blocks_and_is_computed_again(self, pair: EnginePair) -> None:
        shape = Shape(75, 30, prompt_key=82)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 11)
        ferried = pair.ferry(request, pair.first, pair.second, without_kv=True)
        assert (ferried.settled_tokens, ferried.staged_blocks, ferried.tail_blocks) == (0, 0, 0)
        pair.finish(pair.second, request)
        assert pair.tokens(request) == expected

    def test_a_refused_migration_leaves_the_request_where_it_was(self, pair: EnginePair) -> None:
        share = a_large_share_of(pair.second)
        shape = Shape(share, 12, prompt_key=83)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 4)
        theirs = [pair.add(pair.second, Shape(share, 20, prompt_key=84 + i)) for i in range(2)]
        for other in theirs:
            pair.decode_until(pair.second, other, 1)
        with pytest.raises(Refused):
            pair.ferry(request, pair.first, pair.second)
        pair.finish(pair.first, request)
        assert pair.tokens(request) == expected

    def test_two_requests_cross_each_other(self, pair: EnginePair) -> None:
        one, two = Shape(70, 40, prompt_key=86), Shape(90, 40, prompt_key=87)
        expected = [pair.run_alone(pair.first, shape) for shape in (one, two)]
        left, right = pair.add(pair.first, one), pair.add(pair.second, two)
        pair.decode_until(pair.first, left, 8)
        pair.decode_until(pair.second, right, 15)
        pair.ferry(left, pair.first, pair.second)
        pair.ferry(right, pair.second, pair.first)
        pair.finish(pair.second, left)
        pair.finish(pair.first, right)
        assert [pair.tokens(left), pair.tokens(right)] == expected

    def test_a_prefix_the_destination_already_holds_is_not_copied(self, pair: EnginePair) -> None:
        size = pair.first.facts.block_size
        shape = Shape(4 * size + 3, 20, prompt_key=88)
        expected = pair.run_alone(pair.first, shape)
        assert pair.run_alone(pair.second, shape) == expected
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 5)
        ferried = pair.ferry(request, pair.first, pair.second)
        assert ferried.num_cached_tokens in (0, 4 * size), "an engine without a prefix cache says 0"
        pair.finish(pair.second, request)
        assert pair.tokens(request) == expected

    def test_a_push_is_refused_once_the_ticket_is_closed(self, pair: EnginePair) -> None:
        size = pair.first.facts.block_size
        request = pair.add(pair.first, Shape(3 * size, 20, prompt_key=89))
        pair.decode_until(pair.first, request, 2)
        description = pair.describe(pair.first, request)
        assert isinstance(description, Description)
        migration, reservation = pair.reserve(pair.second, description)
        progress = pair.first.progress(request)
        assert progress is not None
        blocks = BlockRange(reservation.num_cached_tokens // size, 2)
        pair.open(pair.second, migration, reservation.block_table)
        landed = pair.push(pair.first, pair.second, migration, progress.block_table, blocks)
        assert landed > 0
        pair.close_tickets(migration, pair.second)
        with pytest.raises(CopyFailed):
            pair.push(pair.first, pair.second, migration, progress.block_table, blocks)
        pair.second.cancel(migration)
