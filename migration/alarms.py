"""When does a machine's timer fire? Alarms as tasks of the driver's own group, so that what they raise is seen.

A process that stood still for longer than a lease finds the lease ended and, beside it, the messages that kept it
alive: these are heard first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migration.events import Timer

LATE_S = 1.0
"""An alarm so late says that this process stood still (a step that holds the interpreter, a stopped machine)."""
HEARING_S = 0.2


class Alarms:
    """The timers of one machine; at most one of each kind."""

    def __init__(self, tasks: asyncio.TaskGroup, fire: Callable[[Timer], None]) -> None:
        self._tasks = tasks
        self._fire = fire
        self._alarms: dict[Timer, asyncio.Task[None]] = {}

    def set(self, timer: Timer, after_s: float) -> None:
        self.clear(timer)
        self._alarms[timer] = self._tasks.create_task(self._ring(timer, after_s))

    def clear(self, timer: Timer) -> None:
        alarm = self._alarms.pop(timer, None)
        if alarm is not None:
            alarm.cancel()

    def clear_all(self) -> None:
        for timer in tuple(self._alarms):
            self.clear(timer)

    async def _ring(self, timer: Timer, after_s: float) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + after_s
        await asyncio.sleep(after_s)
        while loop.time() - due_s > LATE_S:
            # The other side did its part meanwhile: what it said waits in the inbox, and is heard before it is blamed.
            due_s = loop.time() + HEARING_S
            await asyncio.sleep(HEARING_S)
        del self._alarms[timer]  # first: firing may set the same timer again, which must not cancel this task
        self._fire(timer)
