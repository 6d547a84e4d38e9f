"""When does each step of a simulated engine end? Runs: as many steps as pass before anything but decoding happens.

A run is computed in one go and takes no time of the simulator's as it goes by; it is cut at a step boundary when
somebody wants to visit the engine, and what it has made by then is taken in when somebody looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from instance.types import EngineOutput, StepResult, StepWork, step_work
from orchestrator.sim.lengths import Batch, Sequence
from orchestrator.sim.steptime import Chunk, StepTimes

_STOP, _LENGTH = 0, 1
_INSTANT_S = 1e-9

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
    first_s: float
    """That its first step takes."""
    num_made: int = 0


class Made(msgspec.Struct, frozen=True):
    """A run that is over. What its requests have got may be told later: see `Runs.end`."""

    start_s: float
    end_s: float
    result: StepResult


class Runs:
    """The runs of one engine, one after the other."""

    def __init__(self, batch: Batch, times: StepTimes) -> None:
        self._batch = batch
        self._times = times
        self._run: _Run | None = None
        self._told_s = -math.inf
        """When all that requests had got was told."""
        self.slowness = 1.0
        """A step takes so many times as long as it should."""
        self.content: Content | None = None
        """What tokens say; None: nothing, which costs least."""

    @property
    def is_stepping(self) -> bool:
        return self._run is not None

    def begin(self, start_s: float, limit_s: float, skips_empty: bool = True) -> float | None:
        """Begin a run of as many steps as are alike, in `limit_s` at most but for the first. Returns when it ends;
        None: nothing can be scheduled. `skips_empty`: a step that only preempts takes no time and is none."""
        assert self._run is None, "a run is under way"
        self._batch.now_s = start_s
        plan = self._batch.schedule()
        while skips_empty and not plan and self._batch.has_preempted:
            plan = self._batch.schedule()
        if not plan:
            return None
        chunks: list[Chunk] = []
        num_decoding = context = 0
        for one, count in plan.items():
            if count == 1 and one.tokens > one.num_prompt:
                num_decoding += 1
                context += one.computed
            else:
                chunks.append((count, one.computed))
        if not chunks:
            first_s = self._times.step_s((), num_decoding, context)
            limit = max(1, self._times.steps_within(first_s, num_decoding, limit_s / self.slowness))
            num_steps = self._batch.steps_alike(plan, limit)
            if num_steps:
                took_s = self.slowness * self._times.steps_s(first_s, num_decoding, num_steps)
                self._run = _Run(plan, start_s, num_steps, True, context, start_s + took_s, first_s)
                return self._run.ends_s
        took_s = self.slowness * self._times.step_s(chunks, num_decoding, context)
        self._run = _Run(plan, start_s, 1, False, context, start_s + took_s, took_s)
        return self._run.ends_s

    def boundary_after(self, now_s: float) -> float:
        """When the step that is being made at that time ends."""
        run = self._run
        assert run is not None, "no run is under way"
        if not run.is_alike:
            return run.ends_s
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

    def end(self, tell_every_s: float = 0.0) -> Made:
        """The run is over. Its outputs are all tokens that have not been told yet; of requests that neither begin nor
        end with it they are left for later, until `tell_every_s` has passed since all was told."""
        run, self._run = self._run, None
        assert run is not None, "no run is under way"
        if run.is_alike:
            self._batch.advance(run.plan, run.num_steps - run.num_made)
            num, num_steps = len(run.plan), run.num_steps
            grown = num * (num_steps * (num_steps - 1) // 2)
            work = StepWork(0, num * num_steps, num * num_steps, run.context_tokens * num_steps + grown, 0, num_steps)
            given: Iterable[Sequence] = run.plan
        else:
            work = step_work((num, one.computed, one.computed >= one.num_prompt) for one, num in run.plan.items())
            given = self._batch.compute(run.plan)
            if (losses := self._batch.losses).is_any_open:
                for one in given:
                    losses.got_token(one.request_id, run.ends_s)
        tells_all = tell_every_s <= 0.0 or run.ends_s >= self._told_s + tell_every_s - _INSTANT_S
        if tells_all:
            self._told_s = run.ends_s
            given = [*self._batch.take_untold(), *self._batch.running]
        outputs = self._outputs(given, tells_all)
        num_tokens = work.num_prefill_tokens + work.num_decode_tokens
        return Made(run.start_s, run.ends_s, StepResult(outputs, True, num_tokens, work.num_decoding, work))

    def untold(self, one: Sequence) -> tuple[EngineOutput, ...]:
        """What this one has got and nobody was told: it counts as told now."""
        num_new = one.tokens - one.num_prompt - one.num_told
        if num_new <= 0:
            return ()
        one.num_told += num_new
        return (EngineOutput(one.request_id, self._said(one, num_new), None, None, ()),)

    def _said(self, one: Sequence, num_new: int) -> tuple[int, ...]:
        return (0,) * num_new if self.content is None else self.content(one, num_new)

    def _alike_s(self, run: _Run, num_steps: int) -> float:
        return self.slowness * self._times.steps_s(run.first_s, len(run.plan), num_steps)

    def _made_by(self, run: _Run, now_s: float) -> int:
        if now_s >= run.ends_s:
            return run.num_steps
        if not run.is_alike:
            return 0
        return self._times.steps_within(run.first_s, len(run.plan), max(0.0, now_s - run.start_s) / self.slowness)

    def _outputs(self, given: Iterable[Sequence], tells_all: bool) -> tuple[EngineOutput, ...]:
        outputs = []
        for one in given:
            num_output, num_told = one.tokens - one.num_prompt, one.num_told
            is_over = num_output >= one.num_answer
            if num_output <= num_told or not (tells_all or is_over or num_told == 0):
                continue
            finish = None
            if is_over:
                finish = _LENGTH if num_output >= one.max_tokens else _STOP
            one.num_told = num_output
            said = self._said(one, num_output - num_told)
            outputs.append(EngineOutput(one.request_id, said, finish, None, ()))
            if is_over:
                self._batch.remove(one)
        return tuple(outputs)
