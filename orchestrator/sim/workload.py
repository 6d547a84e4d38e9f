"""Which requests does a simulated fleet get? Generated ones, as in Llumnix's evaluation, and those of published traces.

Everything follows from the random numbers given. An open loop: requests come when they come, whatever became of those
before.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

from orchestrator.errors import ConfigError
from orchestrator.sim.arrivals import Arrival

MAX_TOKENS = 6_144
"""Of prompt and answer together, in Llumnix's evaluation."""


@dataclass(frozen=True, slots=True)
class Zipf:
    """Lengths of a power law: Zipf of exponent `alpha` over the ranks 1 .. 2 x mean - 1, scaled to `mean`, rounded up,
    at most `cap`."""

    mean: int
    alpha: float
    cap: int = MAX_TOKENS

    def draw(self, rng: Random, count: int) -> list[int]:
        ranks = range(1, 2 * self.mean)
        weights = [rank**-self.alpha for rank in ranks]
        usual = sum(rank * weight for rank, weight in zip(ranks, weights, strict=True)) / sum(weights)
        drawn = rng.choices(ranks, weights, k=count)
        return [min(self.cap, math.ceil(rank * self.mean / usual)) for rank in drawn]


LLUMNIX = {"S": Zipf(128, 2.0), "M": Zipf(256, 1.5), "L": Zipf(512, 1.15)}
"""Its three distributions of lengths, of prompts and of answers."""


def gamma_times(rng: Random, requests_per_s: float, coefficient_of_variation: float = 1.0) -> Iterator[float]:
    """Times of arrival, without end: gaps are Gamma of that coefficient of variation; 1 is Poisson."""
    shape = coefficient_of_variation**-2
    now_s = 0.0
    while True:
        now_s += rng.gammavariate(shape, 1 / (shape * requests_per_s))
        yield now_s


def generated(rng: Random, prompts: Zipf, answers: Zipf, times: Iterable[float], count: int) -> list[Arrival]:
    """So many requests. An answer ends where prompt and answer reach MAX_TOKENS."""
    num_prompts, num_answers = prompts.draw(rng, count), answers.draw(rng, count)
    arrivals = []
    for index, (at_s, num_prompt, num_answer) in enumerate(zip(times, num_prompts, num_answers, strict=False)):
        prompt = min(num_prompt, MAX_TOKENS - 1)
        most = MAX_TOKENS - prompt
        arrivals.append(Arrival(index, at_s, prompt, min(num_answer, most), most))
    return arrivals


def with_urgent(arrivals: Sequence[Arrival], rng: Random, share: float, priority: int = -10) -> list[Arrival]:
    """The same, that share of them urgent."""
    return [
        replace(one, priority=priority, kind="urgent") if rng.random() < share else replace(one, kind="normal")
        for one in arrivals
    ]


def llumnix_lengths(name: str) -> tuple[Zipf, Zipf]:
    """Of prompts and answers of a trace of its evaluation: `M-L` has medium prompts and long answers. Raises
    ConfigError for no such name."""
    try:
        prompts, answers = (LLUMNIX[part] for part in name.split("-"))
    except (KeyError, ValueError):
        raise ConfigError(f"no workload named {name!r}: name two of S, M and L, such as M-L") from None
    return prompts, answers


def llumnix(
    rng: Random, name: str, requests_per_s: float, count: int, coefficient_of_variation: float = 1.0
) -> list[Arrival]:
    """A trace of its evaluation by name. Raises ConfigError for no such name."""
    times = gamma_times(rng, requests_per_s, coefficient_of_variation)
    return generated(rng, *llumnix_lengths(name), times, count)


def trace(path: Path, count: int | None = None) -> list[Arrival]:
    """A trace with the columns `arrival_s`, `input_tokens` and `output_tokens` (CSV, gzipped or not). Raises
    ConfigError when it cannot be read."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = list(islice(csv.DictReader(file), count))
        lengths = [(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is no trace of requests: {type(error).__name__}: {error}") from error
    return [
        Arrival(index, at_s, max(1, num_prompt), max(1, num_answer), max(1, num_answer))
        for index, (at_s, num_prompt, num_answer) in enumerate(lengths)
    ]


def faster(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same requests in 1/factor of the time, from the first one's on."""
    began_s = arrivals[0].at_s if arrivals else 0.0
    return [replace(one, at_s=(one.at_s - began_s) / factor) for one in arrivals]
