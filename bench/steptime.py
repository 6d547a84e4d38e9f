"""How well does the step-time model predict the steps of real engines, learning as they come?

    python -m bench.steptime [--quick] [--json FILE]

Real numbers only (KVFERRY_DATA, default ../shared/data beside the checkout): whole iterations of Llama-2-70B and
BLOOM-176B as measured by Splitwise, each step put together from the kernel times of vLLM that LLMServingSim measured
(dense layers, attention of exactly that batch, head), and the same of Vidur's Llama-2-70B tables. Each table is one
instance's life: rows in random order, each predicted before it is learned. Two other arms see the same rows: the
smoothed mean that reports carried before, and the built-in proportions at one learned speed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.decide import load
from bench.report import Result, Value, spread_of, this_machine, write_result
from bench.steptime_tables import Row, data_folder, tables
from instance.messages import LoadReport, StepTotals
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import DispatchBook
from orchestrator.policy.slo import Wanted
from orchestrator.policy.steptime import SHAPE, Observation, StepTimeModel, StepTimeParams
from orchestrator.policy.targets import Targets

ORDERS, QUICK_ORDERS = 5, 1
QUICK_ROWS = 1500
WARM_UP = 32
"""Rows of a life that are learned from and counted apart."""
MEAN_WEIGHT = 0.1
LEARNED_REPORTS = 32
"""Of each instance, timed: a batch of rows is learned from twice in them."""
STALL_EVERY, STALL = 50, 100.0
COLUMNS = (
    "instance",
    "rows",
    "median",
    "p90",
    "first 32: median",
    "p90",
    "stalls: median",
    "mean: median",
    "speed: median",
)

Predict = Callable[[Observation], float | None]


def lives(rows: list[Row], num_orders: int, max_rows: int) -> list[list[Row]]:
    """So many random orders of (a sample of) the rows."""
    orders = []
    for seed in range(num_orders):
        order = rows.copy()
        random.Random(seed).shuffle(order)
        orders.append(order[:max_rows])
    return orders


def errors(
    life: list[Row], predict: Predict, learn: Callable[[Observation], None], stalls: bool = False
) -> list[float]:
    """Relative errors of all predictions, in order; the first row is predicted by nobody."""
    found = []
    for number, row in enumerate(life):
        predicted = predict(row)
        if predicted is not None:
            found.append(abs(predicted - row.seconds) / row.seconds)
        is_stall = stalls and number % STALL_EVERY == STALL_EVERY - 1
        learn(Observation(row.terms, row.seconds * STALL, row.has_prefill) if is_stall else row)
    return found


def by_model(life: list[Row], params: StepTimeParams | None = None, stalls: bool = False) -> list[float]:
    model = StepTimeModel(params=params or StepTimeParams())
    return errors(life, lambda row: model.predict_s(row.terms), model.observe, stalls)


def by_mean(life: list[Row]) -> list[float]:
    """An exponentially weighted mean of the steps' times, whatever they computed."""
    known: list[float] = []

    def learn(row: Observation) -> None:
        known[:] = [row.seconds if not known else known[0] + MEAN_WEIGHT * (row.seconds - known[0])]

    return errors(life, lambda _: known[0] if known else None, learn)


def by_speed(life: list[Row]) -> list[float]:
    """The built-in proportions times the median of measured over proportional time so far."""
    ratios: list[float] = []

    def proportional(row: Observation) -> float:
        return sum(float(a) * b for a, b in zip(SHAPE, row.terms, strict=True))

    return errors(
        life,
        lambda row: statistics.median(ratios) * proportional(row) if ratios else None,
        lambda row: ratios.append(row.seconds / proportional(row)),
    )


def p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def measure(rows: list[Row], num_orders: int, max_rows: int) -> tuple[dict[str, Value], list[float]]:
    """(the figures of one instance, every relative error after the warm-up)."""
    warm: list[float] = []
    first: list[float] = []
    stalled: list[float] = []
    mean: list[float] = []
    speed: list[float] = []
    for life in lives(rows, num_orders, max_rows):
        found = by_model(life)
        first += found[:WARM_UP]
        warm += found[WARM_UP:]
        stalled += by_model(life, stalls=True)[WARM_UP:]
        mean += by_mean(life)[WARM_UP:]
        speed += by_speed(life[: QUICK_ROWS // 2])[WARM_UP:]
    warm = warm or first
    arm: dict[str, Value] = {
        "rows": min(len(rows), max_rows),
        "median": statistics.median(warm),
        "p90": p90(warm),
        "first_32_median": statistics.median(first),
        "first_32_p90": p90(first),
        "stalled_median": statistics.median(stalled or warm),
        "stalled_p90": p90(stalled or warm),
        "mean_median": statistics.median(mean or first),
        "mean_p90": p90(mean or first),
        "speed_median": statistics.median(speed or first),
        "speed_p90": p90(speed or first),
    }
    return arm, warm


def microseconds_a_row(rows: list[Row], num_rows: int) -> float:
    """Processor time."""
    model, began_s = StepTimeModel(), time.process_time()
    for number in range(num_rows):
        model.observe(rows[number % len(rows)])
    return (time.process_time() - began_s) / num_rows * 1e6


def costs(num_instances: int, num_choices: int) -> dict[str, Value]:
    """Mean processor time at a gateway of so many instances, in us: of a choice, and of taking a report in."""
    rng = random.Random(0)
    spent: dict[str, Value] = {"instances": num_instances}
    for is_learning in (False, True):
        book = DispatchBook()
        reports = [
            [report_of(rng, number, step, is_learning) for number in range(num_instances)]
            for step in range(1, WARM_UP + LEARNED_REPORTS)
        ]
        book.set_members([(InstanceId(one.instance), Epoch(1)) for one in reports[0]])
        for at_once in reports[:WARM_UP]:
            for one in at_once:
                book.on_report(one, 0.0)
        began_s = time.process_time()
        for at_once in reports[WARM_UP:]:
            for one in at_once:
                book.on_report(one, 0.0)
        num_reports = num_instances * len(reports[WARM_UP:])
        spent["report_learned_us" if is_learning else "report_us"] = (time.process_time() - began_s) / num_reports * 1e6
    wanted = Wanted(900, Targets(0.5, 0.05))
    for name, asked in (("choice_us", None), ("choice_with_targets_us", wanted)):
        began_s = time.process_time()
        for _ in range(num_choices):
            book.choose(57, 0.1, (), asked)
        spent[name] = (time.process_time() - began_s) / num_choices * 1e6
    spent["report_bytes"] = len(msgspec.msgpack.encode(reports[-1][0]))
    return spent


def report_of(rng: random.Random, number: int, step: int, is_learning: bool) -> LoadReport:
    """A loaded instance's; without `is_learning` it tells nothing of its steps."""
    totals = StepTotals(
        step * 5, step * 900, step * 400, step * 100, step * 400, step * 300_000, step * 400_000, step / 9
    )
    report = load(rng, number, step)
    if not is_learning:
        return report
    return msgspec.structs.replace(report, steps=totals, max_step_tokens=8192, max_running=256)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How well does the step-time model predict real engines' steps?")
    parser.add_argument("--quick", action="store_true", help="one order, fewer rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(argv)
    folder = data_folder()
    if folder is None:
        print("no profiles: set KVFERRY_DATA to their folder (default: ../shared/data beside the checkout)")
        return 2
    num_orders = QUICK_ORDERS if options.quick else ORDERS
    max_rows = QUICK_ROWS if options.quick else 20_000
    table = Table(*COLUMNS, title="relative error of a step's predicted time")
    arms: dict[str, dict[str, Value]] = {}
    spread: dict[str, dict[str, float | int | None]] = {}
    together: list[float] = []
    p90s: list[float] = []
    sample: list[Row] = []
    for name, rows in tables(folder):
        arm, found = measure(rows, num_orders, max_rows)
        arms[name], spread[name] = arm, spread_of(found)
        together.append(float(arm["median"] or 0.0))
        p90s.append(float(arm["p90"] or 0.0))
        sample = rows
        columns = ("median", "p90", "first_32_median", "first_32_p90", "stalled_median", "mean_median", "speed_median")
        table.add_row(name, str(arm["rows"]), *[f"{100 * float(arm[key] or 0.0):.1f} %" for key in columns])
    arms["costs"] = costs(*((64, 200) if options.quick else (1024, 3_000)))
    result = Result(
        name="steptime",
        command=" ".join(["python", "-m", "bench.steptime", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={
            "steptime_median_error": statistics.median(together),
            "steptime_p90_error": statistics.median(p90s),
            "steptime_median_error_worst": max(together),
            "steptime_p90_error_worst": max(p90s),
            "steptime_us_a_row": microseconds_a_row(sample, 2_000 if options.quick else 20_000),
        },
        arms=arms,
        n={"instances": len(together), "orders": num_orders},
        spread=spread,
        machine=this_machine(),
    )
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for name, value in (*result.figures.items(), *arms["costs"].items()):
        console.print(f"{name} {value:.4g}", highlight=False)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
