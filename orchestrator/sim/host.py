"""Who steps a simulated engine? A host in virtual time: it makes runs of steps, and lets visitors in between two steps.

See `instance.ports.EngineHost`; production's is `instance.loop.EngineLoop`, with a thread. A run ends at the latest
after `run_s`, so that gateways hear of tokens and load as often as they would otherwise hear of load alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from instance.errors import EngineFailed
from instance.loop import StepDone, StepTime
from instance.report import REPORT_INTERVAL_S
from instance.types import EngineLoad, StepResult
from orchestrator.sim.engine import LengthEngine

T = TypeVar("T")


@dataclass(slots=True)
class _Visit(Generic[T]):
    fn: Callable[[LengthEngine], T | None]
    future: asyncio.Future[T]
    then: Callable[[T], None] | None
    retry: bool


class SimHost:
    """Made and called on one (virtual) asyncio loop. Nothing runs before `start`."""

    def __init__(self, engine: LengthEngine, run_s: float = REPORT_INTERVAL_S) -> None:
        self._engine = engine
        self._run_s = run_s
        self._loop = asyncio.get_running_loop()
        self._on_step: Callable[[StepDone], None] = lambda _: None
        self._visits: deque[_Visit[Any]] = deque()
        self._pending: list[_Visit[Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        """When the run that is under way ends."""
        self._ends_s = 0.0
        self._is_called = False
        """`_attend` is about to be called."""
        self._has_ended = False
        self._is_hanging = False
        self._num_steps = 0
        self._load = engine.load()

    def start(self, on_step: Callable[[StepDone], None]) -> None:
        """Whoever hears of steps. Call it once."""
        self._on_step = on_step

    # ---- what the agent uses
    @property
    def engine(self) -> LengthEngine:
        return self._engine

    @property
    def min_step_s(self) -> float:
        return 0.0

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def load(self) -> EngineLoad:
        if not self._is_hanging and self._engine.runs.settle(self._loop.time()):
            self._load = self._engine.load()
        return self._load

    def now_s(self) -> float:
        return self._loop.time()

    def call(self, fn: Callable[[LengthEngine], T], then: Callable[[T], None] | None = None) -> asyncio.Future[T]:
        return self._enqueue(_Visit(fn, self._loop.create_future(), then, retry=False))

    def look(self, fn: Callable[[LengthEngine], T]) -> asyncio.Future[T]:
        """When the step that is being made ends; the run goes on."""
        runs, now_s = self._engine.runs, self._loop.time()
        if self._has_ended or self._is_hanging or not runs.is_stepping:
            return self.call(fn)
        visit = _Visit(fn, self._loop.create_future(), None, retry=False)
        visit.future.add_done_callback(_retrieve)
        self._loop.call_at(runs.boundary_after(now_s), self._look, visit)
        return visit.future

    def _look(self, visit: _Visit[Any]) -> None:
        if self._has_ended:
            visit.future.cancel()
        elif self._is_hanging:
            self._visits.append(visit)
        else:
            self._engine.runs.settle(self._loop.time())
            self._try(visit)

    def call_until(self, fn: Callable[[LengthEngine], T | None]) -> asyncio.Future[T]:
        return self._enqueue(_Visit(fn, self._loop.create_future(), None, retry=True))

    # ---- what the world does to it
    def end(self) -> None:
        """The process is gone: no step, no visit, no word."""
        self._has_ended = True
        self._stop_timer()
        for visit in (*self._visits, *self._pending):
            visit.future.cancel()
        self._visits.clear()
        self._pending.clear()

    def hang(self, is_hanging: bool) -> None:
        """Stop in the middle of a step, or go on from there as if no time had passed."""
        self._is_hanging = is_hanging
        if is_hanging:
            self._stop_timer()
        elif self._engine.runs.is_stepping:
            self._set_timer(max(self._ends_s, self._loop.time()))
        else:
            self._attend_soon()

    # ---- visits and steps
    def _enqueue(self, visit: _Visit[T]) -> asyncio.Future[T]:
        visit.future.add_done_callback(_retrieve)
        if self._has_ended:
            visit.future.set_exception(EngineFailed("the engine has ended"))
            return visit.future
        self._visits.append(visit)
        if self._is_hanging:
            return visit.future
        if not self._engine.runs.is_stepping:
            self._attend_soon()
        elif (at_s := self._engine.runs.boundary_after(self._loop.time())) < self._ends_s:
            self._engine.runs.cut(at_s)
            self._set_timer(at_s)
        return visit.future

    def _attend_soon(self) -> None:
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._attend)

    def _at_end_of_run(self) -> None:
        self._timer = None
        made = self._engine.runs.end(self._run_s)
        self._load = self._engine.load()
        result = made.result
        self._num_steps += result.work.num_steps
        time = StepTime(made.start_s, made.end_s, result.num_scheduled_tokens, result.num_decoding)
        self._on_step(StepDone(self._num_steps, time, result, self._load))
        if self._pending:
            self._pending = [visit for visit in self._pending if not self._try(visit)]
        self._attend()

    def _attend(self) -> None:
        """Between two steps: let visitors in, then go on stepping."""
        self._is_called = False
        if self._has_ended or self._is_hanging or self._engine.runs.is_stepping:
            return
        if self._visits:
            while self._visits:
                visit = self._visits.popleft()
                # Behind those that wait already.
                if (visit.retry and self._pending) or not self._try(visit):
                    self._pending.append(visit)
            self._load = self._engine.load()
        if self._engine.has_work():
            # Whoever is to be tried after every step is waited for step by step.
            ends_s = self._engine.runs.begin(self._loop.time(), 0.0 if self._pending else self._run_s)
            if ends_s is not None:  # else only a visit can change anything
                self._set_timer(ends_s)

    def _try(self, visit: _Visit[Any]) -> bool:
        """True: it is done, one way or the other."""
        if visit.retry and visit.future.cancelled():
            return True
        try:
            result = visit.fn(self._engine)
        except Exception as error:  # noqa: BLE001 - carried to the caller, who awaits the future
            if not visit.future.done():
                visit.future.set_exception(error)
            return True
        if self._engine.leaving:
            self._tell_leaving()
        if result is None and visit.retry:
            return False
        if visit.then is not None:
            visit.then(result)
        if not visit.future.done():
            visit.future.set_result(result)
        return True

    def _tell_leaving(self) -> None:
        """A request that was stopped has told all it has got before anybody hears that it was stopped."""
        now_s, outputs = self._loop.time(), tuple(self._engine.leaving)
        self._engine.leaving.clear()
        nothing = StepResult(outputs, executed=False, num_scheduled_tokens=0, num_decoding=0)
        self._on_step(StepDone(self._num_steps, StepTime(now_s, now_s, 0, 0), nothing, self._load))

    def _set_timer(self, at_s: float) -> None:
        self._stop_timer()
        self._ends_s = at_s
        self._timer = self._loop.call_at(at_s, self._at_end_of_run)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Mark the exception as seen, so that a call nobody awaits does not warn; whoever awaits it still gets it."""
    if not future.cancelled():
        future.exception()
