"""Which requests does bench.policy_live send? Gamma arrivals of heavy-tailed lengths, as in the evaluation of Llumnix.

Lengths are Zipf, arrivals Gamma with a coefficient of variation (`orchestrator/sim/workload.py`, whose requests for the
simulator are alike). Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from random import Random

from orchestrator.demo.prose import diary
from orchestrator.demo.workload import Endpoint, PlannedRequest, Sampling
from orchestrator.sim.workload import Zipf, gamma_times

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=None, frequency_penalty=0.0, num_logprobs=None)
PROMPTS, OUTPUTS = Zipf(mean=64, alpha=2.0, cap=512), Zipf(mean=128, alpha=1.5, cap=1024)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one arm is sent."""

    requests_per_s: float
    duration_s: float
    coefficient_of_variation: float = 2.0
    prompts: Zipf = PROMPTS
    outputs: Zipf = OUTPUTS

    def plan(self, seed: int) -> tuple[PlannedRequest, ...]:
        """In order of arrival. Each answer has exactly the length that was drawn."""
        rng = Random(seed)
        times = gamma_times(rng, self.requests_per_s, self.coefficient_of_variation)
        arrivals = list(takewhile(lambda at_s: at_s < self.duration_s, times))
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
