"""Does a change of priority keep vLLM's own queue in order? Its real queue and requests, without an engine."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request, RequestStatus

from instance.types import PriorityAnswer, PriorityOutcome
from instance.types import RequestStatus as Status
from instance.vllm import compat
from instance.vllm.flags import parse_serve_argv
from instance.vllm.priorities import set_priority
from migration.types import RequestId


def request(number: int, priority: int = 0, status: RequestStatus = RequestStatus.WAITING) -> Request:
    made = Request(f"r{number}", [1, 2, 3], SamplingParams(max_tokens=5), None, arrival_time=number, priority=priority)
    made.status = status
    return made


def scheduler(policy: str, waiting: list[Request], holding: list[Request] | None = None) -> Any:
    """What of a scheduler a change of priority looks at."""
    kind = SchedulingPolicy(policy)
    queues = create_request_queue(kind), create_request_queue(kind)
    for queue, requests in zip(queues, (waiting, holding or []), strict=True):
        for one in requests:
            queue.add_request(one)
    owned = {one.request_id: one for one in (*waiting, *(holding or []))}
    return SimpleNamespace(policy=kind, waiting=queues[0], kv_holding_waiting=queues[1], requests=owned)


def ids(queue: Any) -> list[str]:
    """In the order in which vLLM takes them out."""
    return [queue.pop_request().request_id for _ in range(len(queue))]


def test_one_that_waits_is_served_by_its_new_priority() -> None:
    it = scheduler("priority", [request(1), request(2), request(3)])
    answer = set_priority(it, RequestId("r3"), -10)
    assert answer == PriorityAnswer(PriorityOutcome.SET, 0, Status.WAITING)
    assert ids(it.waiting) == ["r3", "r1", "r2"]


def test_one_that_waits_with_its_blocks_stays_among_those() -> None:
    holding = [request(1, status=RequestStatus.PREEMPTED), request(2, status=RequestStatus.PREEMPTED)]
    it = scheduler("priority", [request(3)], holding)
    assert set_priority(it, RequestId("r2"), -10).status is Status.PREEMPTED
    assert (ids(it.kv_holding_waiting), ids(it.waiting)) == (["r2", "r1"], ["r3"])


def test_one_that_runs_is_in_no_queue_before_and_after() -> None:
    it = scheduler("priority", [request(1)])
    running = it.requests["r2"] = request(2, status=RequestStatus.RUNNING)
    assert set_priority(it, RequestId("r2"), -10) == PriorityAnswer(PriorityOutcome.SET, 0, Status.RUNNING)
    assert running.priority == -10 and ids(it.waiting) == ["r1"]


def test_an_engine_that_serves_first_come_first_served_says_so_and_changes_nothing() -> None:
    it = scheduler("fcfs", [request(1), request(2)])
    answer = set_priority(it, RequestId("r2"), -10)
    assert answer.outcome is PriorityOutcome.UNSUPPORTED and "--scheduling-policy" in answer.reason
    assert it.requests["r2"].priority == 0 and ids(it.waiting) == ["r1", "r2"]


@pytest.mark.parametrize("seed", range(20))
def test_after_any_changes_the_order_is_that_of_priority_and_then_arrival(seed: int) -> None:
    rng = random.Random(seed)
    requests = [request(number, rng.randrange(-3, 4)) for number in range(30)]
    it = scheduler("priority", requests)
    for _ in range(60):
        one = rng.choice(requests)
        set_priority(it, RequestId(one.request_id), rng.randrange(-3, 4))
        assert it.waiting.peek_request() is min(requests, key=lambda other: (other.priority, other.arrival_time))
    expected = sorted(requests, key=lambda other: (other.priority, other.arrival_time))
    assert ids(it.waiting) == [one.request_id for one in expected]


def test_control_a_priority_that_is_only_written_leaves_the_order_wrong() -> None:
    requests = [request(number) for number in range(8)]
    it = scheduler("priority", requests)
    requests[-1].priority = -10
    assert ids(it.waiting)[0] != "r7"


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_the_unordered_view_of_a_queue_holds_each_request_once(policy: str) -> None:
    requests = [request(number, -number) for number in range(9)]
    it = scheduler(policy, requests)
    assert sorted(one.request_id for one in compat.unordered(it.waiting)) == sorted(it.requests)
    assert len(it.waiting) == 9
    assert hasattr(create_request_queue(SchedulingPolicy.PRIORITY), compat.PRIORITY_HEAP), (
        "without its heap a priority queue is sorted at each step"
    )


@pytest.mark.parametrize(("flags", "policy"), [((), "priority"), (("--scheduling-policy", "fcfs"), "fcfs")])
def test_engines_schedule_by_priority_unless_the_user_says_otherwise(
    tmp_path: Path, flags: tuple[str, ...], policy: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert parse_serve_argv((str(tmp_path), *flags)).scheduling_policy == policy
