"""How do timed tests run in no time, the same way every time? An event loop whose clock jumps.

The selector never waits: when nothing is ready, `loop.time()` moves to the next timer. When nothing is scheduled
either, the tasks wait for each other for ever, and `Deadlock` says which. Other threads (executors) are not waited for.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")

DEFAULT_LIMIT_S = 7 * 86_400.0
"""How far the clock may jump in all; a periodic task that nobody stops would otherwise run for ever."""

MAX_LIMIT_S = 4_000_000.0
"""Past this a float's step nears asyncio's clock resolution (1 ns), and a timer that is due may not be seen as due."""


class Deadlock(RuntimeError):
    """Nothing is ready and nothing is scheduled: the named tasks can never go on."""


class JumpedTooFar(RuntimeError):
    """The clock passed its limit: something goes on rescheduling itself."""


class _NeverWaitingSelector(selectors.BaseSelector):
    """Looks at real file descriptors without waiting; hands every wait to the loop as a jump."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.loop: JumpingLoop | None = None

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if not ready and timeout != 0 and self.loop is not None:
            self.loop.jump(timeout)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual: it starts at 0 s and only timers move it.

    Timers of one instant fire in the order of asyncio's heap: the same in every run, but not the order of their making.
    """

    def __init__(self, limit_s: float = DEFAULT_LIMIT_S) -> None:
        selector = _NeverWaitingSelector()
        self._now_s = 0.0
        self._limit_s = limit_s
        super().__init__(selector)
        selector.loop = self
        if not 0 < limit_s <= MAX_LIMIT_S:
            self.close()
            raise ValueError(f"limit_s must lie in (0, {MAX_LIMIT_S:g}], not {limit_s:g}")

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def jump(self, wait_s: float | None) -> None:
        """Move the clock by what the loop would have waited; None means that no timer is set.

        Raises:
            Deadlock: no timer is set.
            JumpedTooFar: the clock would pass its limit.
        """
        if wait_s is None:
            names = sorted(task.get_name() for task in asyncio.all_tasks(self))
            raise Deadlock(f"nothing ready, nothing scheduled; waiting for ever: {', '.join(names) or 'no task'}")
        # A wait below the clock's resolution must still move it, or the loop would spin.
        self._now_s = max(self._now_s + wait_s, math.nextafter(self._now_s, math.inf))
        if self._now_s > self._limit_s:
            raise JumpedTooFar(f"the clock passed {self._limit_s:g} s: some task goes on for ever")


def run_jumping(main: Coroutine[Any, Any, T], limit_s: float = DEFAULT_LIMIT_S) -> T:
    """Run `main` to its end on a fresh `JumpingLoop`, cancel what it left behind, and return its value."""
    with asyncio.Runner(loop_factory=lambda: JumpingLoop(limit_s)) as runner:
        return runner.run(main)
