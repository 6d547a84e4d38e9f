"""Does moving running requests help those who wait? Real engines, the same requests for each arm, arms in turns.

    python -m bench.policy_live [--quick] [--json FILE] [--rounds N] [--load SHARE] [--only PART] [--dispatch RULE]

Two CPU instances of the small model behind one gateway, with few KV blocks, so that memory is what runs out. First it
is found what they finish a second when they are full; the load is a share of that, so that it means the same on each
machine. Arms: *round-robin* (each instance in turn, whatever its load: it makes the load skewed), *dispatch* (by
freeness), and both with running and waiting requests that move (*rebalance*). A round sends one plan of requests (Gamma
arrivals, heavy-tailed lengths) to each arm, in another order each time; between arms only the orchestrator is replaced.
Then the same under overload, where a tenth of the requests are urgent: told to the fleet (`x-kvferry-priority: high`),
and not. Then one instance of the two is taken away under load. Last, `bench.priority_effect`. TTFT is what a streaming
client saw.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import priority_effect
from bench.policy_live_runs import (
    ARMS,
    NUM_INSTANCES,
    URGENCIES,
    Arm,
    Measured,
    Urgent,
    capacity,
    config,
    mean,
    percentile,
    play,
    play_scaled_in,
    play_urgent,
)
from bench.policy_workload import Workload
from bench.report import Result, Value, spread_of, this_machine, write_result
from orchestrator.demo.cluster import Cluster, running_cluster
from orchestrator.demo.warmup import warm_up
from orchestrator.errors import OrchestratorError
from orchestrator.policy.dispatch import Rule
from orchestrator.runtime import checks
from orchestrator.runtime.ray_cluster import RayCluster

ROUNDS, DURATION_S = 4, 60.0
QUICK_ROUNDS, QUICK_DURATION_S = 1, 20.0
LOAD = 0.8
"""Of what the fleet finishes when it is full: on the average there is room, in a burst there is not."""
OVERLOAD = 1.2
SCALE_IN_LOAD = 0.3
"""One instance must be able to hold it."""
MAX_SCALE_INS = 3
ARMS_PART, OVERLOAD_PART, SCALE_IN_PART, EFFECT_PART = "arms", "overload", "scale-in", "priority-effect"
PARTS = (ARMS_PART, OVERLOAD_PART, SCALE_IN_PART, EFFECT_PART)


@dataclass(slots=True)
class Found:
    """What was measured so far."""

    capacity_per_s: float = 0.0
    arms: dict[str, Measured] = field(default_factory=lambda: {arm.name: Measured() for arm in ARMS})
    urgent: dict[str, Urgent] = field(default_factory=lambda: {name: Urgent() for name in URGENCIES})
    scaled: Measured = field(default_factory=Measured)
    effect: list[priority_effect.Round] = field(default_factory=list)

    def groups(self) -> list[Measured]:
        overload = [group for arm in self.urgent.values() for group in (arm.urgent, arm.others)]
        return [*self.arms.values(), *overload, self.scaled]


@dataclass(frozen=True, slots=True)
class Shape:
    num_rounds: int
    duration_s: float
    load: float
    parts: tuple[str, ...] = PARTS
    arms: tuple[Arm, ...] = ARMS

    def workload(self, capacity_per_s: float, load: float) -> Workload:
        return Workload(capacity_per_s * load, self.duration_s)


async def measure(ray: RayCluster, shape: Shape, console: Console, found: Found) -> None:
    async with running_cluster(ray, config(), console) as cluster:
        await warm_up(cluster.base_url, cluster.model, "warm", console)
        found.capacity_per_s = await capacity(cluster, Workload(1.0, shape.duration_s))
        console.print(f"full, it finishes {found.capacity_per_s:.2f} requests a second", highlight=False)
        for part, play_it in ((ARMS_PART, _play_arms), (OVERLOAD_PART, _play_overload), (SCALE_IN_PART, _scale_in)):
            if part in shape.parts:
                await play_it(cluster, shape, console, found)


async def _play_arms(cluster: Cluster, shape: Shape, console: Console, found: Found) -> None:
    workload = shape.workload(found.capacity_per_s, shape.load)
    for number in range(shape.num_rounds):
        for turn in range(len(shape.arms)):
            arm = shape.arms[(number + turn) % len(shape.arms)]
            measured = found.arms[arm.name]
            await play(cluster, arm, workload, seed=number + 1, measured=measured)
            told = (
                f"{arm.name}: P99 TTFT {measured.p99_ttft_s[-1]:.2f} s, {measured.num_preemptions} preempted and "
                f"{measured.num_moved} moved so far"
            )
            console.print(f"round {number + 1} of {shape.num_rounds}, {told}", highlight=False)


async def _play_overload(cluster: Cluster, shape: Shape, console: Console, found: Found) -> None:
    workload = shape.workload(found.capacity_per_s, OVERLOAD)
    for number in range(shape.num_rounds):
        for turn in range(len(URGENCIES)):
            name = URGENCIES[(number + turn) % len(URGENCIES)]
            measured = found.urgent[name]
            await play_urgent(cluster, name, workload, seed=number + 101, measured=measured)
            told = (
                f"{name}: urgent {mean(measured.urgent.ttft_s):.2f} s to the first token, "
                f"{mean(measured.urgent.tpot_s) * 1e3:.1f} ms a token in the mean so far"
            )
            console.print(f"overload, round {number + 1} of {shape.num_rounds}, {told}", highlight=False)


async def _scale_in(cluster: Cluster, shape: Shape, console: Console, found: Found) -> None:
    gentle = shape.workload(found.capacity_per_s, SCALE_IN_LOAD)
    for number in range(min(shape.num_rounds, MAX_SCALE_INS)):
        await play_scaled_in(cluster, gentle, number + 201, found.scaled)
        owned, gone_s = found.scaled.owned[-1], found.scaled.gone_after_s[-1]
        told = f"{len(found.scaled.ttft_s)} answers, {len(found.scaled.errors)} errors so far"
        console.print(f"an instance that ran {owned} was gone after {gone_s:.1f} s, {told}", highlight=False)


def ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 and math.isfinite(numerator) else None


def gains_by_round(off: Measured, on: Measured) -> list[float]:
    """P99 of TTFT without over that with, of each round's one plan. Over all rounds together it is that of the worst
    burst of the worst round; these say how far one round agrees with another."""
    pairs = zip(off.p99_ttft_s, on.p99_ttft_s, strict=True) if off.p99_ttft_s and on.p99_ttft_s else ()
    return [before_s / after_s for before_s, after_s in pairs if before_s > 0 and after_s > 0]


def geometric_mean(ratios: Sequence[float]) -> float | None:
    return statistics.geometric_mean(ratios) if ratios else None


def preemptions(measured: Measured) -> int | None:
    """None: it was not played."""
    return measured.num_preemptions if measured.p99_ttft_s else None


def row_of(measured: Measured) -> dict[str, Value]:
    return {
        "requests": len(measured.ttft_s),
        "errors": len(measured.errors),
        "ttft_mean_s": mean(measured.ttft_s),
        "ttft_p99_s": percentile(measured.ttft_s, 99),
        "tpot_mean_ms": mean(measured.tpot_s) * 1e3,
        "tpot_p99_ms": percentile(measured.tpot_s, 99) * 1e3,
        "latency_mean_s": mean(measured.latency_s),
        "latency_p99_s": percentile(measured.latency_s, 99),
        "preemptions": measured.num_preemptions,
        "moved": measured.num_moved,
        "broken_off": measured.num_broken_off,
    }


def result_of(found: Found, shape: Shape) -> Result:
    robin, evened, off, on = (found.arms[arm.name] for arm in ARMS)
    untold, told = (found.urgent[name] for name in URGENCIES)
    arms = {name: row_of(arm) for name, arm in found.arms.items()}
    for name, arm in found.urgent.items():
        arms |= {f"overload {name}: urgent": row_of(arm.urgent), f"overload {name}: others": row_of(arm.others)}
    arms["scaled in"] = {**row_of(found.scaled), "preemptions": None}
    before_s, after_s = (percentile(arm.others.ttft_s, 99) for arm in (untold, told))
    before_all_s, after_all_s = (percentile(arm.others.latency_s, 99) for arm in (untold, told))
    return Result(
        name="policy_live",
        command=" ".join(["python", "-m", "bench.policy_live", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={
            "p99_ttft_gain_rebalance": ratio(percentile(off.ttft_s, 99), percentile(on.ttft_s, 99)),
            "p99_ttft_gain_rebalance_skewed": ratio(percentile(robin.ttft_s, 99), percentile(evened.ttft_s, 99)),
            "p99_ttft_gain_over_round_robin": ratio(percentile(robin.ttft_s, 99), percentile(on.ttft_s, 99)),
            "p99_ttft_gain_rebalance_by_round": geometric_mean(gains_by_round(off, on)),
            "p99_ttft_gain_rebalance_skewed_by_round": geometric_mean(gains_by_round(robin, evened)),
            "mean_ttft_gain_rebalance": ratio(mean(off.ttft_s), mean(on.ttft_s)),
            "mean_ttft_gain_rebalance_skewed": ratio(mean(robin.ttft_s), mean(evened.ttft_s)),
            "preemptions_on": preemptions(on),
            "preemptions_off": preemptions(off),
            "preemptions_skewed_on": preemptions(evened),
            "preemptions_skewed_off": preemptions(robin),
            "high_ttft_gain": ratio(mean(untold.urgent.ttft_s), mean(told.urgent.ttft_s)),
            "high_tpot_gain": ratio(mean(untold.urgent.tpot_s), mean(told.urgent.tpot_s)),
            "normal_p99_ttft_cost": after_s / before_s - 1 if before_s > 0 else None,
            "normal_p99_latency_cost": after_all_s / before_all_s - 1 if before_all_s > 0 else None,
            "priority_effect_s": max((one.neighbour_left_s for one in found.effect), default=None),
            "scale_in_errors": len(found.scaled.errors) if found.scaled.owned else None,
        },
        arms=arms,
        n={
            "rounds": shape.num_rounds,
            "requests_an_arm": max(len(arm.ttft_s) + len(arm.errors) for arm in found.arms.values()),
            "urgent_requests": len(told.urgent.ttft_s),
            "scale_ins": len(found.scaled.p99_ttft_s),
            "priority_changes": len(found.effect),
        },
        spread={f"p99_ttft_s_{name}": spread_of(arm.p99_ttft_s) for name, arm in found.arms.items()}
        | {
            "p99_ttft_gain_rebalance": spread_of(gains_by_round(off, on)),
            "p99_ttft_gain_rebalance_skewed": spread_of(gains_by_round(robin, evened)),
        }
        | {f"urgent_ttft_s_{name}": spread_of(arm.urgent.ttft_s) for name, arm in found.urgent.items()}
        | {f"urgent_tpot_s_{name}": spread_of(arm.urgent.tpot_s) for name, arm in found.urgent.items()}
        | {
            "capacity_per_s": spread_of([found.capacity_per_s]),
            "owned_when_taken_away": spread_of([float(owned) for owned in found.scaled.owned]),
            "gone_after_s": spread_of(found.scaled.gone_after_s),
        },
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


def tell(result: Result, path: Path | None, console: Console) -> None:
    show(result, console)
    if path:
        write_result(path, result)
        console.print(f"result: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.policy_live", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round of {QUICK_DURATION_S:.0f} s an arm")
    parser.add_argument("--rounds", type=int, help=f"rounds (default {ROUNDS})")
    parser.add_argument("--load", type=float, default=LOAD, help=f"share of what the fleet holds (default {LOAD:g})")
    parser.add_argument("--only", choices=PARTS, help="this part of it alone")
    parser.add_argument(
        "--dispatch", choices=[rule.value for rule in Rule], help="of the arms those that dispatch like this alone"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    num_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if num_rounds < 1 or options.load <= 0:
        parser.error("--rounds and --load must be positive")
    parts = (options.only,) if options.only else PARTS
    arms = tuple(arm for arm in ARMS if options.dispatch in (None, arm.dispatch.value))
    shape = Shape(num_rounds, QUICK_DURATION_S if options.quick else DURATION_S, options.load, parts, arms)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    found = Found()
    ray: RayCluster | None = None
    try:
        if parts != (EFFECT_PART,):
            checks.parse_engine_argv((config().model, *config().engine_argv))
            ray = RayCluster.start_local(NUM_INSTANCES)
            asyncio.run(measure(ray, shape, console, found))
            ray.shutdown()
            ray = None
            tell(result_of(found, shape), options.json, console)  # what is known, should the rest fail
        if EFFECT_PART in parts:
            found.effect, _ = priority_effect.run(options.quick, console)
    except (OrchestratorError, TimeoutError) as error:
        sys.stderr.write(f"bench.policy_live: {error or 'it took too long'}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if ray is not None:
            ray.shutdown()
    tell(result_of(found, shape), options.json, console)
    for failed in (one for group in found.groups() for one in group.errors):
        console.print(f"failed: {failed}", highlight=False, markup=False)
    is_under_load = all(found.scaled.owned)
    return 0 if is_under_load and not any(group.errors for group in found.groups()) else 1


if __name__ == "__main__":
    sys.exit(main())
