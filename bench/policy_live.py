"""Does moving running requests help those who wait? Real engines, the same requests for each arm, arms in turns.

    python -m bench.policy_live [--quick] [--json FILE] [--rounds N] [--rate R]

Two CPU instances of the small model behind one gateway, with few KV blocks, so that memory is what runs out. Arms:
*round-robin* (each instance in turn), *dispatch* (by freeness, nothing moves) and *rebalance* (the same, and running
requests move). A round sends one plan of requests (Gamma arrivals, heavy-tailed lengths) to each arm, in another order
each time; between arms only the orchestrator is replaced. Then the same under overload, where a tenth of the requests
are urgent: told to the fleet (`x-kvferry-priority: high`), and not. TTFT is what a streaming client saw.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.policy_workload import Workload
from bench.report import Result, Value, spread_of, this_machine, write_result
from orchestrator.admin.client import AdminClient
from orchestrator.config import ServeConfig
from orchestrator.demo.answers import Answer
from orchestrator.demo.client import Run, Tally, send_all
from orchestrator.demo.cluster import MAX_MIGRATIONS, MODEL_NAME, Cluster, running_cluster
from orchestrator.demo.options import small_model
from orchestrator.demo.warmup import warm_up
from orchestrator.demo.workload import PlannedRequest
from orchestrator.errors import OrchestratorError
from orchestrator.policy.dispatch import Rule
from orchestrator.runtime import checks
from orchestrator.runtime.ray_cluster import RayCluster

NUM_INSTANCES = 2
BLOCK_SIZE = 32
NUM_BLOCKS = 96
"""Of an instance: 3,072 tokens, so that two or three of the longest answers fill it."""
MAX_MODEL_LEN = 2_048
ROUNDS, DURATION_S, RATE_PER_S = 4, 60.0, 3.0
QUICK_ROUNDS, QUICK_DURATION_S = 1, 20.0
MAX_IN_FLIGHT = 512
OVERLOAD = 1.5
"""Times the rate of the first part."""
URGENT_SHARE = 0.1
TOLD = "with priorities"
URGENCIES = ("without priorities", TOLD)
IDLE_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    dispatch: Rule
    rebalance: bool


ARMS = (
    Arm("round-robin", Rule.ROUND_ROBIN, False),
    Arm("dispatch", Rule.FREENESS, False),
    Arm("rebalance", Rule.FREENESS, True),
)


@dataclass(slots=True)
class Measured:
    """Of one arm, over the rounds so far."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    p99_ttft_s: list[float] = field(default_factory=list)
    """One a round."""
    num_preemptions: int = 0
    num_moved: int = 0
    num_broken_off: int = 0
    num_errors: int = 0

    def add(self, answers: Sequence[Answer]) -> None:
        finished = [answer for answer in answers if answer.error is None and answer.received_s]
        self.num_errors += len(answers) - len(finished)
        waits = [answer.received_s[0] - answer.sent_s for answer in finished]
        self.ttft_s += waits
        self.p99_ttft_s.append(percentile(waits, 99))
        self.tpot_s += [
            (answer.received_s[-1] - answer.received_s[0]) / (len(answer.received_s) - 1)
            for answer in finished
            if len(answer.received_s) > 1
        ]


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
        log_level="WARNING",
    )


def counts(admin_address: str) -> tuple[int, bool]:
    """(preemptions so far, whether nothing runs or waits)."""
    with AdminClient(admin_address) as client:
        instances = client.instances().instances
    heard = len(instances) == NUM_INSTANCES and all(one.HasField("report_age_s") for one in instances)
    idle = heard and all(one.num_running + one.num_waiting == 0 for one in instances)
    return sum(one.num_preemptions for one in instances), idle


async def settled(cluster: Cluster) -> int:
    """Preemptions so far, once nothing runs."""
    deadline_s = time.monotonic() + IDLE_S
    while time.monotonic() < deadline_s:
        num_preemptions, idle = await asyncio.to_thread(counts, cluster.fleet.address)
        if idle:
            return num_preemptions
        await asyncio.sleep(POLL_S)
    raise OrchestratorError(f"the instances are not idle {IDLE_S:.0f} s after the last answer")


async def play(cluster: Cluster, arm: Arm, workload: Workload, seed: int, measured: Measured) -> None:
    """One plan to one arm."""
    await cluster.replace_orchestrator(rebalance=arm.rebalance, dispatch=arm.dispatch)
    before = await settled(cluster)
    plan = workload.plan(seed)
    name = f"{arm.name}{seed}-{time.time_ns() // 1_000_000:x}"
    answers = await send_all(
        plan, Run(name, cluster.base_url, cluster.model, name, MAX_IN_FLIGHT, float("inf")), Tally(len(plan))
    )
    measured.add(answers)
    measured.num_preemptions += await settled(cluster) - before
    moves = (await cluster.fleet.observe()).moves
    measured.num_moved += sum(move.outcome == "committed" for move in moves)
    measured.num_broken_off += sum(move.outcome != "committed" for move in moves)


async def play_urgent(cluster: Cluster, name: str, workload: Workload, seed: int, measured: Urgent) -> None:
    """One plan under overload; a tenth of it is urgent, which is told to the fleet in one arm only."""
    await cluster.replace_orchestrator(rebalance=True)
    await settled(cluster)
    plan, urgent = with_urgent(workload.plan(seed), seed, told=name == TOLD)
    run = f"{name.replace(' ', '-')}{seed}-{time.time_ns() // 1_000_000:x}"
    answers = await send_all(
        plan, Run(run, cluster.base_url, cluster.model, run, MAX_IN_FLIGHT, float("inf")), Tally(len(plan))
    )
    measured.urgent.add([answer for answer in answers if answer.index in urgent])
    measured.others.add([answer for answer in answers if answer.index not in urgent])


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


async def rounds(
    ray: RayCluster, workload: Workload, num_rounds: int, console: Console, urgent: dict[str, Urgent]
) -> dict[str, Measured]:
    """`urgent` is filled in."""
    found = {arm.name: Measured() for arm in ARMS}
    async with running_cluster(ray, config(), console) as cluster:
        await warm_up(cluster.base_url, cluster.model, f"warm{time.time_ns() // 1_000_000:x}", console)
        for number in range(num_rounds):
            for turn in range(len(ARMS)):
                arm = ARMS[(number + turn) % len(ARMS)]
                await play(cluster, arm, workload, seed=number + 1, measured=found[arm.name])
                p99_s, preempted = found[arm.name].p99_ttft_s[-1], found[arm.name].num_preemptions
                told = f"{arm.name}: P99 TTFT {p99_s:.2f} s, {preempted} preempted so far"
                console.print(f"round {number + 1} of {num_rounds}, {told}", highlight=False)
        overloaded = dataclasses.replace(workload, requests_per_s=workload.requests_per_s * OVERLOAD)
        for number in range(num_rounds):
            for turn in range(2):
                name = URGENCIES[(number + turn) % 2]
                measured = urgent[name]
                await play_urgent(cluster, name, overloaded, seed=number + 101, measured=measured)
                told = f"{name}: urgent {mean(measured.urgent.ttft_s):.2f} s to the first token in the mean so far"
                console.print(f"overload, round {number + 1} of {num_rounds}, {told}", highlight=False)
    return found


def ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def row_of(measured: Measured) -> dict[str, Value]:
    return {
        "requests": len(measured.ttft_s),
        "errors": measured.num_errors,
        "ttft_mean_s": mean(measured.ttft_s),
        "ttft_p99_s": percentile(measured.ttft_s, 99),
        "tpot_mean_ms": mean(measured.tpot_s) * 1e3,
        "tpot_p99_ms": percentile(measured.tpot_s, 99) * 1e3,
        "preemptions": measured.num_preemptions,
        "moved": measured.num_moved,
        "broken_off": measured.num_broken_off,
    }


def result_of(found: dict[str, Measured], urgent: dict[str, Urgent], num_rounds: int) -> Result:
    off, on = found["dispatch"], found["rebalance"]
    untold, told = (urgent[name] for name in URGENCIES)
    arms = {name: row_of(arm) for name, arm in found.items()}
    for name, arm in urgent.items():
        arms |= {f"overload {name}: urgent": row_of(arm.urgent), f"overload {name}: others": row_of(arm.others)}
    normal_before_s, normal_after_s = (percentile(arm.others.ttft_s, 99) for arm in (untold, told))
    return Result(
        name="policy_live",
        command=" ".join(["python", "-m", "bench.policy_live", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={
            "p99_ttft_gain_rebalance": ratio(percentile(off.ttft_s, 99), percentile(on.ttft_s, 99)),
            "preemptions_on": on.num_preemptions,
            "preemptions_off": off.num_preemptions,
            "high_ttft_gain": ratio(mean(untold.urgent.ttft_s), mean(told.urgent.ttft_s)),
            "high_tpot_gain": ratio(mean(untold.urgent.tpot_s), mean(told.urgent.tpot_s)),
            "normal_p99_ttft_cost": normal_after_s / normal_before_s - 1 if normal_before_s > 0 else None,
        },
        arms=arms,
        n={"rounds": num_rounds, "requests_an_arm": len(on.ttft_s) + on.num_errors},
        spread={f"p99_ttft_s_{name}": spread_of(arm.p99_ttft_s) for name, arm in found.items()}
        | {f"urgent_ttft_s_{name}": spread_of(arm.urgent.ttft_s) for name, arm in urgent.items()},
        machine=this_machine(),
    )


def show(result: Result, console: Console) -> None:
    table = Table(title="The same requests for each arm", title_justify="left")
    columns = list(next(iter(result.arms.values())))
    for column in ("arm", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "arm" else "right")
    for name, values in result.arms.items():
        texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values.values()]
        table.add_row(name, *texts)
    console.print(table)
    for name, figure in result.figures.items():
        console.print(f"{name} {figure:.3g}" if isinstance(figure, float) else f"{name} {figure}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.policy_live", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round of {QUICK_DURATION_S:.0f} s an arm")
    parser.add_argument("--rounds", type=int, help=f"rounds (default {ROUNDS})")
    parser.add_argument("--rate", type=float, default=RATE_PER_S, help=f"requests a second (default {RATE_PER_S:g})")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    num_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if num_rounds < 1 or options.rate <= 0:
        parser.error("--rounds and --rate must be positive")
    workload = Workload(options.rate, QUICK_DURATION_S if options.quick else DURATION_S)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    urgent = {name: Urgent() for name in URGENCIES}
    ray: RayCluster | None = None
    try:
        checks.parse_engine_argv((config().model, *config().engine_argv))
        ray = RayCluster.start_local(NUM_INSTANCES)
        found = asyncio.run(rounds(ray, workload, num_rounds, console, urgent))
    except OrchestratorError as error:
        sys.stderr.write(f"bench.policy_live: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if ray is not None:
            ray.shutdown()
    result = result_of(found, urgent, num_rounds)
    show(result, console)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    groups = [*found.values(), *(group for arm in urgent.values() for group in (arm.urgent, arm.others))]
    return 0 if all(group.num_errors == 0 for group in groups) else 1


if __name__ == "__main__":
    sys.exit(main())
