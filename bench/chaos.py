"""Does a fleet keep its promises on days of faults? Seeds of chaos in virtual time, held against all invariants.

    python -m bench.chaos [--seeds N] [--from N] [--json FILE]

Each seed is a small fleet, its requests and its faults (`orchestrator/sim/chaos.py`): crashes, hangs, partitions, lost
messages, drains, scaling, moves by hand, clients that leave. What must hold is in `orchestrator/sim/invariants.py`. A
seed on which something does not hold prints its story; `--seeds 1 --from SEED` plays it again. Every tenth day is
played twice and must leave the same journal, to the byte. Exit status 1: something did not hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import cpu_count, get_context
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.report import Value
from bench.sheet import result_of, show
from orchestrator.sim.chaos import day_of, play, played_again

SEEDS = 1_000
REPEATED_EVERY = 10
_SEEDS_A_JOB = 5
_MAX_STORIES = 5
_MOVED = "committed"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one seed, or of many; small enough to come from another process."""

    num_seeds: int
    failing: tuple[int, ...]
    stories: tuple[str, ...]
    faults: Counter[str]
    outcomes: Counter[str]
    """Of migrations."""
    requests: Counter[str]
    """By what became of them."""
    num_lost: int
    """Messages."""

    def and_(self, other: Figures) -> Figures:
        return Figures(
            self.num_seeds + other.num_seeds,
            (*self.failing, *other.failing),
            (*self.stories, *other.stories)[:_MAX_STORIES],
            self.faults + other.faults,
            self.outcomes + other.outcomes,
            self.requests + other.requests,
            self.num_lost + other.num_lost,
        )


NOTHING = Figures(0, (), (), Counter(), Counter(), Counter(), 0)


def figures_of(seed: int) -> Figures:
    """Play one seed in this process."""
    day = day_of(seed)
    verdict = play(day)
    if not verdict.broken and seed % REPEATED_EVERY == 0:
        verdict = played_again(day, verdict)
    ends = Counter(verdict.failures)
    ends["whole"] = sum(not lived.error for lived in verdict.lived)
    is_broken = bool(verdict.broken)
    return Figures(
        1,
        (seed,) if is_broken else (),
        (verdict.story(),) if is_broken else (),
        Counter(verdict.began),
        Counter(verdict.outcomes),
        ends,
        verdict.num_lost,
    )


def _some(seeds: range) -> Figures:
    total, before = NOTHING, logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what the parts log of the faults is no news
    try:
        for seed in seeds:
            total = total.and_(figures_of(seed))
    finally:
        logging.disable(before)
    return total


def played(seeds: range) -> Iterator[Figures]:
    """Some of them at a time, as they come; as many processes as there are processors."""
    jobs = [seeds[at : at + _SEEDS_A_JOB] for at in range(0, len(seeds), _SEEDS_A_JOB)]
    num_workers = min(len(jobs), cpu_count())
    if num_workers <= 1:
        yield from map(_some, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_some, jobs)


def _table(total: Figures) -> Table:
    table = Table("what", "how many", title=f"{total.num_seeds} days of chaos", title_justify="left")
    table.columns[1].justify = "right"
    for title, counted in (("faults", total.faults), ("migrations", total.outcomes), ("requests", total.requests)):
        table.add_section()
        table.add_row(title, f"{counted.total():,}", style="bold")
        for name, count in counted.most_common():
            table.add_row(f"  {name}", f"{count:,}")
    table.add_section()
    table.add_row("messages lost", f"{total.num_lost:,}")
    table.add_row("seeds on which something did not hold", str(len(total.failing)), style="bold")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.chaos", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default {SEEDS})")
    parser.add_argument("--from", type=int, default=0, metavar="N", dest="first", help="the first one (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.first < 0:
        parser.error("--seeds must be 1 or more, --from 0 or more")
    began_s = time.monotonic()
    total = NOTHING
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("days of chaos", total=given.seeds)
        for figures in played(range(given.first, given.first + given.seeds)):
            total = total.and_(figures)
            progress.update(task, advance=figures.num_seeds)
    for story in total.stories:
        print(story, end="\n\n")
    values = {
        "seeds": float(total.num_seeds),
        "failing_seeds": float(len(total.failing)),
        "migrations_committed": float(total.outcomes[_MOVED]),
        "migrations_broken_off": float(total.outcomes.total() - total.outcomes[_MOVED]),
        "took_s": time.monotonic() - began_s,
    }
    counts = {"faults": total.faults, "migrations": total.outcomes, "requests": total.requests}
    arms: dict[str, dict[str, Value]] = {name: dict(counted) for name, counted in counts.items()}
    show([_table(total)], result_of("chaos", values, arms, {"seeds": total.num_seeds}, {}), given.json)
    if total.failing:
        print(f"seeds: {', '.join(map(str, total.failing))}")
    return 1 if total.failing else 0


if __name__ == "__main__":
    sys.exit(main())
