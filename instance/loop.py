"""Who steps the engine? One thread that owns it: control calls between steps, steps while there is work.

Everything the thread tells the asyncio loop (results of calls, results of steps, the engine's failure) arrives there in
the order in which it happened: a call's `then` runs before the outputs of any later step are delivered.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from instance.engine import Engine
from instance.errors import EngineFailed
from instance.types import EngineFacts, EngineLoad, StepResult

T = TypeVar("T")

MAX_STEP_TIMES = 16_384
VISIT_POLL_S = 0.001
"""How often an unfinished visit is tried again while the engine says it has nothing to do."""
STOP_GRACE_S = 10.0
"""A stop waits this long for the step that runs; then the (daemon) thread is left behind."""


class StepTime(msgspec.Struct, frozen=True):
    """When one step ran (time.monotonic()), and what it did."""

    start_s: float
    end_s: float
    num_scheduled_tokens: int
    num_decoding: int


class StepDone(msgspec.Struct, frozen=True):
    """One step, as the asyncio loop hears of it; or several, told at once (`StepWork.num_steps`)."""

    step: int
    """Counts the steps from 1; of several the last one."""
    time: StepTime
    result: StepResult
    load: EngineLoad


@dataclass(slots=True)
class _Visit(Generic[T]):
    """A call on the engine's thread; `fn` returns None to be tried again after the next step, if `retry`."""

    fn: Callable[[Engine], T | None]
    future: asyncio.Future[T]
    then: Callable[[T], None] | None
    retry: bool


class EngineLoop:
    """The engine's thread. Made, started, called and stopped from one asyncio loop."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_step: Callable[[StepDone], None],
        on_failure: Callable[[BaseException], None],
        min_step_s: float = 0.0,
    ) -> None:
        """`min_step_s` paces an engine that only models its time: no step starts earlier after the one before."""
        self._make_engine = make_engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._min_step_s = min_step_s
        self._queue: queue.SimpleQueue[_Visit[Any] | None] = queue.SimpleQueue()
        self._pending: list[_Visit[Any]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_times: deque[StepTime] = deque(maxlen=MAX_STEP_TIMES)
        self._num_steps = 0
        self._load: EngineLoad | None = None
        self._failure: BaseException | None = None
        self._is_stopping = False
        self._has_ended = False

    # ---- asyncio side
    async def start(self) -> EngineFacts:
        """Make the engine on its thread. Raises what `make_engine` raises: a StartError, if the user can mend it."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Engine] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        self._engine = await self._started
        return self._engine.facts

    @property
    def engine(self) -> Engine:
        """For its `facts` and its `mover` only: the rest belongs to the thread."""
        return self._engine

    @property
    def min_step_s(self) -> float:
        """No step starts earlier after the one before: what a step of a paced engine takes at least."""
        return self._min_step_s

    def now_s(self) -> float:
        """The asyncio loop's clock."""
        return self._loop.time()

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def load(self) -> EngineLoad:
        """As of the last step or control call."""
        if self._load is None:
            raise EngineFailed("the engine has not started")
        return self._load

    def step_times(self) -> tuple[StepTime, ...]:
        """The last MAX_STEP_TIMES steps, oldest first."""
        return tuple(self._step_times.copy())

    def call(self, fn: Callable[[Engine], T], then: Callable[[T], None] | None = None) -> asyncio.Future[T]:
        """Run `fn` between two steps. `then` runs on the asyncio loop before any later step is delivered there.

        The future fails with EngineFailed when the engine has ended, else with what `fn` raised.
        """
        return self._enqueue(_Visit(fn, self._loop.create_future(), then, retry=False))

    def look(self, fn: Callable[[Engine], T]) -> asyncio.Future[T]:
        """As `call`, for what changes nothing that steps depend on: a host that makes many at once goes on."""
        return self.call(fn)

    def call_until(self, fn: Callable[[Engine], T | None]) -> asyncio.Future[T]:
        """As `call`, but while `fn` returns None it is tried again after every step, in the order of the calls."""
        return self._enqueue(_Visit(fn, self._loop.create_future(), None, retry=True))

    async def stop(self) -> None:
        """Close the engine and end its thread. What still waits fails with EngineFailed. May be called again."""
        if not self._thread.is_alive():
            return
        self._is_stopping = True
        self._queue.put(None)
        await asyncio.wait((self._ended,), timeout=STOP_GRACE_S)
        if self._ended.done():
            self._thread.join()

    def _end(self) -> None:
        """The thread has done its last; on the asyncio side, so that no call can slip in behind it."""
        self._has_ended = True
        left, self._pending = self._pending, []
        while not self._queue.empty():
            visit = self._queue.get_nowait()
            if visit is not None:
                left.append(visit)
        for visit in left:
            _fail(visit.future, EngineFailed(f"the engine has ended: {self._failure or 'stopped'}"))
        _resolve(self._ended, None, None)

    def _enqueue(self, visit: _Visit[T]) -> asyncio.Future[T]:
        # A caller may be cancelled while it waits; the failure it no longer hears of is told by `on_failure`.
        visit.future.add_done_callback(_retrieve)
        if self._has_ended or self._is_stopping:
            visit.future.set_exception(EngineFailed(f"the engine has ended: {self._failure or 'stopped'}"))
        else:
            self._queue.put(visit)
        return visit.future

    # ---- the thread
    def _run(self) -> None:
        try:
            engine = self._make_engine()
            self._load = engine.load()
        except BaseException as error:  # noqa: BLE001 - carried to the caller of `start`, which raises it
            self._tell(_fail, self._started, error)
            self._tell(self._end)
            return
        self._tell(_resolve, self._started, engine, None)
        try:
            self._serve(engine)
        except BaseException as error:  # noqa: BLE001 - whatever a step raised, the engine is never used again
            self._failure = error
        self._close(engine)

    def _serve(self, engine: Engine) -> None:
        while True:
            has_work = engine.has_work()
            if not self._drain(engine, may_wait=not has_work):
                return
            if not engine.has_work():
                continue
            start_s = time.monotonic()
            result = engine.step()
            end_s = time.monotonic()
            self._note(engine, StepTime(start_s, end_s, result.num_scheduled_tokens, result.num_decoding), result)
            if self._pending:
                self._retry(engine)
            # A step that could schedule nothing must not spin: only a call or time can change that.
            pace_s = self._min_step_s if result.executed or result.outputs else max(self._min_step_s, VISIT_POLL_S)
            if pace_s > 0.0 and not self._pace(engine, start_s + pace_s):
                return

    def _note(self, engine: Engine, step_time: StepTime, result: StepResult) -> None:
        self._load = engine.load()
        self._num_steps += 1
        if result.executed:
            self._step_times.append(step_time)
        self._tell(self._on_step, StepDone(self._num_steps, step_time, result, self._load))

    def _drain(self, engine: Engine, may_wait: bool) -> bool:
        """Serve the queue; wait for its first call if there is nothing to step. False: stop."""
        timeout_s = (VISIT_POLL_S if self._pending else None) if may_wait else 0.0
        served = False
        while True:
            try:
                visit = self._queue.get(block=timeout_s != 0.0, timeout=timeout_s or None)
            except queue.Empty:
                break
            if visit is None:
                return False
            self._serve_visit(engine, visit)
            served, timeout_s = True, 0.0
        if may_wait and self._pending:
            self._retry(engine)
        if served:
            self._load = engine.load()
        return True

    def _pace(self, engine: Engine, until_s: float) -> bool:
        """Serve calls until then. False: stop."""
        while (left_s := until_s - time.monotonic()) > 0.0:
            try:
                visit = self._queue.get(timeout=left_s)
            except queue.Empty:
                break
            if visit is None:
                return False
            self._serve_visit(engine, visit)
            self._load = engine.load()
        return True

    def _serve_visit(self, engine: Engine, visit: _Visit[Any]) -> None:
        if visit.retry and self._pending:
            self._pending.append(visit)  # Behind the visits that wait already.
        elif not self._try(engine, visit):
            self._pending.append(visit)

    def _retry(self, engine: Engine) -> None:
        self._pending = [visit for visit in self._pending if not self._try(engine, visit)]

    def _try(self, engine: Engine, visit: _Visit[Any]) -> bool:
        """True: it is done, one way or the other."""
        if visit.retry and visit.future.cancelled():
            return True
        try:
            result = visit.fn(engine)
        except Exception as error:  # noqa: BLE001 - carried to the caller, who awaits the future
            self._tell(_fail, visit.future, error)
            return True
        if result is None and visit.retry:
            return False
        self._tell(_resolve, visit.future, result, visit.then)
        return True

    def _close(self, engine: Engine) -> None:
        if self._failure is not None:
            self._tell(self._on_failure, self._failure)
        try:
            engine.close()
        finally:
            self._tell(self._end)

    def _tell(self, fn: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:
            # The asyncio loop is closed: nobody is left to tell.
            if not self._loop.is_closed():
                raise


def _resolve(future: asyncio.Future[Any], result: object, then: Callable[[Any], None] | None) -> None:
    if then is not None:
        then(result)
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Mark the exception as seen, so that a call nobody awaits does not warn; whoever awaits it still gets it."""
    if not future.cancelled():
        future.exception()
