"""What must be true of a request that goes on after the output that it had at an engine that is gone?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from instance.engine import Engine
from instance.revival import Decided, Revival
from instance.types import CommittedRequest, EngineRefusal
from migration.types import RequestId, StoppedRequest
from tests.contract.engine_suite_ends import a_large_share_of
from tests.support.pair import EnginePair, Shape

SHAPE = Shape(75, 40, prompt_key=860)


class RevivalContract:
    """Of `EngineContract`."""

    @pytest.mark.parametrize("at", [1, 9, 39])
    def test_it_goes_on_at_its_next_token(self, pair: EnginePair, at: int) -> None:
        expected = pair.run_alone(pair.first, SHAPE)
        request = pair.new_id()
        assert _revived(pair, pair.second, request, SHAPE, expected[:at]) is None
        (view,) = pair.second.requests()
        assert (view.request_id, view.num_output_tokens, view.num_prompt_tokens) == (request, at, 75)
        pair.finish(pair.second, request)
        assert expected[:at] + pair.tokens(request) == expected

    def test_it_can_move_on(self, pair: EnginePair) -> None:
        expected = pair.run_alone(pair.first, SHAPE)
        request = pair.new_id()
        assert _revived(pair, pair.second, request, SHAPE, expected[:10]) is None
        pair.decode_until(pair.second, request, 7)
        description = pair.describe(pair.second, request)
        migration, _ = pair.reserve(pair.first, replace(description, settled_tokens=0))
        stopped = pair.stop(pair.second, request, without_kv=True)
        assert isinstance(stopped, StoppedRequest)
        pair.wait_ready(pair.first, migration)
        assert isinstance(pair.first.commit(migration, stopped.state), CommittedRequest)
        assert pair.second.release(request)
        pair.finish(pair.first, request)
        assert expected[:10] + pair.tokens(request) == expected

    def test_where_there_is_no_room_it_waits_for_it(self, pair: EnginePair) -> None:
        share = a_large_share_of(pair.second)
        shape = Shape(share - 40, 30, prompt_key=861)
        expected = pair.run_alone(pair.first, shape)
        theirs = [pair.add(pair.second, Shape(share, 20, prompt_key=862 + i)) for i in range(2)]
        for other in theirs:
            pair.decode_until(pair.second, other, 1)
        request = pair.new_id()
        assert _revived(pair, pair.second, request, shape, expected[:5]) is None
        assert pair.second.load().num_waiting == 1
        pair.finish(pair.second, *theirs, request)
        assert expected[:5] + pair.tokens(request) == expected

    def test_it_can_be_aborted_before_it_has_run(self, pair: EnginePair) -> None:
        expected = pair.run_alone(pair.first, SHAPE)
        request = pair.new_id()
        assert _revived(pair, pair.second, request, SHAPE, expected[:3]) is None
        pair.second.abort((request,))
        assert pair.second.requests() == ()

    def test_one_that_is_there_already_is_refused_for_now(self, pair: EnginePair) -> None:
        request = pair.add(pair.second, SHAPE)
        refusal = _revived(pair, pair.second, request, SHAPE, [1, 2])
        assert refusal is not None and not refusal.final and "here already" in refusal.reason
        assert [view.request_id for view in pair.second.requests()] == [request]

    def test_what_cannot_be_read_is_refused_for_good(self, pair: EnginePair) -> None:
        submission = replace(pair.kit.submission(pair.new_id(), SHAPE), payload=b"\xc1 none")
        decided = Revival(submission, (1, 2))(pair.second)
        assert decided is not None and decided.refusal is not None and decided.refusal.final

    def test_more_output_than_it_may_have_is_refused(self, pair: EnginePair) -> None:
        refusal = _revived(pair, pair.second, pair.new_id(), SHAPE, [1] * 5_000)
        assert refusal is not None and pair.second.requests() == ()


def _revived(
    pair: EnginePair, engine: Engine, request: RequestId, shape: Shape, output: list[int]
) -> EngineRefusal | None:
    revival = Revival(pair.kit.submission(request, shape), tuple(output))
    decided: Decided | None = None
    while decided is None:
        decided = revival(engine)
        engine.check_integrity()
    return decided.refusal
