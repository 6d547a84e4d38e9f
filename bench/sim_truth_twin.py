"""What does the simulator say of a run? The same requests at the same times, to a twin of the fleet that had them."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from orchestrator.demo.result import quantile
from orchestrator.errors import OrchestratorError
from orchestrator.journal.lines import Entry, Line
from orchestrator.journal.reader import JournalFiles
from orchestrator.sim.arms import ARMS
from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.fitting import Fit, fitted
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.observed import Observed, observed
from orchestrator.sim.steptime import from_profile
from orchestrator.sim.world import World, WorldParams

MODEL = "llama3.1-8b/rtxpro6000/tp1"
"""Of the published run, in `step_time_models.json`."""
PUBLISHED = LengthConfig(
    num_blocks=30_000, max_model_len=131_072, max_num_seqs=128, max_num_batched_tokens=2048, bytes_per_token=131_072
)
ARM = ARMS["dispatch"]
MEASURES = ("mean_e2e", "p95_ttft", "throughput")


class Served(msgspec.Struct, frozen=True):
    """One request, as its client saw it. Times are seconds since the first one was sent."""

    at_s: float
    num_prompt: int
    num_answer: int
    first_s: float
    """When its first token came."""
    last_s: float


class Run(msgspec.Struct, frozen=True):
    name: str
    requests: tuple[Served, ...]
    """In order of sending."""
    began_s: float
    """By the clock of the journal, which is that of the machine (monotonic)."""
    ended_s: float

    def lines_of(self, journal: Path) -> Iterator[Line]:
        """What the orchestrator noted meanwhile."""
        with JournalFiles(journal) as files:
            for _, line in files.lines():
                if not isinstance(line, Entry) or self.began_s <= line.now_s <= self.ended_s:
                    yield line


@dataclass(frozen=True, slots=True)
class Told:
    """Of many requests, those of several runs together."""

    mean_e2e_s: float
    p95_ttft_s: float
    tokens_per_s: float
    """Output, from the first request to the last token."""
    mean_ttft_s: float
    mean_decode_s: float
    """From the first token to the last."""

    def values(self) -> tuple[float, float, float]:
        """In the order of MEASURES."""
        return self.mean_e2e_s, self.p95_ttft_s, self.tokens_per_s


def told(runs: Sequence[Sequence[Served]]) -> Told:
    everybody = [one for run in runs for one in run]
    span_s = sum(max(one.last_s for one in run) - min(one.at_s for one in run) for run in runs)
    return Told(
        mean_e2e_s=statistics.fmean(one.last_s - one.at_s for one in everybody),
        p95_ttft_s=quantile([one.first_s - one.at_s for one in everybody], 95),
        tokens_per_s=sum(one.num_answer for one in everybody) / span_s,
        mean_ttft_s=statistics.fmean(one.first_s - one.at_s for one in everybody),
        mean_decode_s=statistics.fmean(one.last_s - one.first_s for one in everybody),
    )


def errors(simulated: Told, measured: Told) -> dict[str, float]:
    """Relative, signed: below 0, the simulator has said too little."""
    pairs = zip(MEASURES, simulated.values(), measured.values(), strict=True)
    return {name: found / real - 1.0 for name, found, real in pairs}


@dataclass(frozen=True, slots=True)
class Twin:
    """All that is known of a fleet from one run."""

    params: WorldParams
    fit: Fit
    seen: Observed

    def busy_error(self, lines: Iterable[Line]) -> float:
        """Relative, of all the time that the engines were busy in another run: whether its steps took as long as the
        fit says, whatever the rest of the simulator makes of them."""
        works = [window.work for window in observed(lines).windows]
        return sum(map(self.fit.busy_s_of, works)) / sum(work.seconds for work in works) - 1.0


def twin_of(runs: Sequence[Run], journal: Path, num_instances: int) -> Twin:
    """Everything from these runs: step times and sizes from the journal, and from their clients what a request waits
    for beside its engine (HTTP, tokenizer, the way there and back), as the median by which first tokens came later."""
    of_runs = [observed(run.lines_of(journal)) for run in runs]
    seen = replace(of_runs[0], windows=tuple(window for one in of_runs for window in one.windows))
    fit = fitted(seen)
    params = WorldParams(num_instances=num_instances, engine=seen.engine, times=fit.times, arm=ARM)
    later_s = [
        real.first_s - found.first_s
        for run in runs
        for real, found in zip(run.requests, simulated(run.requests, params), strict=True)
    ]
    return Twin(replace(params, front_end_s=max(0.0, statistics.median(later_s))), fit, seen)


def simulated(requests: Sequence[Served], params: WorldParams) -> tuple[Served, ...]:
    """The same requests, in the same order. Raises OrchestratorError when one is refused."""
    arrivals = [
        Arrival(index, one.at_s, one.num_prompt, one.num_answer, one.num_answer) for index, one in enumerate(requests)
    ]

    async def play() -> tuple[Served, ...]:
        lived = await World(params).play(arrivals)
        failed = [one.error for one in lived if one.error]
        if failed:
            raise OrchestratorError(f"{len(failed)} requests failed in the simulator: {failed[0]}")
        began_s = lived[0].sent_s
        return tuple(
            Served(
                at_s=one.sent_s - began_s,
                num_prompt=one.arrival.num_prompt,
                num_answer=one.num_tokens,
                first_s=one.first_s - began_s,
                last_s=one.last_s - began_s,
            )
            for one in lived
        )

    return run_jumping(play())


def published(folder: Path) -> tuple[tuple[Served, ...], tuple[Served, ...]]:
    """(measured, simulated): a run of vLLM 0.19 by LLMServingSim, 300 requests of ShareGPT at 10 a second, one RTX PRO
    6000; step times fitted to kernels measured one by one, and 1 ms a step fitted to that run by its publishers."""
    profiles = folder / "profiles"
    with (profiles / "vllm_measured_RTXPRO6000_llama31-8b_sharegpt300.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = tuple(
        Served(
            float(row["arrival_s"]),
            int(row["input_tokens"]),
            int(row["output_tokens"]),
            float(row["first_token_s"]),
            float(row["last_token_s"]),
        )
        for row in rows
    )
    models = json.loads((profiles / "step_time_models.json").read_text(encoding="utf-8"))
    params = WorldParams(num_instances=1, engine=PUBLISHED, times=from_profile(models, MODEL), arm=ARM)
    return measured, simulated(measured, params)
