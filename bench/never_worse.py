"""Is a fleet whose requests move ever worse off than one that only dispatches them? Simulated days, the same for both.

    python -m bench.never_worse [--quick] [--seeds N] [--json FILE]

For each workload it is found what a fleet finishes a second when everything has come at once; its days are sent shares
of that, from a third to more than all. Each seed is one day of each arm (`dispatch`, `ours`: `orchestrator/sim`), the
same requests at the same times. Compared are P99 of TTFT and mean latency, day by day: the geometric mean of ours over
dispatch alone, and its 95 % interval. *Worse*: all of the interval is above 1.02; *no worse*: all of it is at most
that; else the days do not tell. Workloads: Llumnix's five over four instances of its evaluation (16 there), and that of
`bench.policy_live` over two tiny ones, where a few requests fill an instance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from bench.policy_workload import OUTPUTS, PROMPTS
from bench.report import Value
from bench.sheet import result_of, show, table_of
from orchestrator.sim.arms import arm_of
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.compare import Question, compare
from orchestrator.sim.day import Day
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.paired import Ratio, ratio
from orchestrator.sim.steptime import StepTimes
from orchestrator.sim.workload import gamma_times, generated
from orchestrator.sim.world import World

WORKLOADS = ("S-S", "M-M", "L-L", "S-L", "L-S")
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
NUM_INSTANCES, NUM_REQUESTS, SEEDS = 4, 800, 10
CAPACITY_FACTOR = 3
"""So many more requests, when it is found what a fleet finishes."""
QUICK_WORKLOADS, QUICK_LOADS, QUICK_SEEDS = ("M-M",), (0.7, 1.0), 4
OFF, ON = "dispatch", "ours"
BAR = 1.02
"""The interval must end below it, and it begin above it for a row to be a losing one."""

TINY = LengthConfig(num_blocks=64, block_size=32, max_model_len=1_664, max_num_seqs=64, bytes_per_token=1_024)
TINY_TIMES = StepTimes(base_s=0.004, token_s=0.0002, request_s=0.0013)
"""About the small model on two cores: 20 ms a token where ten requests run."""


@dataclass(frozen=True, slots=True)
class Tiny(Question):
    """The requests of `bench.policy_live`: the same lengths and gaps, other draws."""

    def arrivals(self, seed: int) -> list[Arrival]:
        rng = Random(seed)
        times = gamma_times(rng, self.requests_per_s, self.coefficient_of_variation)
        arrivals = generated(rng, PROMPTS, OUTPUTS, times, self.num_requests)
        return [replace(one, max_tokens=one.num_answer) for one in arrivals]


def questions(names: Sequence[str]) -> dict[str, Question]:
    """By name, at a rate that is still to be set."""
    asked: dict[str, Question] = {
        name: Question(workload=name, num_requests=NUM_REQUESTS, num_instances=NUM_INSTANCES) for name in names
    }
    tiny = Tiny(coefficient_of_variation=2.0, num_requests=NUM_REQUESTS // 2, num_instances=2, times=TINY_TIMES)
    return asked | {"tiny": replace(tiny, engine=TINY)}


def capacity(question: Question) -> float:
    """Requests a second that the fleet finishes while it is full: output tokens a second on a day on which all come at
    once, while a fifth to three fifths of them have begun, over the mean length of an answer."""
    many = replace(question, num_requests=CAPACITY_FACTOR * question.num_requests)
    arrivals = [replace(one, at_s=0.0) for one in many.arrivals(seed=0)]

    async def play() -> list[Lived]:
        return await World(many.world(arm_of(OFF), 0)).play(arrivals)

    lived = run_jumping(play())
    begun_s = sorted(one.first_s for one in lived)
    first_s, last_s = begun_s[len(lived) // 5], begun_s[3 * len(lived) // 5]
    num_tokens = sum(one.num_tokens * _overlap(one, first_s, last_s) for one in lived)
    return num_tokens / (last_s - first_s) / statistics.fmean(one.num_answer for one in arrivals)


def _overlap(lived: Lived, first_s: float, last_s: float) -> float:
    """Share of its tokens that came then."""
    span_s = lived.last_s - lived.first_s
    if span_s <= 0:
        return float(first_s <= lived.last_s < last_s)
    return max(0.0, min(last_s, lived.last_s) - max(first_s, lived.first_s)) / span_s


def verdict(found: Ratio) -> str:
    return "worse" if found.low > BAR else "no worse" if found.high <= BAR else "not told"


def rows_of(days: Sequence[Day]) -> dict[str, Value]:
    off, on = ([day for day in days if day.arm == arm] for arm in (OFF, ON))
    row: dict[str, Value] = {}
    for name, ttft, latency in (("off", off, off), ("on", on, on)):
        row[f"{name}_ttft_p99_s"] = statistics.fmean(day.scores[""].ttft_s.p99 for day in ttft)
        row[f"{name}_latency_s"] = statistics.fmean(day.scores[""].latency_s.mean for day in latency)
    tails = ratio([day.scores[""].ttft_s.p99 for day in off], [day.scores[""].ttft_s.p99 for day in on])
    means = ratio([day.scores[""].latency_s.mean for day in off], [day.scores[""].latency_s.mean for day in on])
    for name, found in (("ttft_p99", tails), ("latency", means)):
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_is": verdict(found)}
    counts = [(day.counts.preemptions, day.counts.migrations) for day in on]
    row["preemptions_off"] = sum(day.counts.preemptions for day in off)
    row["preemptions_on"], row["moved"] = (sum(part) for part in zip(*counts, strict=True))
    return row


def _table(arms: Mapping[str, Mapping[str, Value]]) -> Table:
    columns = (
        "load",
        "req/s",
        "P99 TTFT s",
        "ours",
        "ratio",
        "interval",
        "",
        "latency s",
        "ours",
        "ratio",
        "interval",
        "",
    )
    table = table_of("ours over dispatch alone", columns)
    for name, row in arms.items():
        cells = [name, f"{row['rate']:.3g}"]
        for what, unit in (("ttft_p99", "ttft_p99_s"), ("latency", "latency_s")):
            cells += [f"{row[f'off_{unit}']:.3g}", f"{row[f'on_{unit}']:.3g}", f"{row[what]:.3f}"]
            cells += [f"{row[f'{what}_low']:.3f} .. {row[f'{what}_high']:.3f}", str(row[f"{what}_is"])]
        table.add_row(*cells)
    return table


def _figures(arms: Mapping[str, Mapping[str, Value]]) -> dict[str, float]:
    """How many comparisons came out how."""
    verdicts = [str(row[f"{what}_is"]) for row in arms.values() for what in ("ttft_p99", "latency")]
    return {verdict.replace(" ", "_"): float(verdicts.count(verdict)) for verdict in ("worse", "no worse", "not told")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.never_worse", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    quick_help = f"{', '.join(QUICK_WORKLOADS)} and tiny, two loads, {QUICK_SEEDS} seeds"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    parser.add_argument("--seeds", type=int, help=f"days of each arm, workload and load (default {SEEDS})")
    parser.add_argument("--workload", help="this one alone")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    asked = questions(QUICK_WORKLOADS if options.quick else WORKLOADS)
    if seeds < 2:
        parser.error("--seeds must be at least 2")
    if options.workload and options.workload not in asked:
        parser.error(f"--workload is one of {', '.join(asked)}")
    chosen = [options.workload] if options.workload else list(asked)
    console = Console(stderr=True)
    arms: dict[str, dict[str, Value]] = {}
    for name in chosen:
        per_s = capacity(asked[name])
        for load in QUICK_LOADS if options.quick else LOADS:
            question = replace(asked[name], requests_per_s=load * per_s)
            days = list(compare(question, (OFF, ON), range(1, seeds + 1)))
            row = arms[f"{name} {load:g}"] = {"rate": load * per_s, **rows_of(days)}
            console.print(
                f"{name} at {load:g}: P99 of TTFT {row['ttft_p99_is']}, latency {row['latency_is']}", highlight=False
            )
    show(
        [_table(arms)],
        result_of("never_worse", _figures(arms), arms, {"rows": len(arms), "seeds": seeds}, {}),
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
