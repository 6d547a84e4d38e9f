"""How do timed tests run in no time, the same way every time? An event loop whose clock jumps.

Nothing is ever waited for: when nothing is ready, `loop.time()` moves to the next timer. When nothing is scheduled
either, the tasks wait for each other for ever, and `Deadlock` says which. There are no sockets and no threads here.
It is asyncio's own loop but for its inside: handles that cost little, and a heap that is compared in C; a simulated day
is millions of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DEFAULT_LIMIT_S = 7 * 86_400.0
"""How far the clock may jump in all; a periodic task that nobody stops would otherwise run for ever."""

MAX_LIMIT_S = 4_000_000.0
"""Past this the clock has no room for the nanoseconds that messages of one instant are apart."""

_AT_ONCE = 10_000


class Deadlock(RuntimeError):
    """Nothing is ready and nothing is scheduled: the named tasks can never go on."""


class JumpedTooFar(RuntimeError):
    """The clock passed its limit: something goes on rescheduling itself."""


class _Handle(asyncio.TimerHandle):
    """What is to be called, now or at a time. asyncio's own ask their loop whether it is being debugged."""

    __slots__ = ()

    def __init__(  # not asyncio's, which does what this one is there to save
        self, when_s: float, callback: Callable[[*Ts], object], args: tuple[*Ts], context: contextvars.Context | None
    ) -> None:
        self._when = when_s
        self._callback: Callable[..., object] | None = callback
        self._args: tuple[Any, ...] = args
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False

    def __repr__(self) -> str:
        return f"<handle of {self._callback} at {self._when:g} s>"

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = None, ()


class JumpingLoop(asyncio.BaseEventLoop):
    """An event loop whose time is virtual: it starts at 0 s and only timers move it.

    Timers of one instant fire in the order in which they were set.
    """

    def __init__(self, limit_s: float = DEFAULT_LIMIT_S) -> None:
        super().__init__()
        self._now_s = 0.0
        self._limit_s = limit_s
        self._stopping = False
        """asyncio's: `stop` sets it."""
        self._soon: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        """A heap: (when, how many were set before it, what)."""
        self._num_timers = 0
        if not 0 < limit_s <= MAX_LIMIT_S:
            self.close()
            raise ValueError(f"limit_s must lie in (0, {MAX_LIMIT_S:g}], not {limit_s:g}")

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def jump(self, wait_s: float) -> None:
        """The process has stood still for so long: nothing ran meanwhile."""
        self._now_s += wait_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(self._now_s, callback, args, context)
        self._soon.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = _Handle(when, callback, args, context)
        self._num_timers += 1
        heappush(self._timers, (when, self._num_timers, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """From signal handlers (Ctrl-C)."""
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        """Some of what is ready or, where nothing is, due next. asyncio's `run_forever` calls it until stopped."""
        soon, timers = self._soon, self._timers
        for _ in range(_AT_ONCE):
            if soon:
                handle = soon.popleft()
            elif timers:
                when_s, _, handle = heappop(timers)
                if handle._cancelled:
                    continue
                if when_s > self._now_s:
                    self._now_s = when_s
                    if when_s > self._limit_s:
                        raise JumpedTooFar(f"the clock passed {self._limit_s:g} s: some task goes on for ever")
            else:
                names = sorted(task.get_name() for task in asyncio.all_tasks(self))
                raise Deadlock(f"nothing ready, nothing scheduled; waiting for ever: {', '.join(names) or 'no task'}")
            if handle._callback is None:
                continue  # cancelled
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio's: a callback's error is reported, not raised
                self.call_exception_handler({"message": f"Exception in {handle!r}", "exception": error})
            if self._stopping:
                return

    def close(self) -> None:
        self._soon.clear()
        self._timers.clear()
        super().close()


def run_jumping(main: Coroutine[Any, Any, T], limit_s: float = DEFAULT_LIMIT_S) -> T:
    """Run `main` to its end on a fresh `JumpingLoop`, cancel what it left behind, and return its value."""
    with asyncio.Runner(loop_factory=lambda: JumpingLoop(limit_s)) as runner:
        return runner.run(main)


@contextmanager
def few_collections() -> Iterator[None]:
    """Python looks for cycles a hundredth as often: a thousand instances are a million objects that stay, and going
    over them is a seventh of such a day."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100 * thresholds[0], thresholds[1], thresholds[2])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
