"""What is a simulated fleet made of? Production's agents, gateways and orchestrator, in one process and virtual time.

What is simulated is below them: engines (lengths), the network (one latency), links (bandwidth, shared), calls to
actors. Whatever they decide is decided by the code that serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

from instance.spec import MigrationSummary
from migration.types import Epoch, InstanceId, Outcome, RequestId
from orchestrator.errors import StartUpError
from orchestrator.events import GatewayStarted, InstanceStarted
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.types import RouterParams
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.sim.arms import ARMS, Arm
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.breaking import Breaker
from orchestrator.sim.clients import Clients
from orchestrator.sim.copying import LinkParams, Links
from orchestrator.sim.day import Counts
from orchestrator.sim.faults import Fault
from orchestrator.sim.fleet import SimFleet
from orchestrator.sim.instance import InstanceParams, SimInstance
from orchestrator.sim.journal import MemoryJournal
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.losses import Losses
from orchestrator.sim.network import Network
from orchestrator.sim.presence import Presence
from orchestrator.sim.steptime import StepTimes
from orchestrator.sim.watching import Watch
from orchestrator.state import CoreParams


@dataclass(frozen=True, slots=True)
class WorldParams:
    num_instances: int = 2
    num_gateways: int = 1
    engine: LengthConfig = field(default_factory=LengthConfig)
    times: StepTimes = field(default_factory=StepTimes)
    link: LinkParams = field(default_factory=LinkParams)
    core: CoreParams = field(default_factory=CoreParams)
    """Of the orchestrator; gateways dispatch by its `dispatch`."""
    arm: Arm = ARMS["ours"]
    seed: int = 0
    """Of whatever draws numbers: the dice of some arms. Ours has none."""
    tick_s: float = 0.5
    latency_s: float = 0.0003
    """Of a message between two processes."""
    call_s: float = 0.001
    """Of a call to an actor, each way."""
    front_end_s: float = 0.0
    """Of each request, in its gateway: HTTP, the front end, the tokenizer. They do one request at a time."""
    start_s: float = 30.0
    """Until an instance serves that is started while the fleet runs."""
    settle_s: float = 1.0
    """Between the start of everything and the first request."""
    max_waiting: int = 100_000
    """Requests that an instance lets wait."""
    keeps_journal: bool = False
    hashes_journal: bool = False
    """Keep its digest alone."""
    give_up_s: float = 3600.0
    """What is not answered so long after the last request was sent has failed."""
    faults: tuple[Fault, ...] = ()
    notice_s: float = 0.0
    """From the end of a process until the orchestrator hears of it."""


class World:
    """One fleet. `play` once."""

    def __init__(self, params: WorldParams) -> None:
        core = params.arm.core_params(params.core)
        core = replace(core, max_instances=max(core.max_instances, params.num_instances))
        self.params = params = replace(params, core=core)
        self.network = Network(params.latency_s)
        self.links = Links(params.link)
        self.instances: dict[str, SimInstance] = {}
        """Those that live, by name."""
        self.ended: list[SimInstance] = []
        self.fleet = SimFleet(params.call_s, params.notice_s)
        self.gateways = [self._make_gateway(number) for number in range(params.num_gateways)]
        self.clients = Clients(self.gateways, params.engine, params.front_end_s)
        self.fleet.on_commit = self._has_moved
        self.losses = Losses()
        self.presence = Presence()
        self.watch = Watch(self.instances, self.fleet, core.levels.load_params)
        self.core = params.arm.make_core(params.core)
        now_s = asyncio.get_running_loop().time()
        has_journal = params.keeps_journal or params.hashes_journal
        self.journal = MemoryJournal(self.core, now_s, params.keeps_journal) if has_journal else None
        self.orchestrator = OrchestratorLoop(
            self.core,
            self.fleet,
            self.network.open("orchestrator"),
            LoopParams(tick_s=params.tick_s),
            self.journal,
            launcher=_Launcher(self),
        )
        self.on_instance: Callable[[SimInstance], None] = lambda _: None
        """Who sees each instance before it serves."""
        self.epilogue: Callable[[], Awaitable[None]] | None = None
        """What is to be done once all requests and faults are over, while all parts still run."""
        self.breaker = Breaker(self, params.faults, Random(f"{params.seed}/faults")) if params.faults else None
        self._tasks: list[asyncio.Task[None]] = []
        self._bug: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def play(self, arrivals: Iterable[Arrival]) -> list[Lived]:
        """Serve these, and return what became of each, in their order. Raises what no part expected."""
        await self._start()
        try:
            await asyncio.sleep(self.params.settle_s)
            self.watch.begin()
            playing = asyncio.create_task(self._send(arrivals), name="clients")
            await asyncio.wait((playing, self._bug, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                playing.cancel()
                for part in (self._bug, *self._tasks):
                    if part.done():
                        part.result()
                raise RuntimeError("a part of the fleet ended by itself")
            playing.result()
        finally:
            self.watch.end()
            await self._stop()
        return [self.clients.lived[request_id] for request_id in self.clients.lived]

    def counts(self) -> Counts:
        everybody, outcomes = [*self.instances.values(), *self.ended], self.fleet.outcomes
        committed = outcomes[Outcome.COMMITTED.value]
        return Counts(
            preemptions=sum(one.engine.batch.num_preemptions for one in everybody),
            migrations=committed,
            broken_off=outcomes.total() - committed,
            copied_bytes=sum(one.mover.num_bytes for one in everybody),
            messages=self.network.num_messages,
            prompt_tokens=sum(one.engine.batch.num_prompt_tokens for one in everybody),
            found_tokens=sum(one.engine.batch.num_found_tokens for one in everybody),
        )

    # ---- who is there
    def start_instance(self, name: str, epoch: int) -> InstanceStarted:
        """It serves from now on."""
        params, core = self.params, self.params.core
        most = max(1, core.max_migrations_out, core.max_migrations_in)
        of_each = InstanceParams(params.engine, params.times, most, params.max_waiting)
        instance = SimInstance(name, epoch, of_each, self.network, self.links)
        instance.on_bug = self._found_bug
        instance.engine.batch.losses = self.losses
        self.presence.began_s[instance.actor_name] = asyncio.get_running_loop().time()
        self.on_instance(instance)
        self.instances[name] = instance
        self.fleet.instances[instance.actor_name] = instance
        return InstanceStarted(
            instance.incarnation, instance.actor_name, "lengths", params.engine.block_size, params.engine.num_blocks
        )

    async def stop_instance(self, name: str, epoch: int) -> None:
        instance = self.instances.get(name)
        if instance is not None and instance.epoch == epoch:
            await instance.stop()
            self._forget(instance)

    def kill_instance(self, name: str) -> None:
        """Its process is gone; whoever watches it hears of it."""
        instance = self.instances[name]
        instance.kill()
        self._forget(instance)

    def _forget(self, instance: SimInstance) -> None:
        del self.instances[instance.name]
        self.ended.append(instance)
        self.presence.ended_s[instance.actor_name] = asyncio.get_running_loop().time()

    def _make_gateway(self, number: int) -> GatewayLoop:
        core = self.params.core
        dispatch = replace(core.dispatch, load=core.levels.load_params)
        make = self.params.arm.make_book
        book = None if make is None else make(dispatch, Random(f"{self.params.seed}/{number}"))
        gateway = GatewayLoop(self.network.open(f"gateway-{number}"), RouterParams(dispatch=dispatch), book)
        self.fleet.gateways[f"gateway-{number}"] = gateway
        return gateway

    # ---- a play
    async def _start(self) -> None:
        self._tasks = [asyncio.create_task(self.orchestrator.run(), name="orchestrator")]
        self._tasks += [asyncio.create_task(gateway.run(), name="gateway") for gateway in self.gateways]
        await asyncio.sleep(0)  # let `run` open its task group
        for number in range(len(self.gateways)):
            self.orchestrator.add(GatewayStarted(f"gateway-{number}", f"gateway-{number}", ""))
        for number in range(self.params.num_instances):
            self.orchestrator.add(self.start_instance(f"instance-{number}", 1))
        await self.orchestrator.until_gateways_know()

    async def _send(self, arrivals: Iterable[Arrival]) -> None:
        breaking = None if self.breaker is None else asyncio.create_task(self.breaker.run(), name="faults")
        await self.clients.send_all(arrivals)
        try:
            async with asyncio.timeout(self.params.give_up_s):
                await self.clients.until_over()
        except TimeoutError:
            for lived in self.clients.lived.values():
                if not lived.is_over:
                    lived.error = f"not answered within {self.params.give_up_s:.0f} s"
        if breaking is not None:
            await breaking
        if self.epilogue is not None:
            await self.epilogue()

    async def _stop(self) -> None:
        self.orchestrator.stop()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for instance in self.instances.values():
            instance.kill()

    def _has_moved(self, summary: MigrationSummary) -> None:
        if summary.moved_tokens:  # else it waited before the move, too: its client cannot tell the two apart
            self.clients.has_moved(RequestId(summary.request_id), summary.destination)

    def _found_bug(self, error: BaseException) -> None:
        if not self._bug.done():
            self._bug.set_exception(error)


class _Launcher:
    """See `orchestrator.runtime.ports.Launcher`."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(self, instance: InstanceId, epoch: Epoch) -> InstanceStarted:
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(self._world.params.start_s)
        if instance in self._world.instances:
            raise StartUpError(f"{instance} is there already")
        started = self._world.start_instance(instance, epoch)
        self._world.presence.began_s[started.actor_name] = began_s
        return started

    async def stop(self, instance: InstanceId, epoch: Epoch) -> None:
        await self._world.stop_instance(instance, epoch)
