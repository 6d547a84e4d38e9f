"""What does bench.policy_live do to its cluster? Find what it holds, play plans to its arms, take an instance away."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from bench.policy_workload import Workload
from orchestrator.admin.client import AdminClient
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.config import ServeConfig
from orchestrator.demo.answers import Answer
from orchestrator.demo.client import Run, Tally, send_all
from orchestrator.demo.cluster import MAX_MIGRATIONS, MODEL_NAME, Cluster
from orchestrator.demo.options import small_model
from orchestrator.demo.workload import PlannedRequest
from orchestrator.errors import OrchestratorError
from orchestrator.policy.dispatch import Rule

NUM_INSTANCES = 2
BLOCK_SIZE = 32
NUM_BLOCKS = 65
"""Of an instance, one of them vLLM's own: 2,048 tokens, so that two of the longest answers fill it. With 3,040 the
processor was full before memory was."""
MAX_MODEL_LEN = 1_664
HEADROOM_BLOCKS = 48
"""Kept free beside urgent requests: three quarters of an instance. Only those that are told to be urgent bring it."""
LEVELS = f"high:-10:{HEADROOM_BLOCKS},normal:0,low:10"
MAX_IN_FLIGHT = 512
FULL_IN_FLIGHT = 48
"""Requests kept in flight to find what the fleet holds: more than fit into its memory."""
FULL_FOR_S, FULL_AFTER_S = 30.0, 8.0
URGENT_SHARE = 0.1
TOLD = "with priorities"
URGENCIES = ("without priorities", TOLD)
OWNED_BEFORE_SCALE_IN = 2
"""Requests that each instance runs before one of them is taken away: there must be something to lose."""
SCALE_OUT_S = 240.0
IDLE_S = 120.0
MAX_MOVES = 1_000
"""Looked at after a round; an orchestrator remembers no more."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    dispatch: Rule
    rebalance: bool


ARMS = (
    Arm("round-robin", Rule.ROUND_ROBIN, False),
    Arm("round-robin, rebalance", Rule.ROUND_ROBIN, True),
    Arm("dispatch", Rule.FREENESS, False),
    Arm("rebalance", Rule.FREENESS, True),
)


@dataclass(slots=True)
class Measured:
    """Of one arm, over the rounds so far."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    p99_ttft_s: list[float] = field(default_factory=list)
    """One a round."""
    mean_tpot_s: list[float] = field(default_factory=list)
    """One a round."""
    num_preemptions: int = 0
    num_moved: int = 0
    num_broken_off: int = 0
    errors: list[str] = field(default_factory=list)
    """What failed requests said."""
    owned: list[int] = field(default_factory=list)
    """By each instance that was taken away, when it was."""
    gone_after_s: list[float] = field(default_factory=list)
    """Until each of them had stopped."""

    def add(self, answers: Sequence[Answer]) -> None:
        finished = [answer for answer in answers if answer.error is None and answer.received_s]
        self.errors += [
            f"{answer.request_id}: {answer.error or 'no token came'} (after {len(answer.token_ids)} tokens)"
            for answer in answers
            if answer.error is not None or not answer.received_s
        ]
        waits = [answer.received_s[0] - answer.sent_s for answer in finished]
        steps = [
            (answer.received_s[-1] - answer.received_s[0]) / (len(answer.received_s) - 1)
            for answer in finished
            if len(answer.received_s) > 1
        ]
        self.ttft_s += waits
        self.tpot_s += steps
        self.latency_s += [answer.received_s[-1] - answer.sent_s for answer in finished]
        self.p99_ttft_s.append(percentile(waits, 99))
        self.mean_tpot_s.append(mean(steps))


@dataclass(slots=True)
class Urgent:
    """Of one arm under overload."""

    urgent: Measured = field(default_factory=Measured)
    others: Measured = field(default_factory=Measured)


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


def config() -> ServeConfig:
    return ServeConfig(
        model=small_model(),
        engine_argv=(
            *("--served-model-name", MODEL_NAME),
            *("--dtype", "float32"),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--block-size", str(BLOCK_SIZE)),
            *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
            *("--kv-cache-memory-bytes", "1G"),
            *("--max-num-seqs", "64"),
        ),
        instances=NUM_INSTANCES,
        gateways=1,
        port=0,
        admin_port=0,
        max_migrations=MAX_MIGRATIONS,
        priority_levels=LEVELS,
        log_level="WARNING",
    )


# ---- what the fleet says
def counts(admin_address: str, num_instances: int = NUM_INSTANCES) -> tuple[int, bool]:
    """(preemptions so far, whether nothing runs or waits)."""
    instances = _instances(admin_address)
    heard = len(instances) == num_instances and all(one.HasField("report_age_s") for one in instances)
    idle = heard and all(one.num_running + one.num_waiting == 0 for one in instances)
    return sum(one.num_preemptions for one in instances), idle


def moved(admin_address: str) -> dict[str, bool]:
    """Migrations that have ended, and whether each was committed."""
    with AdminClient(admin_address) as client:
        ended = [one for one in client.migrations(MAX_MOVES) if one.HasField("ended_age_s")]
    return {one.name: one.outcome == pb.MIGRATION_OUTCOME_COMMITTED for one in ended}


def _instances(admin_address: str) -> list[pb.Instance]:
    """Without those that have stopped, which are listed for a while."""
    with AdminClient(admin_address) as client:
        return [one for one in client.instances().instances if one.state != pb.INSTANCE_STATE_STOPPED]


async def settled(cluster: Cluster, num_instances: int = NUM_INSTANCES) -> int:
    """Preemptions so far, once nothing runs."""
    deadline_s = time.monotonic() + IDLE_S
    while time.monotonic() < deadline_s:
        num_preemptions, idle = await asyncio.to_thread(counts, cluster.fleet.address, num_instances)
        if idle:
            return num_preemptions
        await asyncio.sleep(POLL_S)
    raise OrchestratorError(f"the instances are not idle {IDLE_S:.0f} s after the last answer")


async def send(cluster: Cluster, name: str, plan: Sequence[PlannedRequest]) -> tuple[Answer, ...]:
    """To its end. No two runs share a prefix."""
    run = f"{name.replace(' ', '-')}-{time.time_ns() // 1_000_000:x}"
    return await send_all(
        plan, Run(run, cluster.base_url, cluster.model, run, MAX_IN_FLIGHT, float("inf")), Tally(len(plan))
    )


# ---- what is done to it
async def capacity(cluster: Cluster, workload: Workload) -> float:
    """Requests a second that the fleet finishes when there are always more than it holds: output tokens a second once
    it is full, over the mean length of an answer. Raises OrchestratorError if any of them fails: all loads rest on it.
    """
    many = dataclasses.replace(workload, requests_per_s=100.0, duration_s=FULL_FOR_S).plan(seed=0)
    plan = [dataclasses.replace(request, arrival_s=0.0) for request in many]
    began_s = time.monotonic()
    name = f"full-{time.time_ns() // 1_000_000:x}"
    run = Run(name, cluster.base_url, cluster.model, name, FULL_IN_FLIGHT, FULL_FOR_S)
    answers = await send_all(plan, run, Tally(len(plan)))
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise OrchestratorError(f"{len(errors)} of {len(answers)} requests failed while it was full: {errors[0]}")
    received = [at_s - began_s for answer in answers for at_s in answer.received_s]
    num_tokens = sum(FULL_AFTER_S <= at_s < FULL_FOR_S for at_s in received)
    await settled(cluster)
    return num_tokens / (FULL_FOR_S - FULL_AFTER_S) / mean([request.max_tokens for request in plan])


async def play(cluster: Cluster, arm: Arm, workload: Workload, seed: int, measured: Measured) -> None:
    """One plan to one arm."""
    await cluster.replace_orchestrator(rebalance=arm.rebalance, dispatch=arm.dispatch)
    before = await settled(cluster)
    measured.add(await send(cluster, f"{arm.name}{seed}", workload.plan(seed)))
    measured.num_preemptions += await settled(cluster) - before
    await _count_moves(cluster, measured, {})


async def play_urgent(cluster: Cluster, name: str, workload: Workload, seed: int, measured: Urgent) -> None:
    """One plan under overload; a tenth of it is urgent, which is told to the fleet in one arm only."""
    await cluster.replace_orchestrator(rebalance=True)
    before = await settled(cluster)
    plan, urgent = with_urgent(workload.plan(seed), seed, told=name == TOLD)
    answers = await send(cluster, f"{name}{seed}", plan)
    measured.urgent.add([answer for answer in answers if answer.index in urgent])
    measured.others.add([answer for answer in answers if answer.index not in urgent])
    measured.others.num_preemptions += await settled(cluster) - before
    await _count_moves(cluster, measured.others, {})


async def _count_moves(cluster: Cluster, measured: Measured, before: Mapping[str, bool]) -> None:
    """`before`: those of earlier rounds that this orchestrator remembers."""
    new = [ok for name, ok in (await asyncio.to_thread(moved, cluster.fleet.address)).items() if name not in before]
    measured.num_moved += sum(new)
    measured.num_broken_off += len(new) - sum(new)


def with_urgent(
    plan: tuple[PlannedRequest, ...], seed: int, *, told: bool
) -> tuple[tuple[PlannedRequest, ...], frozenset[int]]:
    """(the plan, which of it are urgent): the same ones for each arm."""
    rng = Random(seed)
    urgent = frozenset(request.index for request in plan if rng.random() < URGENT_SHARE)
    marked = (
        dataclasses.replace(request, priority="high") if told and request.index in urgent else request
        for request in plan
    )
    return tuple(marked), urgent


async def play_scaled_in(cluster: Cluster, workload: Workload, seed: int, measured: Measured) -> None:
    """One plan, and while it runs one instance of two is taken away; afterwards there are two again. The one that comes
    is cold: its first answers are slow, and only errors are of interest here."""
    await settled(cluster)
    before = await asyncio.to_thread(moved, cluster.fleet.address)
    sending = asyncio.create_task(send(cluster, f"scale{seed}", workload.plan(seed)))
    running: dict[str, int] = {}
    while not sending.done() and min(running.values(), default=0) < OWNED_BEFORE_SCALE_IN:
        await asyncio.sleep(POLL_S)
        running = await asyncio.to_thread(_running, cluster.fleet.address)
    began_s = time.monotonic()
    await asyncio.to_thread(_scale, cluster.fleet.address, 1)
    await _there_are(cluster, 1)
    (left,) = await asyncio.to_thread(_running, cluster.fleet.address)
    measured.owned += [owned for name, owned in running.items() if name != left]
    measured.gone_after_s.append(time.monotonic() - began_s)
    measured.add(await sending)
    await _count_moves(cluster, measured, before)
    await asyncio.to_thread(_scale, cluster.fleet.address, NUM_INSTANCES)
    await _there_are(cluster, NUM_INSTANCES)


def _running(admin_address: str) -> dict[str, int]:
    return {one.name: one.num_running for one in _instances(admin_address)}


def _scale(admin_address: str, target: int) -> None:
    with AdminClient(admin_address) as client:
        client.scale(target)


async def _there_are(cluster: Cluster, num_instances: int) -> None:
    deadline_s = time.monotonic() + SCALE_OUT_S
    while time.monotonic() < deadline_s:
        instances = await asyncio.to_thread(_instances, cluster.fleet.address)
        if [one.state for one in instances] == [pb.INSTANCE_STATE_SERVING] * num_instances:
            return
        await asyncio.sleep(POLL_S)
    raise OrchestratorError(f"{SCALE_OUT_S:.0f} s after it was told so the fleet is not {num_instances} instances")
