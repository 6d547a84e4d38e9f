"""When does a machine's timer fire? Alarms as tasks of the driver's own group, so that what they raise is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migration.events import Timer


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
        await asyncio.sleep(after_s)
        del self._alarms[timer]  # first: firing may set the same timer again, which must not cancel this task
        self._fire(timer)
