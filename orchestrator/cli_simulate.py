"""How does a fleet do that is not there? `kvferry simulate`: simulated fleets on the command line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.sim.compare import Day, Question
    from orchestrator.sim.steptime import StepTimes
    from orchestrator.sim.twin import Twin

WIDTH_OF_A_FILE = 160
COLUMNS = ("TTFT s", "P99", "TPOT ms", "P99", "latency s", "+-", "P99", "failed", "preempted", "moved", "broken off")

app = typer.Typer(
    name="simulate",
    no_args_is_help=True,
    add_completion=False,
    help="A fleet in virtual time: production's decisions over modelled engines.",
)


@app.command()
def arms() -> None:
    """The fleets that can be compared: what each dispatches and moves by."""
    from orchestrator.sim.arms import ARMS  # noqa: PLC0415

    width = max(map(len, ARMS))
    for name, arm in ARMS.items():
        typer.echo(f"{name:<{width}}  {arm.about}")


@app.command()
def compare(  # noqa: PLR0913, PLR0917 - one parameter a flag
    workload: Annotated[
        str, typer.Option(help="Prompts and answers, as in Llumnix's evaluation: two of S, M and L.")
    ] = "M-M",
    rate: Annotated[float, typer.Option(metavar="R", help="Requests a second, of the whole fleet.")] = 7.5,
    requests: Annotated[int, typer.Option(help="How many.")] = 2_000,
    instances: Annotated[
        int | None,
        typer.Option(help="Of 13,616 tokens each, or as the twin's. Default: 16, or as many as the twin has."),
    ] = None,
    gateways: Annotated[int | None, typer.Option(help="They share the requests. Default: 1, or as the twin's.")] = None,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps between requests; 1: Poisson.")] = 1.0,
    urgent: Annotated[float, typer.Option(metavar="SHARE", help="Of the requests that are urgent.")] = 0.0,
    arm: Annotated[
        list[str] | None, typer.Option(help="Once for each; `kvferry simulate arms` lists them. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Days of each arm, all arms the same ones.")] = 1,
    profiles: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Step times of other engines (step_time_models.json).")
    ] = None,
    model: Annotated[str, typer.Option(help="Which of them.")] = "",
    twin: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A fleet like that of this file (`kvferry simulate fit`).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here, too.")] = None,
) -> None:
    """The same requests for each arm: latencies, preemptions, moves."""
    from orchestrator.sim import compare as simulated  # noqa: PLC0415
    from orchestrator.sim.arms import ARMS, arm_of  # noqa: PLC0415
    from orchestrator.sim.workload import MAX_TOKENS, llumnix_lengths  # noqa: PLC0415

    names = list(dict.fromkeys(arm)) if arm else list(ARMS)
    for name in names:
        arm_of(name)
    llumnix_lengths(workload)
    _require(rate > 0 and cv > 0, "--rate and --cv must be positive")
    _require(twin is None or profiles is None, "--twin has step times of its own: leave --profiles out")
    fleet = _twin(twin)
    instances = fleet.num_instances if instances is None else instances
    gateways = fleet.num_gateways if gateways is None else gateways
    counts = {"--requests": requests, "--instances": instances, "--gateways": gateways, "--seeds": seeds}
    for flag, count in counts.items():
        _require(count >= 1, f"{flag} is {count}, it must be at least 1")
    _require(0 <= urgent < 1, f"--urgent is {urgent:g}, it must be a share below 1")
    _require_folder(out)
    _require(
        twin is None or fleet.engine.max_model_len >= MAX_TOKENS,
        f"--twin {twin}: its instances hold {fleet.engine.max_model_len:,} tokens, and a request of these workloads may"
        f" have {MAX_TOKENS:,}",
    )
    times = fleet.times if profiles is None else _times(profiles, model)
    question = simulated.Question(workload, rate, cv, requests, instances, gateways, urgent, times, fleet.engine)
    days: list[Day] = []
    console = Console(stderr=True)
    with console.status("simulating") as status:
        for day in simulated.compare(question, names, range(1, seeds + 1)):
            days.append(day)
            status.update(f"simulating: {len(days)} of {len(names) * seeds} days")
    _print(names, days)
    if out is not None:
        out.write_text(json.dumps(_as_values(question, days), indent=1, allow_nan=False) + "\n", encoding="utf-8")


@app.command()
def fit(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="As given to `kvferry serve --journal`.")],
    instance: Annotated[
        str | None, typer.Option(metavar="NAME", help="All incarnations of this one. Default: of all instances.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="For `compare --twin FILE`.")] = None,
) -> None:
    """Step times of a real fleet, from the journal of its run."""
    from orchestrator.journal.reader import JournalFiles  # noqa: PLC0415
    from orchestrator.sim.fitting import fitted  # noqa: PLC0415
    from orchestrator.sim.observed import observed  # noqa: PLC0415
    from orchestrator.sim.twin import fit_lines, written  # noqa: PLC0415

    _require_folder(out)
    with JournalFiles(journal) as files, Console(stderr=True).status("reading the journal"):
        try:
            seen = observed((line for _, line in files.lines()), instance)
            found = fitted(seen)
        except ConfigError as error:
            raise ConfigError(f"{journal}: {error}") from error
        torn = files.reading.torn
    for line in (*fit_lines(found, seen), *([torn] if torn else [])):
        typer.echo(line)
    if out is not None:
        text = json.dumps(written(found, seen, str(journal)), indent=1, allow_nan=False)
        out.write_text(text + "\n", encoding="utf-8")


def _twin(path: Path | None) -> Twin:
    from orchestrator.sim.twin import Twin, twin_of  # noqa: PLC0415

    if path is None:
        return Twin()
    try:
        return twin_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--twin {path}: {error}") from error


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ConfigError(otherwise)


def _require_folder(out: Path | None) -> None:
    _require(out is None or out.parent.is_dir(), f"--json: there is no folder {out.parent if out else ''}")


def _times(path: Path, model: str) -> StepTimes:
    from orchestrator.sim.steptime import from_profile  # noqa: PLC0415

    try:
        return from_profile(json.loads(path.read_text(encoding="utf-8")), model)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--profiles {path}: {error}") from error


def _print(names: Sequence[str], days: Sequence[Day]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE)
    table = Table(title=f"days of each arm: {len(days) // len(names)}", title_justify="left")
    table.add_column("arm")
    table.add_column("requests")
    for column in (
        "TTFT s",
        "P99",
        "TPOT ms",
        "P99",
        "latency s",
        "+-",
        "P99",
        "failed",
        "preempted",
        "moved",
        "broken off",
    ):
        table.add_column(column, justify="right")
    for name in names:
        own = [day for day in days if day.arm == name]
        for kind in own[0].scores:
            if kind == "" or len(own[0].scores) > 2:
                table.add_row(name if kind == "" else "", kind or "all", *_cells(own, kind))
    console.print(table)


def _cells(own: Sequence[Day], kind: str) -> list[str]:
    """Means over the days; the interval is that of one day for one, of the days' means for several."""
    scores = [day.scores[kind] for day in own]

    def usual(values: list[float]) -> float:
        known = [value for value in values if math.isfinite(value)]
        return statistics.fmean(known) if known else math.nan

    means = [one.latency_s.mean for one in scores]
    half = scores[0].latency_s.half_width if len(own) == 1 else 1.96 * statistics.stdev(means) / math.sqrt(len(own))
    cells = [
        f"{usual([one.ttft_s.mean for one in scores]):.3f}",
        f"{usual([one.ttft_s.p99 for one in scores]):.2f}",
        f"{1e3 * usual([one.tpot_s.mean for one in scores]):.1f}",
        f"{1e3 * usual([one.tpot_s.p99 for one in scores]):.1f}",
        f"{usual(means):.2f}",
        f"{half:.2f}",
        f"{usual([one.latency_s.p99 for one in scores]):.1f}",
        str(sum(one.num_failed for one in scores)),
    ]
    if kind:
        return [*cells, "", "", ""]
    counts = [day.counts for day in own]
    return [
        *cells,
        *(str(sum(getattr(one, name) for one in counts)) for name in ("preemptions", "migrations", "broken_off")),
    ]


def _as_values(question: Question, days: Sequence[Day]) -> dict[str, Any]:
    values = {"question": asdict(question), "days": [asdict(day) for day in days]}
    found: dict[str, Any] = _finite(values)
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
