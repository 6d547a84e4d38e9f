"""What is a whole instance, without Ray? Engine thread, mailbox and agent, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import zmq

from instance.agent import Agent
from instance.engines import EngineChoice, choose_engine
from instance.environment import apply_environment
from instance.errors import EngineFailed, InstanceError, StartError
from instance.loop import EngineLoop, StepDone
from instance.mailbox import Mailbox
from instance.migrations import params_for
from instance.spec import InstanceSpec, InstanceStarted, MigrationSummary
from instance.types import EngineFacts, PriorityAnswer
from migration.types import Incarnation

_LOG = logging.getLogger(__name__)


class InstanceService:
    """One instance in this process. Every method belongs to the asyncio loop that called `start`."""

    def __init__(self, choose: Callable[[InstanceSpec], EngineChoice] = choose_engine) -> None:
        self._choose = choose
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._agent: Agent | None = None
        self._loop: EngineLoop | None = None
        self._mailbox: Mailbox | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._facts: EngineFacts | None = None

    async def start(self, spec: InstanceSpec) -> InstanceStarted:
        """Returns when it serves. Raises StartError (one line), having left nothing behind."""
        if self._loop is not None:
            raise StartError(f"instance {spec.instance} has been started already")
        begun_s = time.monotonic()
        apply_environment(spec)
        choice = self._choose(spec)
        try:
            mailbox = Mailbox(spec.token)
            await mailbox.open(spec.host)
        except ValueError as error:
            raise StartError(str(error)) from error
        except zmq.ZMQError as error:
            raise StartError(f"the inbox cannot listen on {spec.host}: {error}") from error
        loop = EngineLoop(choice.make, self._on_step, self._fail, choice.min_step_s)
        try:
            facts = await loop.start()
        except BaseException:
            mailbox.close()
            raise
        self._mailbox, self._loop, self._facts = mailbox, loop, facts
        self._agent = Agent(spec, facts, loop, mailbox)
        self._agent_task = asyncio.create_task(self._agent.run(), name=f"agent-{spec.instance}")
        self._agent_task.add_done_callback(self._agent_done)
        return InstanceStarted(
            instance=spec.instance,
            epoch=spec.epoch,
            address=mailbox.address,
            model=facts.model,
            block_size=facts.block_size,
            total_blocks=facts.total_blocks,
            max_model_len=facts.max_model_len,
            max_num_seqs=facts.max_num_seqs,
            tensor_parallel_size=facts.tensor_parallel_size,
            start_s=time.monotonic() - begun_s,
        )

    @property
    def agent(self) -> Agent:
        """Raises InstanceError before `start`."""
        if self._agent is None:
            raise InstanceError("the instance has not started")
        return self._agent

    @property
    def loop(self) -> EngineLoop:
        """Raises InstanceError before `start`."""
        if self._loop is None:
            raise InstanceError("the instance has not started")
        return self._loop

    @property
    def mailbox(self) -> Mailbox:
        """Raises InstanceError before `start`."""
        if self._mailbox is None:
            raise InstanceError("the instance has not started")
        return self._mailbox

    async def migrate(self, request_id: str, destination: Incarnation, mode: str = "live") -> MigrationSummary:
        """Move a request; returns when that is over, whatever its outcome. Raises ValueError for an unknown mode."""
        return await self.agent.migrate(request_id, destination, params_for(mode))

    def cancel_migration(self, request_id: str, reason: str) -> bool:
        """Give up a migration that leaves here, unless its commit was sent; False when there is none."""
        return self.agent.cancel_migration(request_id, reason)

    async def set_priority(self, request_id: str, priority: int) -> PriorityAnswer:
        """See `Engine.set_priority`. Raises EngineFailed when the engine has ended."""
        return await self.agent.set_priority(request_id, priority)

    def drain(self) -> None:
        self.agent.drain()

    def undrain(self) -> None:
        self.agent.undrain()

    def member_lost(self, instance: str, epoch: int) -> None:
        self.agent.member_lost(instance, epoch)

    async def reset_prefix_cache(self) -> bool:
        return await self.loop.call(lambda engine: engine.reset_prefix_cache())

    def facts(self) -> EngineFacts:
        """Raises InstanceError before `start`."""
        if self._facts is None:
            raise InstanceError("the instance has not started")
        return self._facts

    async def stop(self) -> None:
        """End engine, carriers and inbox. What still runs here is lost; drain first to keep it."""
        agent, self._agent = self._agent, None
        if agent is not None and self._failure is None:
            await agent.close()
        await self.break_down()

    async def break_down(self) -> None:
        """End everything at once and tell nobody: what a killed process does, for tests inside one process."""
        await self._end_agent()
        if self._loop is not None:
            await self._loop.stop()
        if self._mailbox is not None:
            self._mailbox.close()
        self._ended.set()

    async def lifetime(self) -> None:
        """Returns when the instance has been stopped. Raises EngineFailed when it died of its engine (or of a bug)."""
        await self._ended.wait()
        if self._failure is not None:
            raise EngineFailed(f"{type(self._failure).__name__}: {self._failure}") from self._failure

    async def _end_agent(self) -> None:
        if self._agent_task is not None:
            self._agent_task.cancel()
            await asyncio.wait((self._agent_task,))

    def _on_step(self, done: StepDone) -> None:
        if self._agent is not None:
            self._agent.on_step(done)

    def _agent_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The first failure counts: nothing is reported any more, and whoever awaits `lifetime` hears why."""
        if self._failure is None:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            self._failure = error
            _LOG.critical("the instance ends: %r", error, exc_info=error)
            if self._agent_task is not None:
                self._agent_task.cancel()
            self._ended.set()
