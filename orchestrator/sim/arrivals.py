"""What is asked of a simulated fleet, and what became of it?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from migration.types import RequestId
from orchestrator.policy.targets import Targets

PREFIX_BLOCK_TOKENS = 512
"""Of one of an arrival's `prefix_ids`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload."""

    index: int
    at_s: float
    num_prompt: int
    num_answer: int
    """Output tokens after which it ends. Nobody is told."""
    max_tokens: int
    """What the client has asked for at most."""
    priority: int = 0
    kind: str = ""
    """Of which it is one in a report: a class of priority, a client."""
    targets: Targets | None = None
    prefix_ids: tuple[int, ...] = ()
    """One for each PREFIX_BLOCK_TOKENS of the prompt, the last of which may be fewer: prompts whose first n ids are the
    same have the same first n blocks. Empty: nothing is known of what it shares."""

    @property
    def name(self) -> str:
        """Its id at the gateway."""
        return f"r{self.index}"


@dataclass(slots=True)
class Lived:
    """One request's life, as its client saw it."""

    arrival: Arrival
    sent_s: float = 0.0
    """By the world's clock, as are the other times."""
    first_s: float = math.nan
    """When its first token came; NaN: none has."""
    last_s: float = math.nan
    num_tokens: int = 0
    is_over: bool = False
    error: str = ""
    """Why it failed; empty: it did not."""
    longest_gap_s: float = math.nan
    """Between two of its tokens, as `gaps.py` says; NaN: there are no two."""

    @property
    def request_id(self) -> RequestId:
        return RequestId(f"r{self.arrival.index}")

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def latency_s(self) -> float:
        return self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first; NaN where there is none."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else math.nan
