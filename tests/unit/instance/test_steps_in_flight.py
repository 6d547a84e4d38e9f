"""Which requests have a step in flight, and which begin with one?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from instance.types import NO_WORK, StepWork
from instance.vllm.in_flight import StepsInFlight


def step(**num_scheduled_tokens: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=num_scheduled_tokens)


def test_a_request_is_in_flight_until_the_outputs_of_every_step_of_it_have_come() -> None:
    steps, first, second = StepsInFlight(), step(a=5, b=1), step(a=1)
    steps.scheduled(first, {"a"})
    steps.scheduled(second, ())
    assert (steps.holds("a"), steps.holds("b"), steps.admits("a"), steps.admits("b")) == (True, True, True, False)
    steps.processed(first)
    assert (steps.holds("a"), steps.holds("b"), steps.admits("a")) == (True, False, False)
    steps.processed(second)
    assert not steps.holds("a")


def test_a_step_that_failed_goes_with_the_next_one_whose_outputs_come() -> None:
    steps, failed, following = StepsInFlight(), step(a=1), step(a=1)
    steps.scheduled(failed, ("a",))
    steps.scheduled(following, ())
    steps.processed(following)
    assert not steps.holds("a") and not steps.admits("a")


def test_what_a_step_computes_is_told_when_its_outputs_come_and_not_before() -> None:
    steps, first, second = StepsInFlight(), step(a=5), step(a=1)
    steps.scheduled(first, ("a",), StepWork(num_prefill_tokens=5))
    steps.scheduled(second, (), StepWork(num_decode_tokens=1))
    assert steps.processed(first) == StepWork(num_prefill_tokens=5)
    assert steps.processed(second) == StepWork(num_decode_tokens=1)
    assert steps.processed(second) == NO_WORK
