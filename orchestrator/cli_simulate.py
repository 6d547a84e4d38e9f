"""How does a fleet do that is not there? `kvferry simulate`: simulated fleets on the command line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orchestrator import config
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.sim.asked import Drawn
    from orchestrator.sim.compare import Day, Question
    from orchestrator.sim.steptime import StepTimes

WIDTH_OF_A_FILE = 160
COLUMNS = (
    *("TTFT s", "P99", "TPOT ms", "P99", "latency s", "+-", "P99", "failed", "preempted", "moved", "broken off"),
    "cached",
)

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
def workloads() -> None:
    """What requests can be asked: where they are from, under which licence, and what is known of them."""
    from orchestrator.sim.catalogue import FILE_ENDINGS, SOURCES  # noqa: PLC0415

    width = max(map(len, SOURCES))
    typer.echo(
        f"{'M-L, S-S, ...':<{width}}  generated, as in Llumnix's evaluation: prompts and answers are two of S, M and L"
        " (Zipf of mean 128, 256, 512); Poisson or Gamma arrivals"
    )
    for name, source in SOURCES.items():
        typer.echo(f"{name:<{width}}  {source.about} ({source.origin}, {source.licence})")
    typer.echo(f"{'FILE':<{width}}  a trace of your own ({', '.join(FILE_ENDINGS)}): arrival_s, input_tokens,")
    typer.echo(f"{'':<{width}}  output_tokens, and hash_ids where prefixes are shared")
    typer.echo("\nThose with a source are read from the folder that --data or KVFERRY_DATA names. They and files have")
    typer.echo("halves: tune on azure-conv:train, judge on azure-conv:test. A seed picks the moment a day begins at.")


@app.command()
def compare(  # noqa: PLR0913, PLR0917 - one parameter a flag
    workload: Annotated[
        str, typer.Option(metavar="NAME", help="What is asked; `kvferry simulate workloads` lists it.")
    ] = "M-M",
    rate: Annotated[float, typer.Option(metavar="R", help="Requests a second, of the whole fleet.")] = 7.5,
    requests: Annotated[int, typer.Option(help="How many.")] = 2_000,
    instances: Annotated[int, typer.Option(help="Engines alike.")] = 16,
    blocks: Annotated[int, typer.Option(help="Of 16 tokens of KV, in each instance.")] = 851,
    max_model_len: Annotated[int, typer.Option(help="Tokens of prompt and answer; what is longer is left out.")] = 8192,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(help="Instances keep the beginnings of prompts. Default: if the workload has any known."),
    ] = None,
    gateways: Annotated[int, typer.Option(help="They share the requests.")] = 1,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps between requests; 1: Poisson.")] = 1.0,
    urgent: Annotated[float, typer.Option(metavar="SHARE", help="Of the requests that are urgent.")] = 0.0,
    arm: Annotated[
        list[str] | None, typer.Option(help="Once for each; `kvferry simulate arms` lists them. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Days of each arm, all arms the same ones.")] = 1,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of published workloads. (KVFERRY_DATA)")
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Step times of other engines (step_time_models.json).")
    ] = None,
    model: Annotated[str, typer.Option(help="Which of them.")] = "",
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here, too.")] = None,
) -> None:
    """The same requests for each arm: latencies, preemptions, moves."""
    from orchestrator.sim import compare as simulated  # noqa: PLC0415
    from orchestrator.sim.arms import ARMS, arm_of  # noqa: PLC0415

    names = list(dict.fromkeys(arm)) if arm else list(ARMS)
    for name in names:
        arm_of(name)
    _require(0 < rate < math.inf and 0 < cv < math.inf, "--rate and --cv must be positive")
    counts = {"--requests": requests, "--instances": instances, "--gateways": gateways, "--seeds": seeds}
    counts |= {"--blocks": blocks, "--max-model-len": max_model_len}
    for flag, count in counts.items():
        _require(count >= 1, f"{flag} is {count}, it must be at least 1")
    _require(0 <= urgent < 1, f"--urgent is {urgent:g}, it must be a share below 1")
    _require(out is None or out.parent.is_dir(), f"--json: there is no folder {out.parent if out else ''}")
    folder = config.data_folder(data)
    question = simulated.Question(workload, rate, cv, requests, instances, gateways, urgent, data=str(folder or ""))
    question = replace(question, engine=replace(question.engine, num_blocks=blocks, max_model_len=max_model_len))
    if profiles is not None:
        question = replace(question, times=_times(profiles, model))
    first = question.drawn(1)
    if prefix_cache is None:
        prefix_cache = any(one.prefix_ids for one in first.arrivals)
    question = replace(question, engine=replace(question.engine, prefix_cache=prefix_cache))
    _tell_requests(question, first)
    days: list[Day] = []
    console = Console(stderr=True)
    with console.status("simulating") as status:
        for day in simulated.compare(question, names, range(1, seeds + 1)):
            days.append(day)
            status.update(f"simulating: {len(days)} of {len(names) * seeds} days")
    _print(names, days)
    if out is not None:
        out.write_text(json.dumps(_as_values(question, days), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ConfigError(otherwise)


def _tell_requests(question: Question, drawn: Drawn) -> None:
    """On stderr: what the first seed's day asks, and what of it the instances are too small for."""
    prompts, answers = (
        statistics.fmean(getattr(one, name) for one in drawn.arrivals) for name in ("num_prompt", "num_answer")
    )
    told = [f"{question.workload}, seed 1: prompts of {prompts:,.0f} tokens and answers of {answers:,.0f} in the mean"]
    if drawn.num_left_out:
        told.append(f"{drawn.num_left_out:,} more left out: their prompt has {question.longest:,} tokens or more")
    if drawn.num_cut_short:
        told.append(f"{drawn.num_cut_short:,} answers cut short at {question.longest:,} tokens of prompt and answer")
    told.append(f"instances keep {'prefixes of prompts' if question.engine.prefix_cache else 'no prefixes'}")
    typer.echo("; ".join(told), err=True)


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
    for column in COLUMNS:
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
        return [*cells, "", "", "", ""]
    counts = [day.counts for day in own]
    return [
        *cells,
        *(str(sum(getattr(one, name) for one in counts)) for name in ("preemptions", "migrations", "broken_off")),
        f"{statistics.fmean(one.found_share for one in counts):.0%}",
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
