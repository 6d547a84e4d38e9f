"""Does a change of priority act inside a real vLLM engine, on waiting and on running ones, and change no token?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.types import PriorityOutcome, RequestStatus
from migration.types import RequestId
from tests.support.pair import EnginePair, Shape
from tests.support.vllm_kit import VllmKit, start_engine

pytestmark = pytest.mark.timeout(300)
"""Engines start in it."""


@pytest.fixture(scope="module")
def tight_kit() -> VllmKit:
    """Two sequences at a time, and blocks for 640 tokens: requests wait, and are preempted."""
    return VllmKit(*(start_engine(max_num_seqs=2, num_gpu_blocks_override=21, max_model_len=512) for _ in range(2)))


@pytest.fixture(scope="module")
def first_come_kit() -> VllmKit:
    return VllmKit(*(start_engine(scheduling_policy="fcfs") for _ in range(2)))


def pair_over(kit: VllmKit) -> Iterator[EnginePair]:
    pair = EnginePair(kit)
    yield pair
    pair.drain()
    pair.close()


@pytest.fixture
def tight(tight_kit: VllmKit) -> Iterator[EnginePair]:
    yield from pair_over(tight_kit)


@pytest.fixture
def first_come(first_come_kit: VllmKit) -> Iterator[EnginePair]:
    yield from pair_over(first_come_kit)


def order_of_first_tokens(pair: EnginePair, *requests: RequestId) -> list[RequestId]:
    """Steps until each of them has put out a token."""
    begun: list[RequestId] = []

    def all_have() -> bool:
        begun.extend(request for request in requests if request not in begun and pair.tokens(request))
        return len(begun) == len(requests)

    pair.step_until(pair.first, all_have)
    return begun


def test_of_those_that_wait_the_one_that_is_raised_runs_next_and_each_says_what_it_would_have_said(
    tight: EnginePair,
) -> None:
    shapes = [Shape(40, 30, prompt_key=200 + number) for number in range(4)]
    expected = [tight.run_alone(tight.first, shape) for shape in shapes]
    blockers = [tight.add(tight.first, Shape(30, 20 + 5 * number, prompt_key=210 + number)) for number in range(2)]
    for request in blockers:
        tight.decode_until(tight.first, request, 1)
    waiting = [tight.add(tight.first, shape) for shape in shapes]
    answer = tight.first.set_priority(waiting[-1], -10)
    assert (answer.outcome, answer.status) == (PriorityOutcome.SET, RequestStatus.WAITING)
    assert tight.first.set_priority(waiting[0], 10).outcome is PriorityOutcome.SET
    assert order_of_first_tokens(tight, *waiting) == [waiting[3], waiting[1], waiting[2], waiting[0]]
    tight.finish(tight.first, *blockers, *waiting)
    assert [tight.tokens(request) for request in waiting] == expected


@pytest.mark.parametrize("is_raised", [True, False])
def test_when_blocks_run_out_the_one_that_was_raised_while_it_ran_keeps_its_own(
    tight: EnginePair, is_raised: bool
) -> None:
    """The later of two equals is preempted; unless it is raised while both run, then it is the earlier one."""
    shapes = [Shape(200, 200, prompt_key=220), Shape(210, 200, prompt_key=221)]
    expected = [tight.run_alone(tight.first, shape) for shape in shapes]
    before = tight.first.load().num_preemptions
    earlier, later = (tight.add(tight.first, shape) for shape in shapes)
    for request in (earlier, later):
        tight.decode_until(tight.first, request, 5)
    if is_raised:
        assert tight.first.set_priority(later, -10).status is RequestStatus.RUNNING
    victim = earlier if is_raised else later
    tight.step_until(tight.first, lambda: tight.first.load().num_preemptions > before)
    (preempted,) = [view for view in tight.first.requests() if view.status is RequestStatus.PREEMPTED]
    assert preempted.request_id == victim
    tight.finish(tight.first, earlier, later)
    assert [tight.tokens(request) for request in (earlier, later)] == expected


def test_one_that_waits_with_its_blocks_after_a_move_takes_its_place_by_its_new_priority(tight: EnginePair) -> None:
    """Changed between the commit and its first step there, where vLLM keeps it in another queue."""
    shapes = [Shape(60, 60, prompt_key=230 + number) for number in range(2)]
    expected = [tight.run_alone(tight.first, shape) for shape in shapes]
    moved = [tight.add(tight.first, shape) for shape in shapes]
    for request in moved:
        tight.decode_until(tight.first, request, 4)
        tight.ferry(request, tight.first, tight.second)
    assert tight.second.set_priority(moved[1], -10).status is RequestStatus.PREEMPTED
    tight.second.check_integrity()
    tight.finish(tight.second, *moved)
    assert [tight.tokens(request) for request in moved] == expected


def test_an_engine_that_was_told_to_serve_first_come_first_served_refuses_with_its_reason(
    first_come: EnginePair,
) -> None:
    request = first_come.add(first_come.first, Shape(40, 20, prompt_key=240))
    first_come.decode_until(first_come.first, request, 2)
    answer = first_come.first.set_priority(request, -10)
    assert answer.outcome is PriorityOutcome.UNSUPPORTED and "--scheduling-policy fcfs" in answer.reason
    assert [view.priority for view in first_come.first.requests()] == [0]
    first_come.finish(first_come.first, request)


def test_an_engine_that_serves_first_come_first_served_holds_nobody_back(first_come: EnginePair) -> None:
    """The urgent ones behind it would be held back as well."""
    urgent = first_come.add(first_come.first, Shape(40, 60, prompt_key=241, priority=-10))
    first_come.decode_until(first_come.first, urgent, 2)
    first_come.first.set_headroom(((-10, first_come.first.facts.total_blocks), (0, 0)))
    beside = first_come.add(first_come.first, Shape(40, 5, prompt_key=242))
    first_come.finish(first_come.first, beside)
    assert not first_come.is_finished(urgent)
    first_come.first.set_headroom(())
    first_come.finish(first_come.first, urgent)
