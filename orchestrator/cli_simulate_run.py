"""What do `kvferry simulate run` and `sweep` do? One day of one arm, told whole; and days over a range of rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator import cli_simulate_options as told
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.sim.day import Day

RESULT = "result.json"
"""In the folder of `--out`."""
MAX_RATES = 200
_ALMOST = 1e-9


def run(  # noqa: PLR0913, PLR0917 - one parameter a flag
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
    arm: Annotated[str, typer.Option(help="`kvferry simulate arms` lists them.")] = "ours",
    seed: Annotated[int, typer.Option(help="Of the day's requests.")] = 1,
    slo_ttft: told.SloTtft = None,
    slo_tpot: told.SloTpot = None,
    data: told.Data = None,
    profiles: told.Profiles = None,
    model: told.Model = "",
    twin: told.TwinFile = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Write all figures, curves and the fleet second by second to {RESULT} here."),
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every decision here, for `kvferry replay FILE`.")
    ] = None,
) -> None:
    """One day of one arm."""
    from orchestrator.sim.compare import played  # noqa: PLC0415
    from orchestrator.sim.result import as_json  # noqa: PLC0415
    from orchestrator.sim.sheets import sheets_of  # noqa: PLC0415

    told.arms_of([arm])
    if out is not None:
        told.require(out.parent.is_dir(), f"--out: there is no folder {out.parent}")
        told.require(out.is_dir() or not out.exists(), f"--out: {out} is a file, name a folder")
    told.writable("--journal", journal)
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
    with Console(stderr=True).status("simulating"):
        found = played(question, arm, seed, keeps_journal=journal is not None)
    told.show(sheets_of([found.day]), f"{found.day.virtual_s:.0f} s of {arm}, seed {seed}")
    if out is not None:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from error
        told.write("--out", out / RESULT, as_json(asdict(question), [found.day], found.instances))
        typer.echo(f"result: {out / RESULT} (`kvferry simulate report {out / RESULT} --html FILE` draws it)")
    if journal is not None:
        told.write("--journal", journal, found.journal)
        typer.echo(f"journal: {journal} (`kvferry replay {journal}` explains it)")


def sweep(  # noqa: PLR0913, PLR0917 - one parameter a flag
    rate: Annotated[
        list[str],
        typer.Option(metavar="R", help="Requests a second, of the whole fleet; once for each, or FROM:TO:STEP."),
    ],
    workload: told.Workload = "M-M",
    requests: told.Requests = None,
    instances: told.Instances = None,
    blocks: told.Blocks = None,
    max_model_len: told.MaxModelLen = None,
    prefix_cache: told.PrefixCache = None,
    gateways: told.Gateways = None,
    cv: told.Variation = 1.0,
    urgent: told.Urgent = 0.0,
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
    """The same for several rates: at which one does which arm's latency rise? Ctrl-C: the rates that are whole by then
    are printed."""
    from orchestrator.sim.compare import live_all  # noqa: PLC0415
    from orchestrator.sim.result import as_json  # noqa: PLC0415
    from orchestrator.sim.sheets import sheets_of  # noqa: PLC0415

    names, rates = told.arms_of(arm, against), rates_of(rate)
    told.at_least_one("--seeds", seeds)
    told.writable("--json", out)
    question = told.question_of(
        told.Flags(
            workload,
            rates[0],
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
    jobs = [
        (replace(question, requests_per_s=per_s), name, seed)
        for per_s in rates
        for seed in range(1, seeds + 1)
        for name in names
    ]
    days: list[Day] = []
    console = Console(stderr=True)
    try:
        with console.status("simulating") as status:
            for day in live_all(jobs):
                days.append(day)
                status.update(f"simulating: {len(days)} of {len(jobs)} days, {day.requests_per_s:g} requests/s")
    except KeyboardInterrupt:
        whole = days[: len(days) - len(days) % (len(names) * seeds)]
        if whole:
            told.show(sheets_of(whole, against or ""))
        unwritten = "" if out is None else f"; {out} is not written"
        console.print(f"interrupted after {len(days)} of {len(jobs)} days{unwritten}", highlight=False)
        raise
    told.show(sheets_of(days, against or ""), f"days of each arm and rate: {seeds}")
    if out is not None:
        told.write("--json", out, as_json(asdict(question) | {"requests_per_s": rates}, days))


def rates_of(texts: Sequence[str]) -> list[float]:
    """Each once, in order: numbers, or `FROM:TO:STEP`, TO included. Raises ConfigError for anything else."""
    rates: list[float] = []
    for text in texts:
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        is_one, is_span = len(numbers) == 1, len(numbers) == 3
        if not (is_one or is_span) or not all(0 < number < math.inf for number in numbers):
            raise ConfigError(f"--rate is {text!r}: name requests a second above 0, or FROM:TO:STEP such as 5:9:0.5")
        if is_one:
            rates += numbers
            continue
        first, last, step = numbers
        if last < first:
            raise ConfigError(f"--rate is {text!r}: {last:g} is below {first:g}")
        if (last - first) / step >= MAX_RATES:
            raise ConfigError(f"--rate is {text!r}: that is more than {MAX_RATES} rates")
        count = math.floor((last - first) / step + _ALMOST) + 1
        rates += [round(first + index * step, 9) for index in range(count)]
    chosen = list(dict.fromkeys(rates))
    if len(chosen) > MAX_RATES:
        raise ConfigError(f"{len(chosen)} rates are given, {MAX_RATES} are the most")
    return chosen
