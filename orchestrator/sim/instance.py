"""What is an instance of a simulated fleet? Production's agent over a simulated engine, inbox and link."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from instance.agent import Agent
from instance.spec import EngineKind, InstanceSpec
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.sim.copying import Links, SimMover
from orchestrator.sim.engine import LengthEngine
from orchestrator.sim.host import SimHost
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.network import Network
from orchestrator.sim.steptime import StepTimes


@dataclass(frozen=True, slots=True)
class InstanceParams:
    engine: LengthConfig = field(default_factory=LengthConfig)
    times: StepTimes = field(default_factory=StepTimes)
    max_migrations: int = 2
    """At once, in each direction."""
    max_waiting: int = 100_000


class SimInstance:
    """One incarnation. It serves as soon as it is made, on the running (virtual) loop."""

    def __init__(self, name: str, epoch: int, params: InstanceParams, network: Network, links: Links) -> None:
        self.name, self.epoch = name, epoch
        self._network, self._links = network, links
        config, times = params.engine, params.times
        self.mover = SimMover(self.actor_name, links, config.block_size * config.bytes_per_token)
        self.engine = LengthEngine(config, times, self.mover)
        self.host = SimHost(self.engine)
        spec = InstanceSpec(
            instance=name,
            epoch=epoch,
            engine=EngineKind.FAKE,
            token="simulated",
            max_waiting=params.max_waiting,
            max_migrations_out=params.max_migrations,
            max_migrations_in=params.max_migrations,
        )
        inbox = network.open(f"{name}-{epoch}")
        self.agent = Agent(spec, self.engine.facts, self.host, inbox)
        self.host.start(self.agent.on_step)
        self._serving = asyncio.create_task(self.agent.run(), name=f"agent-{name}")
        self._serving.add_done_callback(self._agent_ended)
        self.is_dead = asyncio.Event()
        self.on_bug: Callable[[BaseException], None] = lambda _: None
        """Who hears what ended the agent, which nothing should."""

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(InstanceId(self.name), Epoch(self.epoch), self.agent.own.address)

    @property
    def actor_name(self) -> str:
        return f"{self.name}-{self.epoch}"

    async def stop(self) -> None:
        """In order: whoever it owes an answer hears of it."""
        with contextlib.suppress(asyncio.CancelledError):
            await self.agent.close()
        self.kill()

    def kill(self) -> None:
        """The process is gone, at once and without a word."""
        self.host.end()
        self._serving.cancel()
        self._network.close(self.agent.own.address)
        self._links.remove(self.actor_name)
        self.is_dead.set()

    def _agent_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            self.kill()
            self.on_bug(error)
