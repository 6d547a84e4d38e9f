"""What must have run once before anything is measured? Each feature the demo uses, on both instances."""

from __future__ import annotations

from rich.console import Console

from orchestrator.demo.client import Run, Tally, send_all
from orchestrator.demo.workload import Endpoint, PlannedRequest, Sampling

COPIES = 3
"""Of each, all at once, so that dispatch gives both instances some."""
GREEDY = Sampling(0.0, 1.0, None, 0.0, None)
SEEDED = Sampling(0.8, 0.95, 1, 0.2, None)
LOGPROBS = Sampling(0.0, 1.0, None, 0.0, 2)


async def warm_up(base_url: str, model: str, name: str, console: Console) -> None:
    """The first request with logprobs costs seconds of compilation, the first seeded one a little."""
    plan: list[PlannedRequest] = []
    for sampling in (GREEDY, SEEDED, LOGPROBS):
        for endpoint in Endpoint:
            for _ in range(COPIES):
                plan.append(PlannedRequest(len(plan), 0.0, endpoint, "Tell me about Anna.", 16, 0, True, sampling))
    with console.status("warming up: one request for each feature"):
        await send_all(plan, Run(name, base_url, model, name, len(plan), float("inf")), Tally(len(plan)))
