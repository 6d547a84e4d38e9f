"""What happened on the instances during a run? Polls the cluster and keeps samples, moves and drains."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.demo.answers import Move
from orchestrator.errors import OrchestratorError

POLL_S = 0.25
MAX_MISSED = 5
MAX_SAMPLES = 100_000


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance, as the orchestrator last heard of it; sizes in KV blocks."""

    instance: str
    state: str
    total_blocks: int
    used_blocks: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Observation:
    instances: tuple[InstanceView, ...]
    moves: tuple[Move, ...]
    """Migrations that have ended, at least those since the last observation."""


class Fleet(Protocol):
    """What the demo asks of a running cluster."""

    async def observe(self) -> Observation: ...

    async def drain(self, instance: str, within_s: float) -> None:
        """Return when the instance owns no request; the caller waits no longer than `within_s`."""

    async def undrain(self, instance: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One instance at one moment; `at_s` counts from the start of the run."""

    at_s: float
    instance: str
    use: float
    """Share of the KV blocks in use, 0..1."""
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Drain:
    """One drain: called, empty, and back in dispatch, in seconds from the start of the run."""

    instance: str
    called_s: float
    empty_s: float | None
    """None: it was not empty when the demo stopped waiting."""
    undrained_s: float
    num_owned: int
    """Requests it ran or held waiting when the drain was called."""

    @property
    def drain_s(self) -> float | None:
        return None if self.empty_s is None else self.empty_s - self.called_s


@dataclass(slots=True)
class History:
    """Everything seen in one run; `started_s` is the event loop's (monotonic) time at its start."""

    run_name: str
    """Only moves of this run's requests are kept."""
    started_s: float
    instances: tuple[InstanceView, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    moves: dict[str, Move] = field(default_factory=dict)
    drains: list[Drain] = field(default_factory=list)

    def note(self, observation: Observation, now_s: float) -> None:
        self.instances = observation.instances
        if len(self.samples) < MAX_SAMPLES:
            self.samples.extend(
                Sample(
                    at_s=now_s - self.started_s,
                    instance=view.instance,
                    use=view.used_blocks / max(1, view.total_blocks),
                    num_running=view.num_running,
                    num_waiting=view.num_waiting,
                )
                for view in observation.instances
            )
        for move in observation.moves:
            if self.run_name in move.request_id:
                self.moves.setdefault(move.migration_id, move)

    @property
    def num_committed(self) -> int:
        return sum(move.outcome == "committed" for move in self.moves.values())

    def view_of(self, instance: str) -> InstanceView | None:
        return next((view for view in self.instances if view.instance == instance), None)


async def watch(fleet: Fleet, history: History) -> None:
    """Observe until cancelled. Raises the fleet's error after MAX_MISSED looks in a row without an answer."""
    num_missed = 0
    while True:
        try:
            observation = await fleet.observe()
        except OrchestratorError:
            # A busy machine may answer late; a cluster that is gone answers never.
            num_missed += 1
            if num_missed > MAX_MISSED:
                raise
        else:
            num_missed = 0
            history.note(observation, asyncio.get_running_loop().time())
        await asyncio.sleep(POLL_S)
