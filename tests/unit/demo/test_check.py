"""Is every token of two runs compared, and is a hand-over's gap found where the request changed hands?"""

from __future__ import annotations

import pytest

from orchestrator.demo.answers import Answer, Move, hand_overs, is_running_move
from orchestrator.demo.check import Difference, compare


def answer(index: int, tokens: tuple[int, ...], finish: str | None = "length", error: str | None = None) -> Answer:
    return Answer(
        index=index,
        request_id=f"demo-a.{index:05d}",
        num_prompt_tokens=10,
        token_ids=tokens,
        received_s=tuple(0.01 * place for place in range(len(tokens))),
        finish_reason=finish,
        error=error,
        sent_s=0.0,
    )


def move(request_id: str, moved_tokens: int, outcome: str = "committed") -> Move:
    return Move(
        migration_id="m1",
        request_id=request_id,
        source="i0",
        destination="i1",
        outcome=outcome,
        reason="",
        moved_tokens=moved_tokens,
        num_blocks=3,
        num_bytes=300,
        stopped_s=0.001,
        ended_s=1.0,
    )


def test_equal_runs_have_no_mismatch() -> None:
    run = [answer(0, (1, 2, 3)), answer(1, (4,))]
    found = compare(run, list(reversed(run)))
    assert (found.num_answers, found.num_tokens, found.mismatched_tokens) == (2, 4, 0)
    assert not found.not_compared


def test_every_token_that_differs_is_counted() -> None:
    found = compare([answer(0, (1, 2, 3, 4))], [answer(0, (1, 9, 3, 8))])
    assert found.differences == (Difference(0, 1, 2),)
    assert found.mismatched_tokens == 2


def test_missing_and_surplus_tokens_are_mismatches() -> None:
    assert compare([answer(0, (1, 2, 3))], [answer(0, (1,))]).mismatched_tokens == 2
    assert compare([answer(0, (1,))], [answer(0, (1, 2, 3))]).mismatched_tokens == 2


def test_another_finish_reason_is_a_mismatch() -> None:
    assert compare([answer(0, (1,), "stop")], [answer(0, (1,), "length")]).mismatched_tokens == 1


def test_failed_and_missing_answers_are_told_apart_from_mismatches() -> None:
    found = compare(
        [answer(0, (1,)), answer(1, (), None, "broken"), answer(2, (1,))], [answer(0, (1,)), answer(1, (5,))]
    )
    assert found.mismatched_tokens == 0
    assert found.not_compared == (1, 2)


def test_the_gap_is_taken_between_the_last_token_of_the_source_and_the_first_of_the_destination() -> None:
    received = (0.0, 0.01, 0.02, 0.05, 0.06, 0.07)
    moved = Answer(0, "demo-a.00000", 10, (1, 2, 3, 4, 5, 6), received, "length", None, 0.0)
    # Prompt 10, three tokens out at the stop, the newest not settled: 12 settled tokens moved.
    (hand_over,) = hand_overs([moved], [move("chatcmpl-demo-a.00000-8f3a", 12)])
    assert hand_over.gap_s == pytest.approx(0.03)
    assert hand_over.decode_step_s == pytest.approx(0.01)
    assert hand_over.num_steps == pytest.approx(3.0)


def test_moves_that_ended_otherwise_or_before_the_first_token_have_no_gap() -> None:
    moved = answer(0, (1, 2, 3))
    assert not hand_overs([moved], [move("cmpl-demo-a.00000-0", 11, "refused")])
    assert not hand_overs([moved], [move("cmpl-demo-a.00000-0", 5)])
    assert not hand_overs([moved], [move("cmpl-other-0", 11)])


def test_a_move_counts_as_of_a_running_request_from_the_first_token_on() -> None:
    by_id = {"demo-a.00000": answer(0, (1, 2, 3))}
    assert is_running_move(move("cmpl-demo-a.00000-0", 10), by_id)
    assert not is_running_move(move("cmpl-demo-a.00000-0", 9), by_id)
    assert not is_running_move(move("cmpl-demo-a.00000-0", 10, "refused"), by_id)
