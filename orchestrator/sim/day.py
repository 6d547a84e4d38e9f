"""What became of one simulated day? Everything that a report may tell of it, as values. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.sim.measures import Curve, FleetMeasures
from orchestrator.sim.score import Score
from orchestrator.sim.series import InstanceSeries, Series


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the whole fleet, its ended instances included."""

    preemptions: int
    migrations: int
    """Committed."""
    broken_off: int
    """Ended otherwise."""
    copied_bytes: int
    messages: int
    prompt_tokens: int
    """Of the requests that have begun on an instance."""
    found_tokens: int
    """Of those: in its prefix cache then."""

    @property
    def found_share(self) -> float:
        return self.found_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Day:
    """Of one arm."""

    arm: str
    seed: int
    scores: dict[str, Score]
    """By kind of request; "" is all of them."""
    counts: Counts
    virtual_s: float
    requests_per_s: float
    fleet: FleetMeasures
    curves: dict[str, Curve]
    """By kind of request."""
    series: Series


@dataclass(frozen=True, slots=True)
class Played:
    """A day, with what is too much to keep of many."""

    day: Day
    instances: list[InstanceSeries]
    journal: bytes
    """Of the orchestrator, for `kvferry replay`; empty unless it was to be kept."""
