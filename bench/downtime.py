"""How long does a request stand still when it moves, and what do the others feel?

    python -m bench.downtime [--quick] [--json FILE] [--picture FILE]

Two real instances on this machine. A request of the wanted length decodes at the source, is moved in one of three ways
(live; blocking: stop, copy all; re-prefill: stop, copy nothing, compute again) and goes on at the destination. The
arms are interleaved in one run. Downtime is the gap between the end of the last step that gave a token at the source
and the end of the first one at the destination, both on this machine's clock.

The second part lets other requests decode on both sides and compares their token gaps during a live copy with those
just before it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.downtime_picture import draw
from bench.fleet import Fleet, FleetError, Stream
from bench.report import Result, Value, spread_of, this_machine, write_result
from instance.spec import MigrationSummary

MODEL = Path(__file__).parent / "models" / "tiny"
MODES = ("live", "blocking", "recompute")
NAMES = {"live": "live", "blocking": "blocking copy", "recompute": "re-prefill"}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QUICK_LENGTHS = (256, 2048, 8192)
SETTLE_TOKENS = 24
"""Tokens decoded at the source before the move, and what the step time is taken from."""
AFTER_TOKENS = 4
OTHERS_LENGTH = 200
BEFORE_S = 0.25
"""Gaps of the others are compared with those of this long before the copy began."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One move: its downtime and what it cost."""

    mode: str
    length: int
    downtime_s: float
    step_s: float
    """Median gap between tokens at the source just before."""
    summary: MigrationSummary


def engine_argv(longest: int) -> tuple[str, ...]:
    """Room for one request of the longest kind beside the others on each side."""
    return (
        str(MODEL),
        "--dtype",
        "float32",
        "--max-model-len",
        str(longest + 2048),
        "--kv-cache-memory-bytes",
        str(192 << 20),
        "--max-num-seqs",
        "16",
    )


def prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids that no earlier request began with, so that no prefix cache spares the copy."""
    return [rng.randrange(16, 512) for _ in range(num_tokens)]


async def move_once(fleet: Fleet, rng: random.Random, mode: str, length: int) -> Arm:
    """Decode at the source, move, decode at the destination. Raises FleetError when the move did not commit."""
    stream = fleet.submit("source", prompt(rng, length - SETTLE_TOKENS), max_tokens=1024)
    await stream.wait_tokens(SETTLE_TOKENS)
    summary = await fleet.migrate(stream, "source", "destination", mode)
    if summary.outcome != "committed":
        raise FleetError(f"a {mode} migration of {length} tokens ended {summary.outcome}: {summary.reason}")
    num_moved = sum(token.instance == "source" for token in stream.tokens)
    await stream.wait_tokens(num_moved + AFTER_TOKENS)
    fleet.abort(stream)
    source = [token.at_s for token in stream.tokens if token.instance == "source"]
    destination = [token.at_s for token in stream.tokens if token.instance == "destination"]
    gaps = [after - before for before, after in pairwise(source[2:])]
    return Arm(mode, length, destination[0] - source[-1], median(gaps), summary)


async def downtimes(fleet: Fleet, rng: random.Random, lengths: Sequence[int], trials: int, say: Progress) -> list[Arm]:
    """Every length and mode, `trials` times, in shuffled order within each round; the first round warms up."""
    arms: list[Arm] = []
    task = say.add_task("downtime", total=(trials + 1) * len(lengths) * len(MODES))
    for trial in range(trials + 1):
        plan = [(mode, length) for length in lengths for mode in MODES]
        rng.shuffle(plan)
        for mode, length in plan:
            arm = await move_once(fleet, rng, mode, length)
            say.advance(task)
            if trial:
                arms.append(arm)
    return arms


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Mean gap of the others' tokens on one instance, during one live copy and just before."""

    instance: str
    length: int
    before_s: float
    during_s: float

    @property
    def ratio(self) -> float:
        return self.during_s / self.before_s


def gaps_between(streams: Sequence[Stream], first_s: float, end_s: float) -> list[float]:
    """Gaps between neighbouring tokens that overlap the span."""
    gaps: list[float] = []
    for stream in streams:
        times = [token.at_s for token in stream.tokens]
        gaps += [after - before for before, after in pairwise(times) if after > first_s and before < end_s]
    return gaps


async def slowdowns(
    fleet: Fleet, rng: random.Random, lengths: Sequence[int], trials: int, others: int, say: Progress
) -> list[Slowdown]:
    """Live moves beside `others` requests that decode on each side."""
    found: list[Slowdown] = []
    task = say.add_task("slow-down of others", total=(trials + 1) * len(lengths))
    for trial in range(trials + 1):
        for length in lengths:
            rows = await _slowdown_once(fleet, rng, length, others)
            found += rows if trial else []  # the first round warms up
            say.advance(task)
    return found


async def _slowdown_once(fleet: Fleet, rng: random.Random, length: int, others: int) -> list[Slowdown]:
    beside = {
        name: [fleet.submit(name, prompt(rng, OTHERS_LENGTH), max_tokens=1800) for _ in range(others)]
        for name in fleet.instances
    }
    moved = fleet.submit("source", prompt(rng, length - SETTLE_TOKENS), max_tokens=1024)
    await moved.wait_tokens(SETTLE_TOKENS)
    everyone = [stream for streams in beside.values() for stream in streams]
    for stream in everyone:
        await stream.wait_tokens(SETTLE_TOKENS)
    await asyncio.sleep(BEFORE_S)
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    summary = await fleet.migrate(moved, "source", "destination")
    if summary.outcome != "committed":
        raise FleetError(f"a live migration of {length} tokens ended {summary.outcome}: {summary.reason}")
    # The copy, without the stop: what is asked is what copying costs those who decode meanwhile.
    end_s = begun_s + summary.duration_s - summary.stopped_s
    for stream in everyone:
        await stream.wait_tokens(len(stream.tokens) + 2)
    fleet.abort(moved, *everyone)
    rows: list[Slowdown] = []
    for name, streams in beside.items():
        during = gaps_between(streams, begun_s, end_s)
        before = gaps_between(streams, begun_s - BEFORE_S, begun_s)
        if during and before:
            rows.append(Slowdown(name, length, fmean(before), fmean(during)))
    return rows


def figures(arms: Sequence[Arm], slow: Sequence[Slowdown]) -> dict[str, float | int | None]:
    """The bars' numbers, from medians. `downtime_growth` is of the longest length over the shortest."""
    by_arm: dict[tuple[str, int], list[float]] = defaultdict(list)
    for arm in arms:
        by_arm[arm.mode, arm.length].append(arm.downtime_s)
    shortest, longest = min(arm.length for arm in arms), max(arm.length for arm in arms)
    live = median(by_arm["live", longest])
    return {
        "downtime_growth_256_8k": live / median(by_arm["live", shortest]),
        "live_over_reprefill_8k": live / median(by_arm["recompute", longest]),
        "others_slowdown": median(row.ratio for row in slow) - 1.0,
    }


def table_of(arms: Sequence[Arm]) -> Table:
    table = Table(title="downtime: median and p10 .. p90 of n moves")
    table.add_column("tokens", justify="right")
    table.add_column("how")
    for name in ("n", "downtime ms", "decode steps", "step ms", "stopped ms", "blocks before + after stop", "MB"):
        table.add_column(name, justify="right")
    for length in sorted({arm.length for arm in arms}):
        for mode in MODES:
            rows = [arm for arm in arms if arm.length == length and arm.mode == mode]
            down = spread_of([arm.downtime_s * 1e3 for arm in rows])
            steps = median(arm.downtime_s / arm.step_s for arm in rows)
            last = rows[-1].summary
            table.add_row(
                str(length),
                NAMES[mode],
                str(len(rows)),
                f"{down['median']:.1f} ({down['p10']:.1f} .. {down['p90']:.1f})",
                f"{steps:.1f}",
                f"{median(arm.step_s for arm in rows) * 1e3:.1f}",
                f"{median(arm.summary.stopped_s for arm in rows) * 1e3:.1f}",
                f"{last.copied_blocks} + {last.tail_blocks}",
                f"{last.num_bytes / 1e6:.1f}",
            )
    return table


def slow_table(slow: Sequence[Slowdown]) -> Table:
    table = Table(title="gaps between tokens of the others, during a live copy over just before")
    for name in ("tokens moved", "at", "n", "before ms", "during ms", "ratio"):
        table.add_column(name, justify="right")
    for length in sorted({row.length for row in slow}):
        for name in ("source", "destination"):
            rows = [row for row in slow if row.length == length and row.instance == name]
            ratio = spread_of([row.ratio for row in rows])
            table.add_row(
                str(length),
                name,
                str(len(rows)),
                f"{median(row.before_s for row in rows) * 1e3:.2f}",
                f"{median(row.during_s for row in rows) * 1e3:.2f}",
                f"{ratio['median']:.3f} ({ratio['p10']:.3f} .. {ratio['p90']:.3f})",
            )
    return table


def result_of(arms: Sequence[Arm], slow: Sequence[Slowdown]) -> Result:
    keyed: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        keyed[f"{arm.mode}_{arm.length}"].append(arm)
    described: dict[str, dict[str, Value]] = {
        name: {
            "downtime_ms": median(arm.downtime_s for arm in rows) * 1e3,
            "downtime_steps": median(arm.downtime_s / arm.step_s for arm in rows),
            "step_ms": median(arm.step_s for arm in rows) * 1e3,
            "stopped_ms": median(arm.summary.stopped_s for arm in rows) * 1e3,
            "num_bytes": rows[-1].summary.num_bytes,
        }
        for name, rows in keyed.items()
    }
    ratios = [row.ratio for row in slow]
    return Result(
        name="downtime",
        command=shlex.join(["python", "-m", "bench.downtime", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures(arms, slow),
        arms=described,
        n={name: len(rows) for name, rows in keyed.items()} | {"others": len(ratios)},
        spread={
            f"{name}_downtime_ms": spread_of([arm.downtime_s * 1e3 for arm in rows]) for name, rows in keyed.items()
        }
        | {"others_ratio": spread_of(ratios)},
        machine=this_machine(),
    )


async def run(options: argparse.Namespace, console: Console) -> Result:
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    trials = options.trials or (3 if options.quick else 9)
    rng = random.Random(options.seed)
    console.print("starting two instances ...")
    async with Fleet.running(("source", "destination"), engine_argv(max(lengths))) as fleet:
        with Progress(console=console, transient=True) as say:
            arms = await downtimes(fleet, rng, lengths, trials, say)
            slow = await slowdowns(fleet, rng, lengths[-2:], max(4, trials), options.others, say)
    console.print(table_of(arms))
    console.print(slow_table(slow))
    if options.picture:
        points = {
            (NAMES[mode], length): [arm.downtime_s * 1e3 for arm in arms if (arm.mode, arm.length) == (mode, length)]
            for mode in MODES
            for length in lengths
        }
        draw(points, options.picture)
        console.print(f"picture: {options.picture}")
    return result_of(arms, slow)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.downtime", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="three lengths, three trials")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--picture", type=Path, default=Path("bench-out/downtime.png"))
    parser.add_argument("--trials", type=int, default=0, help="moves an arm (default 9; 3 with --quick)")
    parser.add_argument("--others", type=int, default=2, help="requests that decode beside it on each side (default 2)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        result = asyncio.run(run(options, console))
    except FleetError as error:
        console.print(f"bench.downtime: {error}", style="red")
        return 2
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
