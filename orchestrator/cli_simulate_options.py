"""What can be asked of a simulated fleet on the command line? The flags that several commands of `simulate` share."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from orchestrator import config
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.sim.asked import Drawn
    from orchestrator.sim.compare import Question
    from orchestrator.sim.sheets import Sheet
    from orchestrator.sim.steptime import StepTimes
    from orchestrator.sim.twin import Twin

WIDTH_OF_A_FILE = 160
DEFAULT_REQUESTS = 2_000

Workload = Annotated[str, typer.Option(metavar="NAME", help="What is asked; `kvferry simulate workloads` lists it.")]
Rate = Annotated[float, typer.Option(metavar="R", help="Requests a second, of the whole fleet.")]
Requests = Annotated[
    int | None, typer.Option(help="How many. Default: 2,000, of a suite's days 10,000.", show_default=False)
]
Instances = Annotated[
    int | None, typer.Option(help="Engines alike. Default: 16, or as many as the twin has.", show_default=False)
]
Blocks = Annotated[
    int | None,
    typer.Option(help="Of KV, in each instance. Default: 851 of 16, or the twin's.", show_default=False),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompt and answer; more is left out. Default: 8192, or the twin's.",
        show_default=False,
    ),
]
PrefixCache = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Instances keep the beginnings of prompts. Default: if the workload has any known.",
        show_default=False,
    ),
]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of published workloads. (KVFERRY_DATA)")]
Gateways = Annotated[
    int | None, typer.Option(help="They share the requests. Default: 1, or as the twin's.", show_default=False)
]
TwinFile = Annotated[
    Path | None, typer.Option("--twin", metavar="FILE", help="A fleet like that of this file (`kvferry simulate fit`).")
]
Variation = Annotated[float, typer.Option(help="Coefficient of variation of the gaps between requests; 1: Poisson.")]
Urgent = Annotated[float, typer.Option(metavar="SHARE", help="Of the requests that are urgent.")]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        help="Once for each; `kvferry simulate arms` lists them. Default: all but the control.", show_default=False
    ),
]
Seeds = Annotated[int, typer.Option(help="Days of each arm, all arms the same ones.")]
Profiles = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Step times of other engines (step_time_models.json).")
]
Model = Annotated[str, typer.Option(help="Which of them.")]
SloTtft = Annotated[
    float | None, typer.Option(metavar="S", help="Target: seconds to the first token. The share that met it is told.")
]
SloTpot = Annotated[float | None, typer.Option(metavar="S", help="Target: mean seconds of each further token.")]
Against = Annotated[
    str | None, typer.Option(metavar="ARM", help="Also print each arm's ratios to this one, day by day.")
]


@dataclass(frozen=True, slots=True)
class Flags:
    """Those that say what a day is."""

    workload: str
    rate: float
    cv: float
    requests: int | None
    instances: int | None
    gateways: int | None
    urgent: float
    profiles: Path | None
    model: str
    slo_ttft: float | None
    slo_tpot: float | None
    blocks: int | None
    max_model_len: int | None
    data: Path | None
    twin: Path | None
    prefix_cache: bool | None


def question_of(flags: Flags) -> Question:
    """Raises ConfigError for a flag that makes no sense. On stderr: what the first seed's day asks."""
    from orchestrator.policy.targets import Targets  # noqa: PLC0415
    from orchestrator.sim.compare import Question  # noqa: PLC0415
    from orchestrator.sim.workload import LLUMNIX_NAMES, MAX_TOKENS  # noqa: PLC0415

    require(0 < flags.rate < math.inf and 0 < flags.cv < math.inf, "--rate and --cv must be positive")
    require(flags.twin is None or flags.profiles is None, "--twin has step times of its own: leave --profiles out")
    fleet = _twin(flags.twin)
    instances, gateways = _given(flags.instances, fleet.num_instances), _given(flags.gateways, fleet.num_gateways)
    engine = replace(
        fleet.engine,
        num_blocks=_given(flags.blocks, fleet.engine.num_blocks),
        max_model_len=_given(flags.max_model_len, fleet.engine.max_model_len),
    )
    requests = _given(flags.requests, DEFAULT_REQUESTS)
    counts = {"--requests": requests, "--instances": instances, "--gateways": gateways}
    counts |= {"--blocks": engine.num_blocks, "--max-model-len": engine.max_model_len}
    for flag, count in counts.items():
        at_least_one(flag, count)
    require(0 <= flags.urgent < 1, f"--urgent is {flags.urgent:g}, it must be a share below 1")
    for flag, target in (("--slo-ttft", flags.slo_ttft), ("--slo-tpot", flags.slo_tpot)):
        require(target is None or 0 < target < math.inf, f"{flag} is {target}, it must be a number of seconds above 0")
    require(flags.profiles is not None or not flags.model, "--model names an entry of --profiles, which is not given")
    question = Question(
        workload=flags.workload,
        requests_per_s=flags.rate,
        coefficient_of_variation=flags.cv,
        num_requests=requests,
        num_instances=instances,
        num_gateways=gateways,
        urgent_share=flags.urgent,
        times=fleet.times if flags.profiles is None else _times(flags.profiles, flags.model),
        engine=engine,
        targets=Targets(flags.slo_ttft, flags.slo_tpot),
        data=str(config.data_folder(flags.data) or ""),
    )
    require(
        question.workload not in LLUMNIX_NAMES or question.longest >= MAX_TOKENS,
        f"its instances hold {question.longest:,} tokens, and a request of {question.workload} may have {MAX_TOKENS:,}",
    )
    first = question.drawn(1)
    prefix_cache = flags.prefix_cache
    if prefix_cache is None:
        prefix_cache = any(one.prefix_ids for one in first.arrivals)
    question = replace(question, engine=replace(engine, prefix_cache=prefix_cache))
    _tell_requests(question, first)
    return question


def _tell_requests(question: Question, drawn: Drawn) -> None:
    """What it asks, and what of it the instances are too small for."""
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


def arms_of(arm: Sequence[str] | None, against: str | None = None) -> list[str]:
    """Each once, all of them for none. Raises ConfigError for one that is not there, or not compared."""
    from orchestrator.sim.arms import ARMS, arm_of  # noqa: PLC0415

    names = list(dict.fromkeys(arm)) if arm else [name for name, one in ARMS.items() if not one.is_control]
    for name in (*names, *([against] if against else [])):
        arm_of(name)
    require(against is None or against in names, f"--against {against}: it must be one of the arms: --arm {against}")
    return names


def require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ConfigError(otherwise)


def at_least_one(flag: str, count: int) -> None:
    require(count >= 1, f"{flag} is {count}, it must be at least 1")


def writable(flag: str, path: Path | None) -> None:
    """A day takes long: that its figures cannot be written is better known before."""
    if path is not None:
        require(path.parent.is_dir(), f"{flag}: there is no folder {path.parent}")
        require(not path.is_dir(), f"{flag}: {path} is a folder, name a file")


def write(flag: str, path: Path, content: bytes | str) -> None:
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror or error}") from error


def show(sheets: Sequence[Sheet], title: str = "") -> None:
    """Print them."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE, highlight=False, markup=False)
    if title:
        console.print(title)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if index < sheet.num_names else "right")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
        if sheet.note:
            console.print(sheet.note + "\n")


def _times(path: Path, model: str) -> StepTimes:
    from orchestrator.sim.steptime import from_profile  # noqa: PLC0415

    try:
        return from_profile(json.loads(path.read_text(encoding="utf-8")), model)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--profiles {path}: {error}") from error


def _twin(path: Path | None) -> Twin:
    from orchestrator.sim.twin import Twin, twin_of  # noqa: PLC0415

    if path is None:
        return Twin()
    try:
        return twin_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--twin {path}: {error}") from error


def _given(flag: int | None, otherwise: int) -> int:
    return otherwise if flag is None else flag
