"""Does the simulator foretell a real run? Step times from one run, and what it then says of another.

    python -m bench.sim_truth [--quick] [--json FILE] [--rounds N] [--instances N] [--keep FOLDER | --again FOLDER]

Real vLLM engines on this machine's CPU behind one gateway, as `kvferry serve` composes them. A round is three runs: A,
to which step times are fitted by the journal (as `kvferry simulate fit` does) and one constant by its clients, what a
request waits for beside its engine; B, of another rate and other lengths; and C, as B but far more at once than the
engines hold, so that queues and memory decide. The simulator gets the requests of B and C at the times at which they
were sent, and knows nothing else of them. Runs take turns, and A is all of its turns together: a machine that gets
slower does so for each. Last, the published run of `shared/data` (KVFERRY_DATA), if it is there.

Nothing else should run on the machine: engines that wait for its cores are slower in one run than in the other, and no
fit knows when.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.policy_workload import Workload
from bench.report import Result, Value, spread_of, this_machine, write_result
from bench.sim_truth_runs import Plan, config, play_all
from bench.sim_truth_twin import Run, Served, Told, Twin, errors, published, simulated, told, twin_of
from bench.steptime_tables import data_folder
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import checks
from orchestrator.runtime.ray_cluster import RayCluster
from orchestrator.sim.twin import fit_lines
from orchestrator.sim.workload import Zipf

ROUNDS, DURATION_S = 3, 60.0
QUICK_ROUNDS, QUICK_DURATION_S = 1, 30.0
FITTED_PER_S, FORETOLD_PER_S, FULL_PER_S = 5.0, 8.0, 30.0
"""Requests a second, of one instance; of several, so many times as many."""
BURSTS = 2.5
"""Coefficient of variation of A's gaps: it must have large batches, too."""
FULL_SHARE = 0.2
"""Of a run's time are requests sent in C."""
KINDS = ("A", "B", "C")
BARS = {"mean_e2e_error": 0.15, "p95_ttft_error": 0.25, "throughput_error": 0.10}
JOURNAL, RUNS = "journal", "runs.json"
PUBLISHED_RUN = "vLLM 0.19, published"
QUIET_LOAD = 1.0
"""Of the machine in the minute before."""
WIDTH = 160


def plans(num_rounds: int, duration_s: float, num_instances: int) -> list[Plan]:
    """A1, B1, C1, A2, ... Prompts of B and C are longer than A's, also the longest; answers are shorter."""
    prompts, answers = Zipf(256, 1.5, 1_536), Zipf(48, 1.5, 512)
    workloads = (
        Workload(FITTED_PER_S * num_instances, duration_s, BURSTS, Zipf(160, 1.2, 1_024), Zipf(96, 1.5, 768)),
        Workload(FORETOLD_PER_S * num_instances, duration_s, 1.0, prompts, answers),
        Workload(FULL_PER_S * num_instances, FULL_SHARE * duration_s, 1.0, prompts, answers),
    )
    return [
        Plan(f"{name}{number}", workload, seed=len(KINDS) * number + shift)
        for number in range(1, num_rounds + 1)
        for shift, (name, workload) in enumerate(zip(KINDS, workloads, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class Foretold:
    """What was foretold of one run, and what became of it."""

    name: str
    measured: tuple[Served, ...]
    foretold: tuple[Served, ...]
    step_error: float
    """Of its steps alone, by the fit to all of A: what the machine's speed has changed by, and what the fit lacks."""

    @property
    def kind(self) -> str:
        return self.name[0]


def foretold(runs: Sequence[Run], journal: Path, twin: Twin) -> list[Foretold]:
    """A itself, too: what is off there is no matter of another load."""
    return [
        Foretold(run.name, run.requests, simulated(run.requests, twin.params), twin.busy_error(run.lines_of(journal)))
        for run in runs
    ]


def row_of(real: Told, found: Told) -> dict[str, Value]:
    row: dict[str, Value] = {f"measured_{name}": value for name, value in asdict(real).items()}
    row |= {f"foretold_{name}": value for name, value in asdict(found).items()}
    return row | {f"{name}_error": off for name, off in errors(found, real).items()}


def table_of(pairs: dict[str, tuple[Told, Told]]) -> Table:
    table = Table(title="measured, foretold", title_justify="left")
    table.add_column("run")
    for column in ("latency s", "foretold", "", "P95 TTFT s", "foretold", "", "tokens/s", "foretold", ""):
        table.add_column(column, justify="right")
    for name, (real, found) in pairs.items():
        cells: list[str] = []
        for one, other in zip(real.values(), found.values(), strict=True):
            cells += [f"{one:.4g}", f"{other:.4g}", f"{other / one - 1:+.1%}"]
        table.add_row(name, *cells)
    return table


def pairs_of(found: Sequence[Foretold]) -> dict[str, tuple[Told, Told]]:
    """(measured, foretold) of each run, and of all of a kind together."""
    pairs: dict[str, tuple[Told, Told]] = {}
    for kind in KINDS:
        own = [one for one in found if one.kind == kind]
        pairs |= {one.name: (told([one.measured]), told([one.foretold])) for one in own}
        pairs[kind] = told([one.measured for one in own]), told([one.foretold for one in own])
    return pairs


def result_of(found: Sequence[Foretold], pairs: dict[str, tuple[Told, Told]], twin: Twin, load: float) -> Result:
    figures: dict[str, float | int | None] = {}
    for prefix, name in (("", "B"), ("full_", "C"), ("published_", PUBLISHED_RUN)):
        if name in pairs:
            off = errors(pairs[name][1], pairs[name][0])
            figures |= {f"{prefix}{measure}_error": abs(value) for measure, value in off.items()}
    by_kind = {kind: [one for one in found if one.kind == kind] for kind in KINDS}
    return Result(
        name="sim_truth",
        command=" ".join(["python", "-m", "bench.sim_truth", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures | {"front_end_s": twin.params.front_end_s, "load_before": load},
        arms={name: row_of(*pair) for name, pair in pairs.items()},
        n={
            "rounds": len(by_kind["A"]),
            "instances": twin.params.num_instances,
            **{f"requests_{kind}": sum(len(one.measured) for one in own) for kind, own in by_kind.items()},
        },
        spread={f"step_error_{kind}": spread_of([one.step_error for one in own]) for kind, own in by_kind.items()},
        machine=this_machine(),
    )


def tell(found: Sequence[Foretold], twin: Twin, load: float, out: Path | None) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    pairs, folder = pairs_of(found), data_folder()
    if folder is not None:
        real, simulated_one = published(folder)
        pairs[PUBLISHED_RUN] = told([real]), told([simulated_one])
    for line in fit_lines(twin.fit, twin.seen):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{1e3 * twin.params.front_end_s:.2f} ms of each request beside the engine", highlight=False)
    console.print(table_of(pairs))
    steps = ", ".join(f"{one.name} {one.step_error:+.1%}" for one in found)
    console.print(f"the engines' busy time by the fit to A: {steps}", highlight=False, soft_wrap=True)
    result = result_of(found, pairs, twin, load)
    for name, value in result.figures.items():
        bar = next((bar for measure, bar in BARS.items() if name.endswith(measure)), None)
        missed = "" if bar is None or value is None or value <= bar else f"  MISSED: the bar is {bar:g}"
        console.print(f"{name} {value:.4g}{missed}", highlight=False)
    if load > QUIET_LOAD:
        console.print(f"the machine was not quiet (load {load:.1f} before it began): these figures are of little worth")
    if out:
        write_result(out, result)
        console.print(f"result: {out}")


def play(num_instances: int, num_rounds: int, duration_s: float, folder: Path) -> list[Run]:
    """Raises OrchestratorError with one line."""
    serve = config(num_instances, folder / JOURNAL)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    checks.parse_engine_argv((serve.model, *serve.engine_argv))
    ray = RayCluster.start_local(num_instances)
    try:
        runs = asyncio.run(play_all(ray, serve, plans(num_rounds, duration_s, num_instances), console))
    finally:
        ray.shutdown()
    (folder / RUNS).write_bytes(msgspec.json.encode(runs))
    return runs


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.sim_truth", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round of {QUICK_DURATION_S:.0f} s a run")
    parser.add_argument("--rounds", type=int, help=f"rounds (default {ROUNDS})")
    parser.add_argument("--instances", type=int, default=1, help="of the real fleet (default 1: they share the cores)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the journal and what clients saw are kept")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="no real runs: those that were kept there")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be positive")
    if not 1 <= options.instances <= 8:
        parser.error("--instances must be from 1 to 8")
    return options


def main() -> int:
    options = options_of()
    num_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    duration_s = QUICK_DURATION_S if options.quick else DURATION_S
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        folder: Path = options.again or options.keep or Path(made)
        try:
            if options.again:
                runs = msgspec.json.decode((folder / RUNS).read_bytes(), type=list[Run])
            else:
                folder.mkdir(parents=True, exist_ok=True)
                runs = play(options.instances, num_rounds, duration_s, folder)
            twin = twin_of([run for run in runs if run.name[0] == "A"], folder / JOURNAL, options.instances)
            found = foretold(runs, folder / JOURNAL, twin)
        except (OrchestratorError, TimeoutError, OSError, msgspec.ValidationError) as error:
            sys.stderr.write(f"bench.sim_truth: {error or 'it took too long'}\n")
            return 1
        except KeyboardInterrupt:
            return 130
        tell(found, twin, load, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
