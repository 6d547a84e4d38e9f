"""How do tests make fleets whose requests have targets? Views of instances with known speeds, drawn or written down."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import strategies as st

from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator import view
from orchestrator.events import MigrationNumber
from orchestrator.policy.moves import InstanceView, Move
from orchestrator.policy.standing import Speed
from orchestrator.policy.targets import tightest_of
from orchestrator.state import MigrationRecord
from tests.support.reports import BLOCK_SIZE, load_report, request_load

FAST: Speed = (0.010, 1e-5, 0.0, 5e-4, 1e-6, 0.0)
SLOW: Speed = (0.020, 5e-5, 2e-5, 2e-3, 4e-6, 1e-9)
HEAVY: Speed = (0.005, 2e-4, 0.0, 1e-4, 4e-6, 0.0)
"""Of long contexts and prompts."""
TOTAL_BLOCKS = 1000
World = dict[InstanceId, list[RequestLoad]]


def wanting(request: RequestLoad, tpot_s: float | None = None, ttft_s: float | None = None) -> RequestLoad:
    return msgspec.structs.replace(request, tpot_s=tpot_s, ttft_s=ttft_s)


def waiting(request_id: str, num_prompt_tokens: int, arrived_s: float = 0.0, priority: int = 0) -> RequestLoad:
    request = request_load(request_id, 0, status="waiting", priority=priority, num_output_tokens=0)
    return msgspec.structs.replace(request, num_prompt_tokens=num_prompt_tokens, arrived_s=arrived_s)


def demand(request: RequestLoad) -> int:
    return -(-(request.num_prompt_tokens + request.num_output_tokens + 1) // BLOCK_SIZE)


def view_of(
    instance: str,
    requests: list[RequestLoad],
    *,
    draining: bool = False,
    slots_out: int = 2,
    slots_in: int = 2,
    max_step_tokens: int = 512,
    max_running: int = 64,
) -> InstanceView:
    """An instance whose report says just what its requests do."""
    running = [one for one in requests if one.status == "running"]
    queue = sorted((one for one in requests if one.status != "running"), key=lambda one: (one.priority, -one.arrived_s))
    load = msgspec.structs.replace(
        load_report(
            instance,
            state="draining" if draining else "serving",
            total_blocks=TOTAL_BLOCKS,
            free_blocks=max(0, TOTAL_BLOCKS - sum(one.num_blocks for one in running)),
            num_running=len(running),
            num_waiting=len(queue),
            head_of_line_blocks=demand(queue[0]) if queue else 0,
            running_by_priority=tuple(sorted(Counter(one.priority for one in running).items())),
        ),
        waiting_blocks=sum(demand(one) for one in queue),
        max_step_tokens=max_step_tokens,
        max_running=max_running,
    )
    name = InstanceId(instance)
    tightest = tightest_of(requests)
    return InstanceView(name, load, tuple(requests), draining, slots_out, slots_in, 0.1, tightest=tightest)


def carry_out(world: World, move: Move) -> None:
    (request,) = [one for one in world[move.source] if one.request_id == move.request_id]
    world[move.source].remove(request)
    world[move.destination].append(request)


def record_of(move: Move) -> MigrationRecord:
    """It has begun."""
    source, destination = (Incarnation(name, Epoch(1), f"tcp://{name}") for name in (move.source, move.destination))
    return view.begun(MigrationNumber(1), move, source, destination, 100.0)


@st.composite
def worlds(draw: st.DrawFn, with_targets: bool = True) -> World:
    world: World = {}
    number = 0
    for index in range(draw(st.integers(1, 5))):
        requests: list[RequestLoad] = []
        is_bulk = draw(st.integers(0, 2)) == 0  # but for one request that wants something and may have to stay
        for _ in range(draw(st.sampled_from([0, 0, 1, 3, 6, 10]))):
            if sum(one.num_blocks for one in requests) > TOTAL_BLOCKS - 300:
                break
            number += 1
            priority = draw(st.integers(0, 2))
            if draw(st.integers(0, 3)) == 0:
                tokens, arrived_s = draw(st.integers(1, 4000)), draw(st.sampled_from([0.0, 0.2, 1.0]))
                request = waiting(f"r{number}", tokens, arrived_s, priority)
            else:
                request = request_load(f"r{number}", draw(st.sampled_from([1, 9, 40, 150, 300])), priority=priority)
            tpot_s = draw(st.sampled_from([None, None, None, 0.012, 0.02, 0.03, 0.05]))
            ttft_s = draw(st.sampled_from([None, 0.2, 0.5, 2.0]))
            if with_targets and not (is_bulk and requests):
                request = wanting(request, tpot_s, ttft_s)
            is_movable = draw(st.integers(0, 7)) > 0 if requests else not is_bulk
            requests.append(msgspec.structs.replace(request, movable=is_movable))
        world[InstanceId(f"instance-{index}")] = requests
    return world


def views_of(world: World) -> tuple[InstanceView, ...]:
    return tuple(view_of(instance, requests) for instance, requests in world.items())


@st.composite
def speeds_of(draw: st.DrawFn, world: World) -> dict[InstanceId, Speed]:
    """Of each instance, but for some that nothing is known of."""
    drawn = {name: draw(st.sampled_from([FAST, HEAVY, SLOW, HEAVY, None])) for name in world}
    return {name: speed for name, speed in drawn.items() if speed is not None}
