"""Which requests does a generator make? Those of Llumnix's evaluation: lengths of a power law, Gamma gaps between them.

Everything follows from the random numbers given. An open loop: requests come when they come, whatever became of those
before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.asked import Drawn, Wanted

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


def generated(
    rng: Random, prompts: Zipf, answers: Zipf, times: Iterable[float], count: int, longest: int = MAX_TOKENS
) -> list[Arrival]:
    """So many requests. An answer ends where prompt and answer reach `longest` tokens."""
    num_prompts, num_answers = prompts.draw(rng, count), answers.draw(rng, count)
    arrivals = []
    for index, (at_s, num_prompt, num_answer) in enumerate(zip(times, num_prompts, num_answers, strict=False)):
        prompt = min(num_prompt, longest - 1)
        most = longest - prompt
        arrivals.append(Arrival(index, at_s, prompt, min(num_answer, most), most))
    return arrivals


def with_urgent(arrivals: Sequence[Arrival], rng: Random, share: float, priority: int = -10) -> list[Arrival]:
    """The same, that share of them urgent."""
    return [
        replace(one, priority=priority, kind="urgent") if rng.random() < share else replace(one, kind="normal")
        for one in arrivals
    ]


LLUMNIX_NAMES = tuple(f"{prompts}-{answers}" for prompts in LLUMNIX for answers in LLUMNIX)
"""Its traces: `M-L` has medium prompts and long answers."""


def llumnix(name: str, rng: Random, wanted: Wanted) -> Drawn:
    """A trace of its evaluation, one of LLUMNIX_NAMES. Its own bound of MAX_TOKENS holds where the engine's is
    higher; prompts and answers end there, none is left out."""
    prompts, answers = (LLUMNIX[part] for part in name.split("-"))
    times = gamma_times(rng, wanted.requests_per_s, wanted.coefficient_of_variation)
    longest = min(MAX_TOKENS, wanted.longest)
    return Drawn(generated(rng, prompts, answers, times, wanted.count, longest))
