"""What must every engine do with a request: run it, tell of it, end it?"""

from __future__ import annotations

from instance.types import RequestStatus
from migration.types import (
    RequestId,
)
from tests.support.pair import EnginePair, Shape

UNKNOWN = RequestId("nobody-knows-this-one")


class RequestContract:
    """Of `EngineContract`."""

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
