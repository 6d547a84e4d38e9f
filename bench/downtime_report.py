"""What do the moves of bench/downtime say? Rows, tables, the figures of the bars, the JSON."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from rich.table import Table

from bench.report import Result, Value, spread_of, this_machine
from instance.spec import MigrationSummary

MODES = ("live", "blocking", "recompute")
NAMES = {"live": "live", "blocking": "blocking copy", "recompute": "re-prefill"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One move: its downtime and what it cost."""

    model: str
    mode: str
    length: int
    downtime_s: float
    step_s: float
    """Median gap between tokens at the source just before."""
    summary: MigrationSummary


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Mean gap of the others' tokens on one instance: during one live copy, just before, and before that."""

    model: str
    role: str
    """Of the instance in this move."""
    length: int
    earlier_s: float
    before_s: float
    during_s: float

    @property
    def ratio(self) -> float:
        return self.during_s / self.before_s

    @property
    def null_ratio(self) -> float:
        """The same of two spans without a move: what the machine's noise makes of it."""
        return self.before_s / self.earlier_s


def figures(
    arms: Sequence[Arm], slow: Sequence[Slowdown], model: str, models: Sequence[str]
) -> dict[str, float | int | None]:
    """The bars' numbers, from medians over `model`; those over the others of `models` have its name behind them.

    `downtime_growth`: longest length over the shortest. `step_growth`: the same of an ordinary step at the source,
    which every downtime holds one of: what no migration can do better than.
    """
    return {
        name if one == model else f"{name}_{one}": value
        for one in models
        for name, value in _figures(arms, slow, one).items()
    }


def _figures(arms: Sequence[Arm], slow: Sequence[Slowdown], model: str) -> dict[str, float | int | None]:
    arms = [arm for arm in arms if arm.model == model]
    shortest, longest = min(arm.length for arm in arms), max(arm.length for arm in arms)

    def downtime_s(mode: str, length: int) -> float:
        return median(arm.downtime_s for arm in arms if (arm.mode, arm.length) == (mode, length))

    def step_s(length: int) -> float:
        return median(arm.step_s for arm in arms if arm.length == length)

    return {
        "downtime_growth_256_8k": downtime_s("live", longest) / downtime_s("live", shortest),
        "step_growth_256_8k": step_s(longest) / step_s(shortest),
        "live_over_reprefill_8k": downtime_s("live", longest) / downtime_s("recompute", longest),
        "others_slowdown": median(row.ratio for row in slow if row.model == model) - 1.0,
        "others_slowdown_no_move": median(row.null_ratio for row in slow if row.model == model) - 1.0,
    }


def table_of(arms: Sequence[Arm], model: str) -> Table:
    table = Table(title=f"{model}: downtime, median and p10 .. p90 of n moves")
    table.add_column("tokens", justify="right")
    table.add_column("how")
    for name in ("n", "downtime ms", "decode steps", "step ms", "stopped ms", "blocks before + after stop", "MB"):
        table.add_column(name, justify="right")
    for (_, mode, length), rows in _grouped([arm for arm in arms if arm.model == model]).items():
        down = spread_of([arm.downtime_s * 1e3 for arm in rows])
        last = rows[-1].summary
        table.add_row(
            str(length),
            NAMES[mode],
            str(len(rows)),
            f"{down['median']:.1f} ({down['p10']:.1f} .. {down['p90']:.1f})",
            f"{median(arm.downtime_s / arm.step_s for arm in rows):.1f}",
            f"{median(arm.step_s for arm in rows) * 1e3:.1f}",
            f"{median(arm.summary.stopped_s for arm in rows) * 1e3:.1f}",
            f"{last.copied_blocks} + {last.tail_blocks}",
            f"{last.num_bytes / 1e6:.1f}",
        )
    return table


def slow_table(slow: Sequence[Slowdown]) -> Table:
    table = Table(title="gaps between tokens of the others, during a live copy over just before; the same with no move")
    for name in ("model", "at the", "n", "before ms", "during ms", "ratio", "no move"):
        table.add_column(name, justify="right")
    grouped: dict[tuple[str, str], list[Slowdown]] = defaultdict(list)
    for row in slow:
        grouped[row.model, row.role].append(row)
    for (model, role), rows in grouped.items():
        spreads = [spread_of([row.ratio for row in rows]), spread_of([row.null_ratio for row in rows])]
        table.add_row(
            model,
            role,
            str(len(rows)),
            f"{median(row.before_s for row in rows) * 1e3:.2f}",
            f"{median(row.during_s for row in rows) * 1e3:.2f}",
            *(f"{ratio['median']:.3f} ({ratio['p10']:.3f} .. {ratio['p90']:.3f})" for ratio in spreads),
        )
    return table


def result_of(arms: Sequence[Arm], slow: Sequence[Slowdown], model: str, models: Sequence[str]) -> Result:
    keyed = {f"{name}_{mode}_{length}": rows for (name, mode, length), rows in _grouped(arms).items()}
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
    ratios = {f"{name}_others": [row.ratio for row in slow if row.model == name] for name in models}
    ratios |= {f"{name}_no_move": [row.null_ratio for row in slow if row.model == name] for name in models}
    return Result(
        name="downtime",
        command=shlex.join(["python", "-m", "bench.downtime", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures(arms, slow, model, models),
        arms=described,
        n={name: len(rows) for name, rows in keyed.items()} | {name: len(row) for name, row in ratios.items()},
        spread={
            f"{name}_downtime_ms": spread_of([arm.downtime_s * 1e3 for arm in rows]) for name, rows in keyed.items()
        }
        | {f"{name}_ratio": spread_of(row) for name, row in ratios.items()},
        machine=this_machine(),
    )


def _grouped(arms: Sequence[Arm]) -> dict[tuple[str, str, int], list[Arm]]:
    """By model, mode and length; in order of model, length, mode."""
    grouped: dict[tuple[str, str, int], list[Arm]] = defaultdict(list)
    for arm in sorted(arms, key=lambda arm: (arm.model, arm.length, MODES.index(arm.mode))):
        grouped[arm.model, arm.mode, arm.length].append(arm)
    return grouped
