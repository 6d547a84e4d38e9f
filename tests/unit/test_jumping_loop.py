"""Does the jumping event loop keep order, jump exactly, and notice a deadlock?"""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestrator.sim.jumping_loop import MAX_LIMIT_S, Deadlock, JumpedTooFar, JumpingLoop, run_jumping


def test_an_hour_passes_in_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    started_s = time.monotonic()
    assert run_jumping(main()) == pytest.approx(3600)
    assert time.monotonic() - started_s < 10


def test_timers_fire_in_the_order_of_their_times_and_every_run_is_the_same() -> None:
    async def main() -> list[tuple[float, int]]:
        loop = asyncio.get_running_loop()
        fired: list[tuple[float, int]] = []

        async def sleeper(number: int, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            fired.append((loop.time(), number))

        await asyncio.gather(*(sleeper(number, (number * 7 % 5) / 4) for number in range(50)))
        return fired

    first = run_jumping(main())
    assert sorted({now_s for now_s, _ in first}) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [now_s for now_s, _ in first] == sorted(now_s for now_s, _ in first)
    assert run_jumping(main()) == first


def test_what_is_ready_runs_before_the_clock_moves() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        seen: list[float] = []
        loop.call_later(1, lambda: seen.append(loop.time()))
        for _ in range(100):
            await asyncio.sleep(0)
            seen.append(loop.time())
        await asyncio.sleep(1)
        return seen

    assert run_jumping(main()) == [0.0] * 100 + [1.0]


def test_a_timeout_expires_at_its_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_jumping(main()) == pytest.approx(30)


def test_waiting_for_what_nobody_will_do_is_a_deadlock_that_names_the_task() -> None:
    async def main() -> None:
        await asyncio.create_task(asyncio.Event().wait(), name="waits for ever")

    with pytest.raises(Deadlock, match="waits for ever"):
        run_jumping(main())


def test_a_task_that_reschedules_itself_for_ever_is_stopped_at_the_limit() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_later(1, again)

        again()
        await asyncio.Event().wait()

    with pytest.raises(JumpedTooFar):
        run_jumping(main(), limit_s=1000)


def test_a_clock_far_from_zero_still_moves_by_tiny_steps() -> None:
    async def main() -> float:
        await asyncio.sleep(MAX_LIMIT_S - 1)
        for _ in range(1000):
            await asyncio.sleep(1e-10)
        return asyncio.get_running_loop().time()

    assert run_jumping(main(), limit_s=MAX_LIMIT_S) == pytest.approx(MAX_LIMIT_S - 1)


def test_a_limit_past_the_resolution_of_the_clock_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_s"):
        JumpingLoop(limit_s=2 * MAX_LIMIT_S)


def test_timers_of_one_instant_fire_in_the_order_in_which_they_were_set_and_cancelled_ones_do_not() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        fired: list[int] = []
        timers = [loop.call_at(1.0, fired.append, number) for number in range(20)]
        for timer in timers[::3]:
            timer.cancel()
        loop.call_later(0.5, timers[1].cancel)
        await asyncio.sleep(2)
        return fired

    assert run_jumping(main()) == [number for number in range(20) if number % 3 and number != 1]


def test_what_a_callback_raises_is_reported_and_the_loop_goes_on() -> None:
    async def main() -> list[BaseException]:
        loop = asyncio.get_running_loop()
        reported: list[BaseException] = []
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        loop.call_soon(int, "no number")
        await asyncio.sleep(1)
        return reported

    (error,) = run_jumping(main())
    assert isinstance(error, ValueError)


def test_tasks_left_behind_are_cancelled_at_the_end() -> None:
    cancelled: list[str] = []

    async def left_behind() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append("left behind")
            raise

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(left_behind())
        await asyncio.sleep(1)
        return task

    assert run_jumping(main()).cancelled()
    assert cancelled == ["left behind"]
