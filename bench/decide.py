"""What does a decision cost, and how does that grow with the fleet?

    python -m bench.decide [--quick] [--json FILE]

*Dispatch*: one `DispatchBook.choose` and the accounting after it, at a gateway that 16 to 1,024 instances report to,
100 requests running on each. Each instance's report is taken in ten times a second of the story, between choices.
*Rebalance*: one `plan_rebalance` over views of as many instances and requests, half of them short of memory.

Pure code of production, in this process, nothing else: no wire, no clock of its own. Times are of this machine.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.report import Result, Value, spread_of, this_machine, write_result
from instance.lifecycle import State
from instance.messages import LoadReport, RequestLoad
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import Choice, DispatchBook
from orchestrator.policy.moves import InstanceView
from orchestrator.policy.rebalance import RebalanceParams, Resting, plan_rebalance

SIZES = (16, 64, 256, 1_024)
REQUESTS_EACH = 100
"""Running on each instance: 100 thousand at 1,024."""
TOTAL_BLOCKS = 8_192
CHOICES, QUICK_CHOICES = 5_000, 500
TICKS, QUICK_TICKS = 20, 3
SEED = 7
COLUMNS = ("instances", "requests", "dispatch p50", "p99", "report p99", "book MiB", "tick p50", "worst", "moves")


def load(rng: random.Random, number: int, step: int, num_seen: int = 0) -> LoadReport:
    """Of an instance that is somewhere between a seventh full and full: half of them are short of memory."""
    free = rng.randint(0, TOTAL_BLOCKS * 6 // 7)
    waiting = 0 if free > TOTAL_BLOCKS // 20 else rng.randint(1, 400)
    return LoadReport(
        instance=f"instance-{number:04}",
        epoch=1,
        step=step,
        state=State.SERVING.value,
        block_size=16,
        total_blocks=TOTAL_BLOCKS,
        free_blocks=free,
        reserved_blocks=0,
        num_running=REQUESTS_EACH,
        num_waiting=waiting // 40,
        running_by_priority=((0, REQUESTS_EACH * 9 // 10), (1, REQUESTS_EACH // 10)),
        head_of_line_blocks=min(waiting, 40),
        waiting_blocks=waiting,
        step_time_s=0.03,
        num_preemptions=0,
        migrations_in=0,
        migrations_out=0,
        submits_seen=num_seen,
    )


def time_dispatch(num_instances: int, num_choices: int) -> tuple[list[float], list[float], float]:
    """(milliseconds of each choice, of each report, MiB of the book)."""
    rng = random.Random(SEED)
    tracemalloc.start()
    book = DispatchBook()
    book.set_members([(InstanceId(load(rng, number, 0).instance), Epoch(1)) for number in range(num_instances)])
    for number in range(num_instances):
        book.on_report(load(rng, number, 0), 0.0)
    size_mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    sent = dict.fromkeys(range(num_instances), 0)
    choices_ms, reports_ms = [], []
    for turn in range(num_choices):
        now_s = turn * 0.1 / num_instances
        demand = rng.randint(1, 200)
        begun = time.perf_counter_ns()
        choice = book.choose(demand, now_s)
        assert isinstance(choice, Choice)
        sequence = book.on_dispatched(choice.instance, demand, now_s)
        choices_ms.append((time.perf_counter_ns() - begun) / 1e6)
        sent[int(choice.instance.removeprefix("instance-"))] = sequence
        number = turn % num_instances
        told = load(rng, number, turn, sent[number])
        begun = time.perf_counter_ns()
        book.on_report(told, now_s)
        reports_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return choices_ms, reports_ms, size_mib


def views_of(num_instances: int) -> tuple[InstanceView, ...]:
    rng = random.Random(SEED)
    views = []
    for number in range(num_instances):
        told = load(rng, number, 1)
        held = (told.total_blocks - told.free_blocks) // REQUESTS_EACH
        requests = tuple(
            RequestLoad(
                f"r-{number}-{i}", f"x-{number}-{i}", "running", i % 10 == 0, held * 8, held * 8, 512, held, 1.0, True
            )
            for i in range(REQUESTS_EACH)
        )
        views.append(InstanceView(InstanceId(told.instance), told, requests, False, 2, 2, 0.1))
    return tuple(views)


def time_rebalance(num_instances: int, num_ticks: int) -> tuple[list[float], int]:
    """(milliseconds of each tick, moves of a tick). Every tick plans from the same views."""
    views, params = views_of(num_instances), RebalanceParams()
    ticks_ms, num_moves = [], 0
    for _ in range(num_ticks):
        begun = time.perf_counter_ns()
        moves = plan_rebalance(views, Resting(), params)
        ticks_ms.append((time.perf_counter_ns() - begun) / 1e6)
        num_moves = len(moves)
    return ticks_ms, num_moves


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


def without_collection(work: Callable[[], None]) -> None:
    """The collector's pauses are of the whole process, not of the decision."""
    gc.collect()
    gc.disable()
    try:
        work()
    finally:
        gc.enable()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.decide", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CHOICES} choices and {QUICK_TICKS} ticks a size")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    num_choices, num_ticks = (QUICK_CHOICES, QUICK_TICKS) if options.quick else (CHOICES, TICKS)
    table = Table(title="Milliseconds of a decision", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    arms: dict[str, dict[str, Value]] = {}
    spread: dict[str, dict[str, float | int | None]] = {}

    def measure(size: int) -> None:
        choices, reports, size_mib = time_dispatch(size, num_choices)
        ticks, num_moves = time_rebalance(size, num_ticks)
        arms[str(size)] = {
            "dispatch_p50_ms": percentile(choices, 50),
            "dispatch_p99_ms": percentile(choices, 99),
            "report_p99_ms": percentile(reports, 99),
            "book_mib": size_mib,
            "rebalance_p50_ms": percentile(ticks, 50),
            "rebalance_worst_ms": max(ticks),
            "moves": num_moves,
        }
        spread[f"dispatch_ms_{size}"] = spread_of(choices)
        spread[f"rebalance_ms_{size}"] = spread_of(ticks)
        figures = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in arms[str(size)].values()]
        table.add_row(f"{size:,}", f"{size * REQUESTS_EACH:,}", *figures)

    for size in SIZES:
        without_collection(lambda size=size: measure(size))  # type: ignore[misc]
    largest = arms[str(SIZES[-1])]
    result = Result(
        name="decide",
        command=" ".join(["python", "-m", "bench.decide", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={
            "dispatch_p99_ms_1024": float(largest["dispatch_p99_ms"] or 0.0),
            "rebalance_ms_1024": float(largest["rebalance_worst_ms"] or 0.0),
        },
        arms=arms,
        n={"choices": num_choices, "ticks": num_ticks},
        spread=spread,
        machine=this_machine(),
    )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}", highlight=False)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
