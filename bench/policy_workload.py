"""Which requests does bench.policy_live send? Gamma arrivals of heavy-tailed lengths, as in the evaluation of Llumnix.

Lengths are Zipf over the ranks 1 .. 2 x mean - 1, scaled to the mean and cut; arrivals are Gamma with a coefficient of
variation (1 is Poisson). Everything follows from the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from orchestrator.demo.prose import diary
from orchestrator.demo.workload import Endpoint, PlannedRequest, Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=None, frequency_penalty=0.0, num_logprobs=None)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Zipf of exponent `alpha`, scaled to `mean` tokens, at most `cap`."""

    mean: int
    alpha: float
    cap: int

    def draw(self, rng: Random, count: int) -> list[int]:
        ranks = range(1, 2 * self.mean)
        weights = [rank**-self.alpha for rank in ranks]
        usual = sum(rank * weight for rank, weight in zip(ranks, weights, strict=True)) / sum(weights)
        drawn = rng.choices(ranks, weights, k=count)
        return [min(self.cap, math.ceil(rank * self.mean / usual)) for rank in drawn]


@dataclass(frozen=True, slots=True)
class Workload:
    """What one arm is sent."""

    requests_per_s: float
    duration_s: float
    coefficient_of_variation: float = 2.0
    prompts: Lengths = Lengths(mean=64, alpha=2.0, cap=512)
    outputs: Lengths = Lengths(mean=128, alpha=1.5, cap=1024)

    def plan(self, seed: int) -> tuple[PlannedRequest, ...]:
        """In order of arrival. Each answer has exactly the length that was drawn."""
        rng = Random(seed)
        shape = self.coefficient_of_variation**-2
        arrivals: list[float] = []
        now_s = 0.0
        while (now_s := now_s + rng.gammavariate(shape, 1 / (shape * self.requests_per_s))) < self.duration_s:
            arrivals.append(now_s)
        prompts, outputs = self.prompts.draw(rng, len(arrivals)), self.outputs.draw(rng, len(arrivals))
        return tuple(
            PlannedRequest(
                index=index,
                arrival_s=arrival_s,
                endpoint=Endpoint.COMPLETION,
                text=diary(rng, prompt_tokens, output_tokens),
                max_tokens=output_tokens,
                min_tokens=0,
                ignores_eos=True,
                sampling=GREEDY,
            )
            for index, (arrival_s, prompt_tokens, output_tokens) in enumerate(
                zip(arrivals, prompts, outputs, strict=True)
            )
        )
