"""How long does a simulated day of a thousand instances take, and is it the same day twice?

    python -m bench.sim_scale [--quick] [--data DIR] [--json FILE]

The Azure conversation trace (2023), so much faster that each instance (LLaMA-2-7B on an A100, by
`step_time_models.json`) gets 4 requests a second, about half of what it could serve: 1,024 instances and 100,000
requests, twice, and 64 instances with as many each. Each day in a process of its own: wall time of the day itself, peak
of the process's memory (RSS), SHA-256 of the orchestrator's journal and of every request's times. *Growth*:
processor time a request at 1,024 instances over that at 64 (wall time tells of what else the machine does, too).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median

from rich.table import Table

from bench.report import Value
from bench.sheet import result_of, show, table_of
from orchestrator.config import data_folder
from orchestrator.sim.arms import ARMS
from orchestrator.sim.arrivals import Lived
from orchestrator.sim.compare import MAX_LAW_GAP, Question
from orchestrator.sim.jumping_loop import few_collections, run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.score import littles_law_gap, score
from orchestrator.sim.steptime import from_profile
from orchestrator.sim.world import World

PER_INSTANCE_S = 4.0
NUM_REQUESTS, LARGE, SMALL = 100_000, 1_024, 64
QUICK_NUM_REQUESTS, QUICK_LARGE, QUICK_SMALL = 2_000, 32, 8
MODEL = "llama2-7b/a100-80g/tp1"
ENGINE = LengthConfig(num_blocks=6_700, max_model_len=16_384)
"""107,000 tokens: 0.9 of 80 GB less the weights and what a step needs, at 512 KiB a token."""
GIB = float(2**30)


@dataclass(frozen=True, slots=True)
class Played:
    """One day."""

    num_requests: int
    wall_s: float
    cpu_s: float
    virtual_s: float
    peak_gib: float
    digest: str
    journal_digest: str
    ttft_p99_s: float
    num_failed: int
    moved: int


def question(num_instances: int, num_requests: int, data: Path) -> Question:
    profiles = json.loads((data / "profiles" / "step_time_models.json").read_text())
    return Question(
        workload="azure-conv",
        requests_per_s=PER_INSTANCE_S * num_instances,
        num_requests=num_requests,
        num_instances=num_instances,
        times=from_profile(profiles, MODEL),
        engine=ENGINE,
        data=str(data),
    )


def play(asked: Question, hashes_journal: bool) -> Played:
    """In this process, which should have done nothing else. Raises RuntimeError when the lives told do not add up."""
    arrivals = asked.arrivals(seed=1)

    async def day() -> tuple[World, list[Lived]]:
        world = World(replace(asked.world(ARMS["ours"], seed=1), hashes_journal=hashes_journal))
        return world, await world.play(arrivals)

    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    with few_collections():
        world, lived = run_jumping(day())
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    if littles_law_gap(lived) > MAX_LAW_GAP:
        raise RuntimeError("requests present and latencies differ (Little's law)")
    told = score(lived)
    times = [(one.sent_s, one.first_s, one.last_s, one.num_tokens, one.error) for one in lived]
    return Played(
        num_requests=len(lived),
        wall_s=wall_s,
        cpu_s=cpu_s,
        virtual_s=max(one.last_s for one in lived),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        digest=sha256(repr(times).encode()).hexdigest(),
        journal_digest=world.journal.digest() if world.journal is not None else "",
        ttft_p99_s=told.ttft_s.p99,
        num_failed=sum(bool(one.error) for one in lived),
        moved=world.counts().migrations,
    )


def in_its_own_process(asked: Question, hashes_journal: bool) -> Played:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(play, (asked, hashes_journal))


def _table(days: Mapping[str, Played]) -> Table:
    columns = (
        "day",
        "requests",
        "wall s",
        "cpu s",
        "virtual s",
        "ms a request",
        "peak GiB",
        "P99 TTFT s",
        "moved",
        "journal",
    )
    table = table_of("simulated days", columns)
    for name, day in days.items():
        each_ms = 1e3 * day.wall_s / day.num_requests
        cells = (
            f"{day.wall_s:.1f}",
            f"{day.cpu_s:.1f}",
            f"{day.virtual_s:.1f}",
            f"{each_ms:.3f}",
            f"{day.peak_gib:.2f}",
        )
        table.add_row(
            name,
            f"{day.num_requests:,}",
            *cells,
            f"{day.ttft_p99_s:.2f}",
            str(day.moved),
            day.journal_digest[:12] or "-",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.sim_scale", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    quick_help = f"{QUICK_LARGE} and {QUICK_SMALL} instances, {QUICK_NUM_REQUESTS:,} requests"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    parser.add_argument("--data", type=Path, help="folder of the traces and profiles (default: KVFERRY_DATA)")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    data = data_folder(options.data)
    if data is None:
        parser.error("the trace is not part of the project: name its folder with --data or KVFERRY_DATA")
    large, small, count = (LARGE, SMALL, NUM_REQUESTS)
    if options.quick:
        large, small, count = QUICK_LARGE, QUICK_SMALL, QUICK_NUM_REQUESTS
    asked = {size: question(size, count * size // large, data) for size in (large, small)}
    days = {
        f"{large} instances": in_its_own_process(asked[large], False),
        f"{large} again": in_its_own_process(asked[large], False),
        f"{large}, journal": in_its_own_process(asked[large], True),
        f"{large}, journal again": in_its_own_process(asked[large], True),
    }
    days |= {f"{small} instances, {number}": in_its_own_process(asked[small], False) for number in (1, 2, 3)}
    of_large, of_small = (
        [day for name, day in days.items() if name in named] for named in (list(days)[:2], list(days)[4:])
    )
    all_large = list(days.values())[:4]
    identical = (
        len({day.digest for day in all_large}) == 1 and all_large[2].journal_digest == all_large[3].journal_digest
    )
    costs = [median(day.cpu_s / day.num_requests for day in group) for group in (of_large, of_small)]
    figures = {
        "wall_s_1024x100k": max(day.wall_s for day in of_large),
        "wall_s_with_journal": max(day.wall_s for day in all_large[2:]),
        "peak_gib": max(day.peak_gib for day in all_large),
        "identical": float(identical),
        "cost_growth_64_1024": costs[0] / costs[1],
        "failed": float(sum(day.num_failed for day in days.values())),
    }
    rows: dict[str, dict[str, Value]] = {
        name: {part: getattr(day, part) for part in Played.__dataclass_fields__} for name, day in days.items()
    }
    show(
        [_table(days)], result_of("sim_scale", figures, rows, {"requests": count, "instances": large}, {}), options.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
