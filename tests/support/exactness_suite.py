"""What must hold for engines of another make than those of test_exactness.py? A suite; a test module subclasses it and
gives the fixtures `compare`, which makes a Comparison of a case on idle engines, and `chunk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from instance.engine import Engine
from instance.types import RequestStatus
from migration.types import RequestId
from tests.support.cases import CASES, params
from tests.support.exactness import Comparison
from tests.support.pair import Refused, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, submission_of

Compare = Callable[..., Comparison]
PROMPT = 200
"""24 tokens before a block boundary: with 25 output tokens, the settled KV ends exactly on it."""


def comparisons(usual: VllmKit) -> Iterator[Compare]:
    """What a fixture does: makes one of a case, on `usual` unless other engines are named; closes them at the end."""
    made: list[Comparison] = []

    def make(case: str, key: int = 1, num_prompt_tokens: int = PROMPT, kit: VllmKit | None = None) -> Comparison:
        made.append(Comparison(kit or usual, key, num_prompt_tokens, CASES[case]))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


def status(engine: Engine, request_id: RequestId) -> RequestStatus:
    return next(view.status for view in engine.requests() if view.request_id == request_id)


class MovesExactly:
    """Subclass as `class TestSomething(MovesExactly)`."""

    @pytest.mark.parametrize("case", [*CASES])
    def test_each_kind_of_sampling_moves_and_comes_back(self, case: str, compare: Compare) -> None:
        comparison = compare(case)
        expected = comparison.undisturbed()
        hops = [at for at in (3, 11, 20, 27) if at < len(expected.tokens) - 3]
        assert len(hops) > 2
        assert comparison.migrated(hops) == expected

    @pytest.mark.parametrize("case", ["greedy", "seeded", "json", "prompt logprobs"])
    def test_a_request_that_has_not_run_moves(self, case: str, compare: Compare) -> None:
        comparison = compare(case)
        expected = comparison.undisturbed()
        request_id, ferried = comparison.move_at_once()
        assert ferried.settled_tokens == 0
        comparison.pair.finish(comparison.second, request_id)
        assert comparison.seen(request_id) == expected

    @pytest.mark.parametrize("case", ["greedy", "penalties"])
    def test_a_half_computed_prompt_moves(self, case: str, compare: Compare, chunk: int) -> None:
        """`chunk`: how much of a prompt the engines compute in a step."""
        num_prompt = 3 * chunk
        comparison = compare(case, num_prompt_tokens=num_prompt)
        expected = comparison.undisturbed()
        request_id = comparison.start()
        comparison.pair.step(comparison.first)
        ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=0)
        assert 0 < ferried.settled_tokens < num_prompt and ferried.committed.num_output_tokens == 0
        comparison.pair.finish(comparison.second, request_id)
        assert comparison.seen(request_id) == expected

    def test_a_preempted_request_moves(self, compare: Compare) -> None:
        """1. Three requests nearly fill the blocks. 2. They grow; the youngest is preempted. 3. It is moved, and goes
        on there."""
        comparison = compare("greedy", key=50, num_prompt_tokens=600)
        pair, first, second = comparison.pair, comparison.first, comparison.second
        undisturbed, moved = pair.new_id("undisturbed"), pair.new_id("moved")
        assert second.add(submission_of(undisturbed, prompt_of(61, 700), params(max_tokens=80)())) is None
        pair.finish(second, undisturbed)
        request_id = comparison.start()
        for name, key in ((pair.new_id("other"), 60), (moved, 61)):
            assert first.add(submission_of(name, prompt_of(key, 700), params(max_tokens=80)())) is None
        pair.step_until(first, lambda: pair.is_finished(request_id) or status(first, moved) is RequestStatus.PREEMPTED)
        assert not pair.is_finished(request_id)
        ferried = pair.ferry(moved, first, second)
        assert ferried.settled_tokens == 0 and ferried.committed.num_output_tokens > 0
        pair.finish(second, moved)
        assert pair.tokens(moved) == pair.tokens(undisturbed)

    @pytest.mark.parametrize("beside", [False, True])
    @pytest.mark.parametrize("case", ["greedy", "seeded", "json, penalties"])
    def test_a_refused_request_goes_on_where_it_was(self, case: str, beside: bool, compare: Compare) -> None:
        """`beside`: another one decodes while it stands still, so that the runner has forgotten its last token."""
        comparison = compare(case)
        pair, first = comparison.pair, comparison.first
        expected = comparison.undisturbed()
        request_id = comparison.start()
        if beside:
            assert first.add(submission_of(pair.new_id("other"), prompt_of(9, 50), params()())) is None
        pair.decode_until(first, request_id, 12)
        sabotage = Sabotage(alter_state=lambda state: state[: len(state) // 2])
        for _ in range(3):
            with pytest.raises(Refused):
                pair.ferry(request_id, first, comparison.second, sabotage=sabotage)
            pair.step(first)
        pair.finish(first, request_id)
        assert pair.tokens(request_id) == list(expected.tokens)

    def test_one_that_is_resumed_at_once_goes_on(self, compare: Compare) -> None:
        """With asynchronous scheduling its token is in flight then."""
        comparison = compare("greedy")
        expected = comparison.undisturbed()
        request_id = comparison.start()
        comparison.pair.decode_until(comparison.first, request_id, 5)
        comparison.first.try_stop(request_id)
        comparison.first.resume(request_id)
        comparison.pair.finish(comparison.first, request_id)
        assert comparison.seen(request_id) == expected

    def test_many_at_once_move_to_and_fro(self, compare: Compare) -> None:
        """Slots are given back and taken by others all along."""
        comparison = compare("greedy")
        pair, first, second = comparison.pair, comparison.first, comparison.second
        kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "seed": 21}, {"frequency_penalty": 0.6})
        prompts = [prompt_of(300 + number, 60 + 31 * number) for number in range(6)]
        samplings = [params(max_tokens=30, **kinds[number % len(kinds)]) for number in range(6)]
        alone = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            request_id = pair.new_id("alone")
            assert first.add(submission_of(request_id, prompt, sampling())) is None
            pair.finish(first, request_id)
            alone.append(pair.tokens(request_id))
        moved = [pair.new_id("moved") for _ in prompts]
        where = {request_id: (first, second)[number % 2] for number, request_id in enumerate(moved)}
        for request_id, prompt, sampling in zip(moved, prompts, samplings, strict=True):
            assert where[request_id].add(submission_of(request_id, prompt, sampling())) is None
        for turn in range(9):
            for engine in (first, second, first, second):
                pair.step(engine)
            request_id = moved[turn * 5 % len(moved)]
            source = where[request_id]
            where[request_id] = second if source is first else first
            pair.ferry(request_id, source, where[request_id], num_stages=turn % 3)
        for request_id in moved:
            pair.finish(where[request_id], request_id)
        assert [pair.tokens(request_id) for request_id in moved] == alone

    @pytest.mark.parametrize("sabotage", [Sabotage(skip_block=3), Sabotage(skip_tail=True)])
    def test_control_a_block_that_is_not_copied_is_noticed(self, sabotage: Sabotage, compare: Compare) -> None:
        comparison = compare("greedy", key=70)
        expected, moved = comparison.undisturbed(), comparison.migrated(hops=(20,), sabotage=sabotage)
        assert (moved.tokens, moved.logprobs) != (expected.tokens, expected.logprobs)
        assert moved.tokens[:20] == expected.tokens[:20]
