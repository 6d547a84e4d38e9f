"""When does each step of a simulated engine end? Runs: as many steps as pass before anything but decoding happens.

A run is computed in one go and takes no time of the simulator's as it goes by; it is cut at a step boundary when
somebody wants to visit the engine, and what it has made by then is taken in when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from instance.types import EngineOutput, StepResult, StepWork, step_work
from orchestrator.sim.lengths import Batch, Sequence
from orchestrator.sim.steptime import StepTimes

_STOP, _LENGTH = 0, 1

Content = Callable[[Sequence, int], tuple[int, ...]]
"""The last so many output tokens of a request: their ids."""


@dataclass(slots=True)
class _Run:
    """Steps that are being made. Those alike are made one by one as time passes; another kind is one step."""

    plan: dict[Sequence, int]
    start_s: float
    num_steps: int
    is_alike: bool
    context_tokens: int
    """That those which decode read in the first step."""
    ends_s: float
    num_made: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """One step of a run that is over."""

    start_s: float
    end_s: float
    result: StepResult


class Runs:
    """The runs of one engine, one after the other."""

    def __init__(self, batch: Batch, times: StepTimes) -> None:
        self._batch = batch
        self._times = times
        self._run: _Run | None = None
        self.slowness = 1.0
        """A step takes so many times as long as it should."""
        self.content: Content | None = None
        """What tokens say; None: nothing, which costs least."""

    @property
    def is_stepping(self) -> bool:
        return self._run is not None

    def begin(self, start_s: float, limit_s: float) -> float | None:
        """Begin a run of as many steps as are alike, in `limit_s` at most but for the first. Returns when it ends;
        None: nothing can be scheduled."""
        assert self._run is None, "a run is under way"
        plan = self._batch.schedule()
        if not plan:
            return None
        decoding = [one for one, count in plan.items() if count == 1 and one.num_output > 0]
        context = sum(one.computed for one in decoding)
        if len(decoding) == len(plan):
            within = self._times.decode_steps_within(len(decoding), context, limit_s / self.slowness)
            num_steps = self._batch.steps_alike(plan, max(1, within))
            if num_steps:
                took_s = self.slowness * self._times.decode_steps_s(len(decoding), context, num_steps)
                self._run = _Run(plan, start_s, num_steps, True, context, start_s + took_s)
                return self._run.ends_s
        chunks = [(count, one.computed) for one, count in plan.items() if count != 1 or one.num_output == 0]
        took_s = self.slowness * self._times.step_s(chunks, len(decoding), context)
        self._run = _Run(plan, start_s, 1, False, context, start_s + took_s)
        return self._run.ends_s

    def boundary_after(self, now_s: float) -> float:
        """When the step that is being made at that time ends."""
        run = self._run
        assert run is not None, "no run is under way"
        return min(run.ends_s, run.start_s + self._alike_s(run, self._made_by(run, now_s) + 1))

    def cut(self, at_s: float) -> None:
        """The run is over at this boundary."""
        run = self._run
        assert run is not None, "no run is under way"
        if run.is_alike and at_s < run.ends_s:
            run.num_steps, run.ends_s = max(1, self._made_by(run, at_s)), at_s

    def settle(self, now_s: float) -> bool:
        """Take in the steps of a run that have ended by then. False: none has that was not taken in before."""
        run = self._run
        if run is None or not run.is_alike:
            return False
        num_made = min(run.num_steps, self._made_by(run, now_s))
        if num_made <= run.num_made:
            return False
        self._batch.advance(run.plan, num_made - run.num_made)
        run.num_made = num_made
        return True

    def end(self) -> list[Made]:
        """The run is over: its steps, with the tokens of all of them in the last one's outputs."""
        run, self._run = self._run, None
        assert run is not None, "no run is under way"
        if not run.is_alike:
            work = step_work((num, one.computed, num == 1 and one.num_output > 0) for one, num in run.plan.items())
            given = self._batch.compute(run.plan)
            return [Made(run.start_s, run.ends_s, _result(self._outputs(given, 1), work))]
        self._batch.advance(run.plan, run.num_steps - run.num_made)
        outputs, num = self._outputs(list(run.plan), run.num_steps), len(run.plan)
        made = []
        start_s = run.start_s
        for index in range(run.num_steps):
            is_last = index == run.num_steps - 1
            end_s = run.ends_s if is_last else run.start_s + self._alike_s(run, index + 1)
            work = StepWork(0, num, num, run.context_tokens + index * num, 0)
            made.append(Made(start_s, end_s, _result(outputs if is_last else (), work)))
            start_s = end_s
        return made

    def _alike_s(self, run: _Run, num_steps: int) -> float:
        if not run.is_alike:
            return run.ends_s - run.start_s
        return self.slowness * self._times.decode_steps_s(len(run.plan), run.context_tokens, num_steps)

    def _made_by(self, run: _Run, now_s: float) -> int:
        if not run.is_alike:
            return int(now_s >= run.ends_s)
        if now_s >= run.ends_s:
            return run.num_steps
        seconds = max(0.0, now_s - run.start_s) / self.slowness
        return self._times.decode_steps_within(len(run.plan), run.context_tokens, seconds)

    def _outputs(self, given: list[Sequence], num_tokens: int) -> tuple[EngineOutput, ...]:
        tokens, outputs = (0,) * num_tokens, []
        for one in given:
            finish = None
            if one.is_over:
                finish = _LENGTH if one.num_output >= one.max_tokens else _STOP
                self._batch.remove(one)
            said = tokens if self.content is None else self.content(one, num_tokens)
            outputs.append(EngineOutput(one.request_id, said, finish, None, ()))
        return tuple(outputs)


def _result(outputs: tuple[EngineOutput, ...], work: StepWork) -> StepResult:
    num_tokens = work.num_prefill_tokens + work.num_decode_tokens
    return StepResult(outputs, True, num_tokens, work.num_decoding, work)
