"""Does the engine's thread serve calls between steps, in order, and end cleanly?"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from instance.engine import Engine
from instance.environment import engine_environment
from instance.errors import EngineFailed, StartError
from instance.fake import FakeEngine, FakeEngineBroke
from instance.fake_scheduler import FakeConfig
from instance.loop import EngineLoop, StepDone
from instance.spec import EngineKind, InstanceSpec
from migration.transports import MemoryHub
from migration.types import NotStopped, RequestId, StoppedRequest
from tests.support.fake import FakeKit, memory_mover
from tests.support.pair import Shape

CONFIG = FakeConfig(is_pipelined=True)


class Running:
    """A loop over one fake engine, and what it told."""

    def __init__(self, config: FakeConfig = CONFIG, min_step_s: float = 0.0005) -> None:
        self.told: list[StepDone | str] = []
        self.failures: list[BaseException] = []
        self.stepped = asyncio.Event()
        self.loop = EngineLoop(
            lambda: FakeEngine(config, memory_mover("one", MemoryHub())),
            self._on_step,
            self.failures.append,
            min_step_s,
        )

    def _on_step(self, done: StepDone) -> None:
        self.told.append(done)
        self.stepped.set()

    async def add(self, name: str, max_tokens: int = 500) -> RequestId:
        request_id = RequestId(name)
        submission = FakeKit.submission(None, request_id, Shape(20, max_tokens))  # type: ignore[arg-type]
        assert await self.loop.call(lambda engine: engine.add(submission)) is None
        return request_id


@pytest_asyncio.fixture
async def running() -> AsyncIterator[Running]:
    running = Running()
    await running.loop.start()
    yield running
    await running.loop.stop()


async def test_steps_run_while_there_is_work_and_are_told_in_order(running: Running) -> None:
    await running.add("r", max_tokens=10)
    async with asyncio.timeout(5):
        while not any(
            o.finish_reason is not None for d in running.told if isinstance(d, StepDone) for o in d.result.outputs
        ):
            running.stepped.clear()
            await running.stepped.wait()
    steps = [done.step for done in running.told if isinstance(done, StepDone)]
    assert steps == list(range(1, len(steps) + 1)) and running.loop.num_steps == steps[-1]
    times = running.loop.step_times()
    assert 10 <= len(times) <= steps[-1]
    assert all(time.start_s <= time.end_s for time in times)
    assert sum(time.num_scheduled_tokens for time in times) >= 20 + 9


async def test_what_a_call_did_is_told_before_any_later_step(running: Running) -> None:
    """1. A call runs between two steps. 2. The next step is over before the asyncio loop gets to run.
    3. `then` must still come first: a stream is opened there, and that step's tokens need it."""
    request_id = await running.add("r")
    num_steps = await running.loop.call(lambda engine: engine.has_work() and running.loop.num_steps)
    await running.loop.call(
        lambda engine: running.loop.num_steps, then=lambda number: running.told.append(f"call after {number}")
    )
    running.stepped.clear()
    async with asyncio.timeout(5):
        await running.stepped.wait()
    (at,) = [index for index, told in enumerate(running.told) if isinstance(told, str)]
    number = int(str(running.told[at]).split()[-1])
    assert number >= int(num_steps)
    assert [told.step for told in running.told[:at] if isinstance(told, StepDone)] == list(range(1, number + 1))
    await running.loop.call(lambda engine: engine.abort((request_id,)))


async def test_a_visit_is_tried_again_after_each_step_until_it_has_a_result(running: Running) -> None:
    request_id = await running.add("r")
    async with asyncio.timeout(5):
        await running.stepped.wait()
        stopped = await running.loop.call_until(lambda engine: engine.try_stop(request_id))
    assert isinstance(stopped, StoppedRequest)
    tokens = sum(len(o.token_ids) for d in running.told if isinstance(d, StepDone) for o in d.result.outputs)
    assert stopped.num_output_tokens == tokens, "every token from before the stop has been told already"
    assert await running.loop.call(lambda engine: engine.release(request_id))


async def test_a_visit_ends_when_its_request_is_aborted_meanwhile(running: Running) -> None:
    request_id = await running.add("r")
    async with asyncio.timeout(5):
        await running.stepped.wait()
        stopping = running.loop.call_until(lambda engine: engine.try_stop(request_id))
        running.loop.call(lambda engine: engine.abort((request_id,)))
        assert await stopping is NotStopped.ABORTED or isinstance(stopping.result(), StoppedRequest)
    assert await running.loop.call(lambda engine: engine.requests()) == ()


async def test_what_a_call_changes_while_the_next_step_is_waited_for_is_in_the_load() -> None:
    """The engine has nothing more to do then, and no step comes that would tell."""
    running = Running(FakeConfig(), min_step_s=0.1)
    await running.loop.start()
    request_id = await running.add("r")
    async with asyncio.timeout(5):
        await running.stepped.wait()
        assert running.loop.load.num_running == 1
        await running.loop.call(lambda engine: engine.abort((request_id,)))
        while running.loop.load.num_running:  # noqa: ASYNC110 - the thread sets it after it has answered
            await asyncio.sleep(0.001)
    await running.loop.stop()


async def test_visits_are_served_in_the_order_in_which_they_came(running: Running) -> None:
    order: list[int] = []
    tries = [0, 0, 0]

    def visit(number: int) -> int | None:
        tries[number] += 1
        if tries[number] < 3:
            return None
        order.append(number)
        return number

    futures = [running.loop.call_until(lambda engine, number=number: visit(number)) for number in range(3)]  # type: ignore[misc]
    async with asyncio.timeout(5):
        assert await asyncio.gather(*futures) == [0, 1, 2]
    assert order == [0, 1, 2]


async def test_a_cancelled_visit_is_not_tried_again(running: Running) -> None:
    tries: list[int] = []

    def never(_engine: Engine) -> int | None:
        tries.append(1)
        return None

    visit = running.loop.call_until(never)
    async with asyncio.timeout(5):
        await running.loop.call(lambda engine: None)
        visit.cancel()
        await running.loop.call(lambda engine: None)
        seen = len(tries)
        for _ in range(20):
            await running.loop.call(lambda engine: None)
    assert len(tries) <= seen + 1


async def test_what_a_call_raises_goes_to_its_caller_and_the_engine_goes_on(running: Running) -> None:
    with pytest.raises(ZeroDivisionError):
        await running.loop.call(lambda engine: 1 // 0)
    assert await running.loop.call(lambda engine: engine.facts.model) == "fake"
    assert running.failures == []


async def test_a_step_that_raises_ends_the_engine_and_is_told_once() -> None:
    running = Running(dataclasses.replace(CONFIG, fail_at_step=3))
    await running.loop.start()
    await running.add("r")
    with pytest.raises(EngineFailed):
        async with asyncio.timeout(5):
            while True:
                await running.loop.call(lambda engine: None)
    assert [type(failure) for failure in running.failures] == [FakeEngineBroke]
    await running.loop.stop()
    await running.loop.stop()


async def test_a_stop_ends_the_thread_and_fails_what_still_waits(running: Running) -> None:
    request_id = await running.add("r")
    never: asyncio.Future[int] = running.loop.call_until(lambda engine: None)
    await running.loop.stop()
    with pytest.raises(EngineFailed):
        await never
    with pytest.raises(EngineFailed):
        await running.loop.call(lambda engine: engine.progress(request_id))
    assert not [thread for thread in threading.enumerate() if thread.name in ("engine", "kv-gather")]


async def test_an_engine_that_cannot_start_says_why() -> None:
    def broken() -> FakeEngine:
        raise StartError("no memory for the KV cache: lower --max-model-len")

    loop = EngineLoop(broken, lambda done: None, lambda error: None)
    with pytest.raises(StartError, match="lower"):
        await loop.start()


def test_the_environment_of_a_vllm_engine_keeps_what_the_user_set() -> None:
    spec = InstanceSpec("i0", 1, EngineKind.VLLM, ("some/model",))
    fresh = engine_environment(spec, {}, num_cpus=2, is_local=True)
    assert fresh["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and fresh["OMP_NUM_THREADS"] == "1"
    assert fresh["HF_HUB_OFFLINE"] == "1" and fresh["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    kept = engine_environment(spec, {"OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "0"}, num_cpus=2, is_local=True)
    assert "OMP_NUM_THREADS" not in kept and "HF_HUB_OFFLINE" not in kept
    assert "OMP_NUM_THREADS" not in engine_environment(spec, {}, num_cpus=64, is_local=False)
    assert engine_environment(InstanceSpec("i0", 1, EngineKind.FAKE), {}, num_cpus=2, is_local=False) == {}
