"""Do simulated inboxes keep order and lose what they should, and do visitors come in between two steps?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from instance.errors import EngineFailed
from instance.loop import StepDone
from instance.messages import Abort, FleetMessage
from instance.types import Submission
from migration.types import RequestId, StoppedRequest
from orchestrator.sim.copying import LinkParams, Links, SimMover
from orchestrator.sim.engine import Ask, LengthEngine, encode
from orchestrator.sim.host import SimHost
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.network import Network
from orchestrator.sim.steptime import StepTimes

STEP_S = 0.01
RUN_STEPS = 10
"""In a run that nobody cuts."""


def said(*words: str) -> Abort:
    return Abort(words)


# ---------------------------------------------------------------------- network
def test_messages_arrive_in_order_after_one_latency_or_two() -> None:
    async def play() -> list[tuple[float, FleetMessage]]:
        network, loop = Network(0.5), asyncio.get_running_loop()
        one, other = network.open("one"), network.open("other")
        heard: list[tuple[float, FleetMessage]] = []

        async def listen() -> None:
            while len(heard) < 4:
                message = await other.receive()
                heard.append((loop.time(), message))

        listening = asyncio.create_task(listen())
        assert one.send(other.address, said("a")) and one.send(other.address, said("b"))
        await asyncio.sleep(0.2)
        assert one.send(other.address, said("c"))
        await asyncio.sleep(10.1)
        assert one.send(other.address, said("d"))
        await listening
        return heard

    assert run_jumping(play()) == [(0.5, said("a")), (0.5, said("b")), (1.0, said("c")), (11.0, said("d"))]


def test_nothing_comes_to_or_from_a_process_that_is_gone_and_what_is_lost_is_not_told() -> None:
    async def play() -> None:
        network = Network(0.5)
        one, other = network.open("one"), network.open("other")
        with pytest.raises(ValueError, match="an inbox named one is open"):
            network.open("one")
        network.loses = lambda sender, _, message: sender == one.address and message == said("lost")
        assert one.send(other.address, said("lost")) and one.send(other.address, said("kept"))
        assert await other.receive() == said("kept")
        network.close(other.address)
        assert not one.send(other.address, said("late"))
        assert not other.send(one.address, said("from the dead"))

    run_jumping(play())


# ---------------------------------------------------------------------- host
def with_host(play: Callable[[SimHost, list[StepDone]], object]) -> None:
    """A host whose steps take STEP_S each."""

    async def day() -> None:
        engine = LengthEngine(LengthConfig(), StepTimes(STEP_S, 0.0), SimMover("one", Links(LinkParams()), 1))
        host, steps = SimHost(engine), list[StepDone]()
        host.start(steps.append)
        await play(host, steps)  # type: ignore[misc]
        engine.check_integrity()

    run_jumping(day())


def asked(num_answer: int) -> Submission:
    return Submission(RequestId("r"), "client", 0, 10, num_answer, encode(Ask(10, num_answer, num_answer)))


def test_a_visit_waits_for_the_end_of_the_step_and_no_longer() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        loop = asyncio.get_running_loop()
        assert await host.call(lambda engine: engine.add(asked(1000))) is None
        await asyncio.sleep(3.5 * STEP_S)
        visited_s = await host.call(lambda _: loop.time())
        assert visited_s == pytest.approx(4 * STEP_S)
        assert [step.step for step in steps] == [1, 4] and host.num_steps == 4
        assert sum(step.result.work.num_steps for step in steps) == 4

    with_host(play)


def test_tokens_are_told_within_a_run_and_what_a_stopped_request_has_got_before_it_is_stopped() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        def num_told() -> int:
            return sum(len(one.token_ids) for step in steps for one in step.result.outputs)

        assert await host.call(lambda engine: engine.add(asked(1000))) is None
        await asyncio.sleep(20.5 * STEP_S)
        assert 20 - RUN_STEPS <= num_told() <= 20
        await host.call(lambda _: 0)
        told_when_stopped: list[int] = []
        stopped = await host.call(
            lambda engine: engine.try_stop(RequestId("r")), then=lambda _: told_when_stopped.append(num_told())
        )
        assert isinstance(stopped, StoppedRequest)
        assert told_when_stopped == [stopped.num_output_tokens] == [22]
        await host.call(lambda engine: engine.resume(RequestId("r")))
        await asyncio.sleep(900 * STEP_S)
        assert host.num_steps == sum(step.result.work.num_steps for step in steps if step.result.executed)

    with_host(play)


def test_a_look_at_the_load_sees_the_steps_that_have_been_made_and_cuts_nothing() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        await host.call(lambda engine: engine.add(asked(1000)))
        free = host.load.free_blocks
        await asyncio.sleep(9.5 * STEP_S)
        assert host.load.free_blocks == free - 2, "10 tokens of the prompt and 8 more: two blocks of 16"
        assert len(steps) == 1, "the prompt's step; the run that followed goes on"

    with_host(play)


def test_what_a_visit_raises_or_returns_reaches_its_caller_and_the_next_one_comes_in() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        told: list[str] = []
        with pytest.raises(ZeroDivisionError):
            await host.call(lambda _: 1 // 0)
        assert await host.call(lambda _: "result", then=told.append) == "result" and told == ["result"]
        tries = iter([None, None, "at last"])
        await host.call(lambda engine: engine.add(asked(50)))
        tried_s: list[float] = []

        def attempt(_: LengthEngine) -> str | None:
            tried_s.append(host.now_s())
            return next(tries)

        assert await host.call_until(attempt) == "at last"
        assert tried_s == pytest.approx([STEP_S, 2 * STEP_S, 3 * STEP_S]), "after every step"

    with_host(play)


def test_one_that_hangs_makes_no_step_and_goes_on_afterwards() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        loop = asyncio.get_running_loop()
        await host.call(lambda engine: engine.add(asked(20)))
        await asyncio.sleep(2.5 * STEP_S)
        host.hang(True)
        visit = host.call(lambda _: loop.time())
        await asyncio.sleep(5.0)
        assert not visit.done() and len(steps) == 1
        host.hang(False)
        await visit
        await asyncio.sleep(1.0)
        assert sum(len(one.token_ids) for step in steps for one in step.result.outputs) == 20

    with_host(play)


def test_one_that_has_ended_takes_no_visit_and_makes_no_step() -> None:
    async def play(host: SimHost, steps: list[StepDone]) -> None:
        await host.call(lambda engine: engine.add(asked(20)))
        waiting: asyncio.Future[None] = host.call_until(lambda _: None)
        await asyncio.sleep(2.5 * STEP_S)
        host.end()
        assert waiting.cancelled()
        with pytest.raises(EngineFailed, match="has ended"):
            await host.call(lambda _: 1)
        made = len(steps)
        await asyncio.sleep(1.0)
        assert len(steps) == made

    with_host(play)
