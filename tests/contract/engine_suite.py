"""What must every engine do? The shared suite of the Engine port; a test module subclasses it with a fixture `pair`.

It yields an `EnginePair` over two idle engines (they may outlive a test) and calls `drain()` after it. There must be
room for 40 % of the blocks in one prompt, and for 4 sequences at a time.
"""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from instance.engine import Engine
from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from instance.vllm import handshake
from migration.errors import CopyFailed
from migration.types import (
    BlockRange,
    Description,
    MigrationId,
    NotStopped,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)
from tests.support.pair import EnginePair, Refused, Sabotage, Shape

UNKNOWN = RequestId("nobody-knows-this-one")
UNKNOWN_MIGRATION = MigrationId("no-such-migration")


def a_large_share_of(engine: Engine) -> int:
    """Prompt tokens that take 40 % of the blocks."""
    return int(engine.facts.total_blocks * 0.4) * engine.facts.block_size


class EngineContract:
    """Subclass as `class TestSomething(EngineContract)` with a fixture `pair`."""

    # ---- running requests
    def test_a_request_runs_to_its_last_token_and_finishes_once(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(50, 20, prompt_key=1))
        pair.finish(pair.first, request)
        assert len(pair.tokens(request)) == 20
        assert [output.finish_reason is not None for output in pair.outputs[request]].count(True) == 1
        assert pair.outputs[request][-1].finish_reason is not None
        assert pair.first.requests() == ()

    def test_a_step_says_what_it_did(self, pair: EnginePair) -> None:
        pair.add(pair.first, Shape(40, 4, prompt_key=2))
        prefill = pair.step(pair.first)
        assert prefill.executed and prefill.num_scheduled_tokens >= 1
        decode = pair.step(pair.first)
        assert decode.executed and decode.num_scheduled_tokens == 1 and decode.num_decoding == 1

    def test_steps_tell_the_work_that_their_time_went_into(self, pair: EnginePair) -> None:
        pair.add(pair.first, Shape(40, 6, prompt_key=977))
        works = [pair.step(pair.first).work for _ in range(3)]
        while pair.first.has_work():
            works.append(pair.step(pair.first).work)
        assert sum(work.num_prefill_tokens for work in works) == 40
        assert sum(work.num_attended_pairs for work in works) == 40 * 40 // 2
        decodes = [work for work in works if work.num_decoding]
        assert all(
            (work.num_decoding, work.num_decode_tokens, work.num_prefill_tokens) == (1, 1, 0) for work in decodes
        )
        contexts = [work.num_context_tokens for work in decodes]
        assert contexts == [40 + index for index in range(len(decodes))] and len(decodes) in (5, 6)

    def test_two_engines_give_the_same_tokens_for_the_same_request(self, pair: EnginePair) -> None:
        shape = Shape(60, 12, prompt_key=3)
        assert pair.run_alone(pair.first, shape) == pair.run_alone(pair.second, shape)

    def test_a_repeated_submission_is_ignored(self, pair: EnginePair) -> None:
        shape = Shape(30, 6, prompt_key=4)
        request = pair.add(pair.first, shape)
        pair.step(pair.first)
        assert pair.first.add(pair.kit.submission(request, shape)) is None
        pair.finish(pair.first, request)
        assert len(pair.tokens(request)) == 6

    def test_a_request_that_can_never_fit_is_refused_for_good_and_leaves_no_trace(self, pair: EnginePair) -> None:
        too_long = Shape(pair.first.facts.max_model_len + 1, 4, prompt_key=5)
        refusal = pair.first.add(pair.kit.submission(pair.new_id(), too_long))
        assert refusal is not None and refusal.final and refusal.reason
        assert pair.first.requests() == () and not pair.first.has_work()
        pair.first.check_integrity()

    # ---- abort
    def test_an_aborted_request_ends_without_output_and_gives_its_blocks_back(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(70, 50, prompt_key=6))
        pair.decode_until(pair.first, request, 3)
        count = len(pair.outputs[request])
        pair.first.abort((request, UNKNOWN))
        while pair.first.has_work():
            pair.step(pair.first)
        assert len(pair.outputs[request]) == count
        assert pair.first.requests() == ()
        assert pair.first.load().free_blocks == pair.first.facts.total_blocks

    def test_a_waiting_request_can_be_aborted(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(70, 50, prompt_key=7))
        pair.first.abort((request,))
        assert pair.first.requests() == ()
        pair.first.check_integrity()

    # ---- load and views
    def test_load_counts_blocks_and_queues(self, pair: EnginePair) -> None:
        engine = pair.first
        size, total = engine.facts.block_size, engine.facts.total_blocks
        assert engine.load().free_blocks == total
        request = pair.add(engine, Shape(2 * size + 1, 8, prompt_key=8, priority=2))
        waiting = engine.load()
        assert (waiting.num_running, waiting.num_waiting) == (0, 1)
        assert waiting.head_of_line_blocks >= 3 and waiting.waiting_blocks >= waiting.head_of_line_blocks
        pair.decode_until(engine, request, 1)
        running = engine.load()
        assert (running.num_running, running.num_waiting) == (1, 0)
        assert running.running_by_priority == ((2, 1),)
        assert running.free_blocks == total - 3
        assert (running.head_of_line_blocks, running.waiting_blocks) == (0, 0)

    def test_views_tell_every_request_in_order_of_arrival(self, pair: EnginePair) -> None:
        ids = [pair.add(pair.first, Shape(20 + i, 30, prompt_key=9 + i, priority=1)) for i in range(3)]
        for request in ids:
            pair.decode_until(pair.first, request, 2)
        late = pair.add(pair.first, Shape(25, 30, prompt_key=12))
        views = pair.first.requests()
        assert [view.request_id for view in views] == [*ids, late]
        assert [view.status for view in views] == [RequestStatus.RUNNING] * 3 + [RequestStatus.WAITING]
        assert [view.num_prompt_tokens for view in views] == [20, 21, 22, 25]
        assert [view.num_output_tokens for view in views] == [len(pair.tokens(request)) for request in (*ids, late)]
        assert all(view.max_tokens == 30 and view.movable for view in views)
        assert all(view.num_blocks >= 1 for view in views[:3]) and views[3].num_blocks == 0

    # ---- priority
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

    # ---- source
    def test_describe_and_progress_speak_of_settled_tokens(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 40, prompt_key=13))
        pair.decode_until(pair.first, request, 5)
        description, progress = pair.describe(pair.first, request), pair.first.progress(request)
        assert progress is not None
        assert 45 <= description.settled_tokens <= progress.num_tokens
        assert description.settled_tokens == progress.settled_tokens
        assert description.kv_fingerprint == pair.second.facts.kv_fingerprint
        assert len(progress.block_table[0]) * pair.first.facts.block_size >= progress.settled_tokens
        pair.step(pair.first)
        later = pair.first.progress(request)
        assert later is not None and later.settled_tokens == progress.settled_tokens + 1

    def test_nobody_is_described_and_nothing_happens_to_unknown_requests(self, pair: EnginePair) -> None:
        engine = pair.first
        assert engine.describe(UNKNOWN) is None
        assert engine.progress(UNKNOWN) is None
        assert engine.try_stop(UNKNOWN) in (NotStopped.FINISHED, NotStopped.ABORTED)
        engine.resume(UNKNOWN)
        assert engine.release(UNKNOWN) is False
        engine.abort((UNKNOWN,))
        engine.check_integrity()

    def test_a_stopped_request_stands_still_and_goes_on_when_resumed(self, pair: EnginePair) -> None:
        shape = Shape(45, 30, prompt_key=14)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 7)
        stopped = pair.stop(pair.first, request)
        assert isinstance(stopped, StoppedRequest)
        assert stopped.num_output_tokens == len(pair.tokens(request))
        assert pair.first.requests()[0].status is RequestStatus.MIGRATING_OUT
        bystander = pair.add(pair.first, Shape(20, 5, prompt_key=15))
        pair.finish(pair.first, bystander)
        assert len(pair.tokens(request)) == stopped.num_output_tokens
        pair.first.resume(request)
        pair.finish(pair.first, request)
        assert pair.tokens(request) == expected

    def test_a_released_request_is_gone_without_output(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 30, prompt_key=16))
        pair.decode_until(pair.first, request, 7)
        assert isinstance(pair.stop(pair.first, request), StoppedRequest)
        count = len(pair.outputs[request])
        assert pair.first.release(request) is True
        assert pair.first.release(request) is False
        while pair.first.has_work():
            pair.step(pair.first)
        assert len(pair.outputs[request]) == count
        assert pair.first.load().free_blocks == pair.first.facts.total_blocks

    def test_a_stopped_request_can_be_aborted_and_release_says_so(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 30, prompt_key=17))
        pair.decode_until(pair.first, request, 3)
        pair.stop(pair.first, request)
        pair.first.abort((request,))
        assert pair.first.try_stop(request) is NotStopped.ABORTED
        assert pair.first.release(request) is False
        assert pair.first.requests() == ()
        pair.first.check_integrity()

    def test_a_finished_request_cannot_be_stopped(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(20, 2, prompt_key=18))
        pair.finish(pair.first, request)
        assert pair.first.try_stop(request) is NotStopped.FINISHED

    # ---- destination
    def test_a_reservation_holds_blocks_until_it_is_cancelled(self, pair: EnginePair) -> None:
        size = pair.first.facts.block_size
        request = pair.add(pair.first, Shape(3 * size + 5, 40, prompt_key=19))
        pair.decode_until(pair.first, request, 2)
        free = pair.second.load().free_blocks
        migration, reservation = pair.reserve(pair.second, pair.describe(pair.first, request), slack_blocks=2)
        assert reservation.num_blocks == len(reservation.block_table[0]) >= 4
        held = pair.second.load()
        assert held.reserved_blocks == reservation.num_blocks
        assert held.free_blocks == free - held.reserved_blocks
        assert pair.second.requests() == ()
        pair.second.cancel(migration)
        pair.second.cancel(migration)
        assert (pair.second.load().free_blocks, pair.second.load().reserved_blocks) == (free, 0)
        pair.second.check_integrity()

    def test_a_reservation_grows_and_a_refused_growth_changes_nothing(self, pair: EnginePair) -> None:
        size, total = pair.second.facts.block_size, pair.second.facts.total_blocks
        for i in range(2):
            other = pair.add(pair.second, Shape(a_large_share_of(pair.second), 20, prompt_key=27 + i))
            pair.decode_until(pair.second, other, 1)
        request = pair.add(pair.first, Shape(2 * size, 40, prompt_key=20))
        pair.decode_until(pair.first, request, 2)
        migration, before = pair.reserve(pair.second, pair.describe(pair.first, request), slack_blocks=0)
        grown = pair.second.grow(migration, (before.num_blocks + 1) * size)
        assert isinstance(grown, Reservation) and grown.num_blocks == before.num_blocks + 1
        assert grown.block_table[0][: before.num_blocks] == before.block_table[0]
        assert grown.num_cached_tokens == before.num_cached_tokens
        assert isinstance(pair.second.grow(migration, (total + 1) * size), Refusal)
        pair.second.check_integrity()
        assert pair.second.load().reserved_blocks == grown.num_blocks
        assert isinstance(pair.second.grow(migration, 1), Reservation), (
            "it never shrinks, and asking for less is no error"
        )
        assert pair.second.load().reserved_blocks == grown.num_blocks
        pair.second.cancel(migration)

    def test_room_asked_for_beyond_the_longest_context_is_the_room_of_the_longest_context(
        self, pair: EnginePair
    ) -> None:
        """A source asks for slack: near the end of the context it reaches beyond it, and the request still moves."""
        longest = pair.second.facts.max_model_len
        request = pair.add(pair.first, Shape(40, 20, prompt_key=29))
        pair.decode_until(pair.first, request, 2)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        grown = pair.second.grow(migration, longest + 2 * pair.second.facts.block_size)
        assert isinstance(grown, Reservation) and grown.num_blocks >= longest // pair.second.facts.block_size
        pair.second.check_integrity()
        pair.second.cancel(migration)

    def test_a_reservation_is_refused_when_the_blocks_are_taken(self, pair: EnginePair) -> None:
        share = a_large_share_of(pair.second)
        mine = pair.add(pair.first, Shape(share, 20, prompt_key=21))
        pair.decode_until(pair.first, mine, 1)
        theirs = [pair.add(pair.second, Shape(share, 20, prompt_key=22 + i)) for i in range(2)]
        for request in theirs:
            pair.decode_until(pair.second, request, 1)
        free = pair.second.load().free_blocks
        refusal = pair.second.reserve(pair.new_migration(), pair.describe(pair.first, mine), 0)
        assert isinstance(refusal, Refusal) and refusal.reason
        assert (pair.second.load().free_blocks, pair.second.load().reserved_blocks) == (free, 0)
        pair.second.check_integrity()

    def test_a_reservation_is_refused_when_the_kv_memory_is_of_another_kind(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=24))
        pair.decode_until(pair.first, request, 1)
        description = pair.describe(pair.first, request)
        known = handshake.decode(description.kv_fingerprint)
        other = handshake.encode(msgspec.structs.replace(known, kv_dtype="of another kind"))
        both = f"the source keeps KV as of another kind, this instance {known.kv_dtype}"
        for fingerprint, why in ((other, both), ("another", "hand-shake cannot be read")):
            foreign = dataclasses.replace(description, kv_fingerprint=fingerprint)
            refusal = pair.second.reserve(pair.new_migration(), foreign, 0)
            assert isinstance(refusal, Refusal) and why in refusal.reason

    def test_a_request_that_is_already_here_or_coming_is_refused(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=25))
        pair.decode_until(pair.first, request, 1)
        description = pair.describe(pair.first, request)
        assert isinstance(pair.first.reserve(pair.new_migration(), description, 0), Refusal)
        migration, _ = pair.reserve(pair.second, description)
        assert isinstance(pair.second.reserve(pair.new_migration(), description, 0), Refusal)
        pair.second.cancel(migration)
        assert pair.second.load().reserved_blocks == 0

    def test_a_submission_of_a_request_that_is_coming_is_refused_for_now(self, pair: EnginePair) -> None:
        shape = Shape(40, 20, prompt_key=27)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 1)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        refusal = pair.second.add(pair.kit.submission(request, shape))
        assert refusal is not None and not refusal.final
        pair.second.check_integrity()
        pair.second.cancel(migration)

    def test_an_unknown_migration_is_refused(self, pair: EnginePair) -> None:
        assert isinstance(pair.first.grow(UNKNOWN_MIGRATION, 10), Refusal)
        assert isinstance(pair.first.is_ready(UNKNOWN_MIGRATION), Refusal)
        assert isinstance(pair.first.commit(UNKNOWN_MIGRATION, b""), Refusal)
        pair.first.cancel(UNKNOWN_MIGRATION)

    def test_a_commit_with_unreadable_state_is_refused_and_cancels_the_reservation(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=26))
        pair.decode_until(pair.first, request, 1)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        assert isinstance(pair.second.commit(migration, b"\xff not a state"), Refusal)
        assert pair.second.load().reserved_blocks == 0
        assert isinstance(pair.second.is_ready(migration), Refusal)
        pair.second.check_integrity()

    # ---- whole migrations
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
