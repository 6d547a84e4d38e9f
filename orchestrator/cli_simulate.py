"""How does a fleet do that is not there? `kvferry simulate`: simulated fleets on the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator import cli_simulate_fit, cli_simulate_report, cli_simulate_run, cli_simulate_suite
from orchestrator import cli_simulate_options as told

if TYPE_CHECKING:
    from orchestrator.sim.day import Day

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
    workload: told.Workload = "M-M",
    rate: told.Rate = 7.5,
    requests: told.Requests = None,
    instances: told.Instances = None,
    blocks: told.Blocks = None,
    max_model_len: told.MaxModelLen = None,
    prefix_cache: told.PrefixCache = None,
    gateways: told.Gateways = None,
    cv: told.Variation = 1.0,
    urgent: told.Urgent = 0.0,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="All of Llumnix's experiments (`paper`) instead of one question; --requests makes them shorter.",
        ),
    ] = None,
    arm: told.Arms = None,
    against: told.Against = None,
    seeds: told.Seeds = 1,
    slo_ttft: told.SloTtft = None,
    slo_tpot: told.SloTpot = None,
    data: told.Data = None,
    profiles: told.Profiles = None,
    model: told.Model = "",
    twin: told.TwinFile = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here, too.")] = None,
) -> None:
    """The same requests for each arm: latencies, preemptions, moves."""
    from orchestrator.sim.compare import compare as days_of  # noqa: PLC0415
    from orchestrator.sim.result import as_json  # noqa: PLC0415
    from orchestrator.sim.sheets import sheets_of  # noqa: PLC0415

    if suite is not None:
        cli_simulate_suite.play(suite, requests, out)
        return
    names = told.arms_of(arm, against)
    told.at_least_one("--seeds", seeds)
    told.writable("--json", out)
    question = told.question_of(
        told.Flags(
            workload,
            rate,
            cv,
            requests,
            instances,
            gateways,
            urgent,
            profiles,
            model,
            slo_ttft,
            slo_tpot,
            blocks,
            max_model_len,
            data,
            twin,
            prefix_cache,
        )
    )
    days: list[Day] = []
    with Console(stderr=True).status("simulating") as status:
        for day in days_of(question, names, range(1, seeds + 1)):
            days.append(day)
            status.update(f"simulating: {len(days)} of {len(names) * seeds} days")
    told.show(sheets_of(days, against or ""), f"days of each arm: {seeds}")
    if out is not None:
        told.write("--json", out, as_json(asdict(question), days))


app.command()(cli_simulate_run.run)
app.command()(cli_simulate_run.sweep)
app.command()(cli_simulate_report.report)
app.command()(cli_simulate_fit.fit)
