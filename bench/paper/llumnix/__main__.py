"""How do Llumnix's experiments come out here, beside what its paper found?

    python -m bench.paper.llumnix [--suite FILE] [--requests N] [--baselines] [--json FILE]

In virtual time (`orchestrator/sim`): sixteen instances of LLaMA-7B on A10s, its workloads, 10,000 requests a day.
`--suite FILE`: what `kvferry simulate compare --suite paper --json FILE` wrote; without it those days are played here
(20 minutes on two cores). `--baselines` adds INFaaS++, ours without moves, and Llumnix with its artifact's other
threshold where that has it. Downtime is of one request that moves between two idle instances; *recompute* counts the
step that computes it anew. Scale is not played here: `bench.decide` measures what a decision costs at 1,024 instances.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.paper.llumnix import published
from bench.paper.llumnix.downtime import MODES, stopped_s
from bench.report import Value
from bench.sheet import result_of, show, table_of
from orchestrator.sim.compare import Job, Question, live_all
from orchestrator.sim.suite import NUM_REQUESTS, SEED, SERVING, Lasted, Told, jobs

Row = Mapping[str, Any]
TUNED = ("M-M", "S-L")
"""Where its artifact has the threshold of `llumnix-10`."""


def played(num_requests: int) -> dict[str, Any]:
    """As the file of the command line, as far as this bench reads it."""
    asked = jobs(num_requests)
    days = [Lasted(one, day) for one, day in zip(asked, live_all([one.job for one in asked]), strict=True)]
    rows = [_of_day(one.asked.part, one.asked.row, one.asked.arm, one.day) for one in days]
    return {"figures": Told(days).figures(), "days": rows}


def baselines(num_requests: int) -> list[Row]:
    named: list[tuple[str, Job]] = []
    for name, rate in SERVING.items():
        question = Question(name, rate, num_requests=num_requests)
        arms = ("infaas++", "dispatch", *(("llumnix-10",) if name in TUNED else ()))
        named += [(name, (question, arm, SEED)) for arm in arms]
    days = live_all([job for _, job in named])
    return [_of_day("serving", name, job[1], day) for (name, job), day in zip(named, days, strict=True)]


def _of_day(part: str, row: str, arm: str, day: Any) -> Row:
    scores = {
        kind: {
            name: {"mean": getattr(score, name).mean, "p99": getattr(score, name).p99}
            for name in ("ttft_s", "latency_s", "tpot_s")
        }
        for kind, score in day.scores.items()
    }
    return {
        "part": part,
        "row": row,
        "arm": arm,
        "scores": scores,
        "fragmentation": day.fleet.fragmentation.mean,
        "mean_instances": day.fleet.mean_instances,
        "counts": {"preemptions": day.counts.preemptions, "migrations": day.counts.migrations},
    }


def _serving(days: Sequence[Row]) -> Table:
    columns = (
        "trace",
        "arm",
        "TTFT s",
        "P99",
        "TPOT ms, P99",
        "latency s",
        "P99",
        "preempted",
        "moved",
        "fragmented %",
    )
    table = table_of("serving and fragmentation, at the highest rates", (*columns, "the paper, INFaaS++ to Llumnix"))
    for name in SERVING:
        for index, day in enumerate(one for one in days if (one["part"], one["row"]) == ("serving", name)):
            of = day["scores"][""]
            cells = [f"{of['ttft_s']['mean']:.3f}", f"{of['ttft_s']['p99']:.1f}", f"{1e3 * of['tpot_s']['p99']:.0f}"]
            cells += [f"{of['latency_s']['mean']:.2f}", f"{of['latency_s']['p99']:.0f}"]
            cells += [str(day["counts"]["preemptions"]), str(day["counts"]["migrations"])]
            beside = published.SERVING[name] if index == 0 else ""
            table.add_row(name, day["arm"], *cells, f"{100 * day['fragmentation']:.2f}", beside)
    return table


def _priority(days: Sequence[Row]) -> Table:
    table = table_of(
        "priority, S-S at 26 a second", ("CV", "arm", "urgent s", "normal P99 s", "normal P99 TTFT s", "the paper")
    )
    for day in (one for one in days if one["part"] == "priority"):
        urgent, normal = day["scores"]["urgent"], day["scores"]["normal"]
        beside = published.PRIORITY[float(day["row"].removeprefix("CV "))]
        cells = (f"{urgent['latency_s']['mean']:.2f}", f"{normal['latency_s']['p99']:.1f}")
        table.add_row(day["row"], day["arm"], *cells, f"{normal['ttft_s']['p99']:.2f}", beside)
    return table


def _scaling(days: Sequence[Row]) -> Table:
    table = table_of(f"scaling, L-L; the paper: {published.SCALING}", ("band", "arm", "P99 TTFT s", "instances"))
    for day in (one for one in days if one["part"] == "scaling"):
        p99_s = day["scores"][""]["ttft_s"]["p99"]
        table.add_row(day["row"], day["arm"], f"{p99_s:.2f}", f"{day['mean_instances']:.2f}")
    return table


def _downtime() -> tuple[Table, dict[str, dict[str, Value]]]:
    columns = ("tokens", *(part for mode in MODES for part in (f"{mode} ms", "the paper")))
    table = table_of("downtime", columns)
    rows: dict[str, dict[str, Value]] = {}
    for tokens, beside in published.DOWNTIME_MS.items():
        found = [1e3 * stopped_s(tokens, mode) for mode in MODES]
        rows[f"downtime {tokens}"] = dict(zip(MODES, found, strict=True))
        cells = [f"{value:.0f}" for pair in zip(found, beside, strict=True) for value in pair]
        table.add_row(f"{tokens:,}", *cells)
    return table, rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.paper.llumnix", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("--suite", type=Path, help="result of `kvferry simulate compare --suite paper --json FILE`")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="of each day that is played here")
    parser.add_argument("--baselines", action="store_true", help="play the other arms of serving, too")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    downtime, rows = _downtime()
    try:
        told = json.loads(options.suite.read_text()) if options.suite else played(options.requests)
        days = [*told["days"], *(baselines(options.requests) if options.baselines else [])]
        figures = {name: float(value) for name, value in told["figures"].items() if value is not None}
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--suite {options.suite}: {error}")
    order = list(SERVING)
    days.sort(key=lambda one: (one["part"], order.index(one["row"]) if one["row"] in order else 0))
    tables = [downtime, _serving(days), _priority(days), _scaling(days)]
    for day in (one for one in days if one["part"] != "sweep"):
        of = day["scores"][""]
        rows[f"{day['part']} {day['row']} {day['arm']}"] = {
            "ttft_s": of["ttft_s"]["mean"],
            "ttft_p99_s": of["ttft_s"]["p99"],
            "latency_s": of["latency_s"]["mean"],
            "fragmentation": day["fragmentation"],
            "mean_instances": day["mean_instances"],
        }
    Console(stderr=True).print(f"the paper: {published.FRAGMENTATION}; {published.SCALE}", highlight=False)
    show(tables, result_of("paper_llumnix", figures, rows, {"days": len(days)}, {}), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
