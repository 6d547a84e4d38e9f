"""Which workloads are there, and what does one ask? Generated ones, published ones, a file of one's own, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from orchestrator.errors import ConfigError
from orchestrator.sim.asked import Drawn, Half, Wanted
from orchestrator.sim.published import find
from orchestrator.sim.servegen import servegen_day
from orchestrator.sim.tables import table_day
from orchestrator.sim.traces import trace_day
from orchestrator.sim.workload import LLUMNIX_NAMES, llumnix

MOONCAKE_TICK_S = 3.0
FILE_ENDINGS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

Draw = Callable[[Path | None, Half, Random, Wanted], Drawn]
"""From the data folder."""


@dataclass(frozen=True, slots=True)
class Source:
    """One that was published."""

    origin: str
    licence: str
    about: str
    draw: Draw
    has_times: bool = True
    """Requests come as they came; False: at generated times."""


def _table(name: str, data: Path | None, half: Half, rng: Random, wanted: Wanted) -> Drawn:
    return table_day(find(data, f"lengths/{name}.csv.gz")[0], half, rng, wanted)


def _azure(name: str, data: Path | None, half: Half, rng: Random, wanted: Wanted) -> Drawn:
    return trace_day(find(data, f"traces/{name}.csv.gz")[0], half, rng, wanted)


def _mooncake(data: Path | None, half: Half, rng: Random, wanted: Wanted) -> Drawn:
    path = find(data, "traces/mooncake_conversation.jsonl.gz")[0]
    return trace_day(path, half, rng, wanted, MOONCAKE_TICK_S)


def _servegen(model: str, data: Path | None, half: Half, rng: Random, wanted: Wanted) -> Drawn:
    clients, lengths = (find(data, f"forecast/servegen_{model}_{what}_*.csv.gz") for what in ("clients", "lengths"))
    return servegen_day(clients, lengths, half, rng, wanted)


def _of_servegen(model: str, about: str) -> Source:
    return Source(
        "alibaba/ServeGen", "Apache-2.0", f"{about}: clients' rates, bursts and lengths", partial(_servegen, model)
    )


SOURCES = {
    "sharegpt": Source(
        "ShareGPT by microsoft/sarathi-serve",
        "Apache-2.0",
        "lengths of conversations' turns, all before a turn in its prompt; Poisson or Gamma arrivals",
        partial(_table, "sharegpt_8k_llama2"),
        has_times=False,
    ),
    "arxiv": Source(
        "arXiv summarization by microsoft/vidur",
        "MIT",
        "lengths of articles and their abstracts; Poisson or Gamma arrivals",
        partial(_table, "arxiv_summarization_llama2"),
        has_times=False,
    ),
    "azure-code": Source(
        "Azure/AzurePublicDataset 2023",
        "CC-BY-4.0, cite Splitwise (ISCA'24)",
        "code completion: arrivals and lengths, short answers",
        partial(_azure, "azure2023_code"),
    ),
    "azure-conv": Source(
        "Azure/AzurePublicDataset 2023",
        "CC-BY-4.0, cite Splitwise (ISCA'24)",
        "conversations: arrivals and lengths",
        partial(_azure, "azure2023_conv"),
    ),
    "mooncake": Source(
        "kvcache-ai/Mooncake FAST'25",
        "Apache-2.0",
        "conversations: arrivals, long prompts, and which prefixes they share",
        _mooncake,
    ),
    "servegen-m-small": _of_servegen("m-small", "a small model"),
    "servegen-m-large": _of_servegen("m-large", "a large model"),
    "servegen-deepseek-r1": _of_servegen("deepseek-r1", "a reasoning model, long answers"),
}


def workload_named(name: str, rng: Random, wanted: Wanted, data: Path | None = None) -> Drawn:
    """One day of it. `name` is a pair of Llumnix's lengths, such as M-L; one of SOURCES, read from the folder `data`;
    or the path of a trace with the columns `arrival_s`, `input_tokens` and `output_tokens`. The latter two may end in
    `:train` or `:test`, the first or second half. Everything follows from `rng`. Raises ConfigError for no such
    workload, or when its file is missing or broken."""
    bare, half = split_name(name)
    if bare in LLUMNIX_NAMES:
        if half is not Half.WHOLE:
            raise ConfigError(f"{name}: {bare} is drawn from the seed and has no halves; other seeds are other days")
        return llumnix(bare, rng, wanted)
    source = SOURCES.get(bare)
    if source is None and not bare.endswith(FILE_ENDINGS):
        raise ConfigError(
            f"no workload named {bare!r}: name two of S, M and L, such as M-L; or {', '.join(SOURCES)}; or a trace's"
            f" file ({', '.join(FILE_ENDINGS)})"
        )
    if wanted.coefficient_of_variation != 1 and (source is None or source.has_times):
        raise ConfigError(f"--cv: the requests of {bare} come as they came, with gaps of their own")
    if source is None:
        return trace_day(Path(bare), half, rng, wanted)
    try:
        return source.draw(data, half, rng, wanted)
    except ConfigError as error:
        raise ConfigError(f"--workload {name}: {error}") from error


def split_name(name: str) -> tuple[str, Half]:
    """`azure-conv:train` is the first half of azure-conv. Raises ConfigError for another suffix."""
    bare, colon, suffix = name.rpartition(":")
    if not colon:
        return name, Half.WHOLE
    if suffix in {Half.TRAIN.value, Half.TEST.value}:
        return bare, Half(suffix)
    if name.endswith(FILE_ENDINGS):
        return name, Half.WHOLE
    raise ConfigError(f"{name}: {suffix!r} is neither train nor test")
