"""When would a request get its first token on each instance, and how fast the next ones? By load and step time.

Of instance i, with the coefficients of its step-time model (`steptime.py`) and what it last reported:

    ahead  = tokens of the prompts that wait there or were sent since, and this request's own
    steps  = ceil(ahead / (most tokens a step - running requests))       what decodes goes on beside the prefills
    TTFT   = room + steps * time(a step of ahead / steps prefill tokens beside the running batch) + prompts' attention
    room   = ends needed / running * expected output * time(a decode step)   until blocks and a place are free: the
             requests that run end at a constant rate (Little's law), each after `expected_output_tokens` on average
    TPOT   = time(a decode step of everything that runs or waits there, and this request)

A request attains its targets where both predictions are within them. An instance of which nothing is known predicts 0:
it is tried, and known then.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from instance.messages import WIDE_STEP_TOKENS, LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.load import running_blocks
from orchestrator.policy.steptime import (
    BASE,
    NUM_TERMS,
    PER_CONTEXT_TOKEN,
    PER_DECODE,
    PER_PAIR,
    PER_TOKEN,
    PER_WIDE_TOKEN,
    StepTimes,
)
from orchestrator.policy.targets import Targets

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as its attainment is predicted."""

    num_prompt_tokens: int
    targets: Targets


@dataclass(frozen=True, slots=True)
class Predicted:
    """Of one request on one instance."""

    ttft_s: float
    tpot_s: float
    meets: bool
    one_ends_s: float = 0.0
    """Until one of the requests that run there ends, in the mean."""


@dataclass(frozen=True, slots=True, eq=False)
class Attainment:
    """Of one request on every member, by row."""

    ttft_s: Floats
    tpot_s: Floats
    meets: Mask
    one_ends_s: Floats

    def narrow(self, pool: Mask) -> Mask:
        """Of `pool` those that meet the targets; all of it if none does."""
        both = pool & self.meets
        return both if bool(both.any()) else pool

    def on(self, row: int) -> Predicted:
        return Predicted(
            float(self.ttft_s[row]), float(self.tpot_s[row]), bool(self.meets[row]), float(self.one_ends_s[row])
        )


@dataclass(frozen=True, slots=True)
class SloParams:
    expected_output_tokens: float = 256.0
    """Mean answer; how long a request that runs goes on, whatever it has given already."""


class Pace:
    """What predictions need to know of each member: columns in the order of their ids, one row a member."""

    def __init__(self, params: SloParams | None = None) -> None:
        self._params = params or SloParams()
        self.times = StepTimes()
        self._rows: dict[InstanceId, tuple[int, Epoch]] = {}
        self._reports: dict[InstanceId, LoadReport] = {}
        self._make_columns()

    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Keep only these, with rows in order of their ids."""
        self.times.set_members(members)
        self._rows = {name: (row, epoch) for row, (name, epoch) in enumerate(sorted(members))}
        self._reports = {
            name: report
            for name, report in self._reports.items()
            if name in self._rows and report.epoch == self._rows[name][1]
        }
        self._make_columns()

    def _make_columns(self) -> None:
        size = len(self._rows)
        self.coefficients: Floats = np.zeros((NUM_TERMS, size))
        self.running, self.waiting = np.zeros(size), np.zeros(size)
        self.context, self.waiting_tokens = np.zeros(size), np.zeros(size)
        self.free_tokens = np.zeros(size)
        """May be negative: what waits there is counted as taken."""
        self.block_size = np.ones(size)
        self.step_tokens, self.slots = np.full(size, math.inf), np.full(size, math.inf)
        for report in self._reports.values():
            self._write(report)

    def on_report(self, report: LoadReport) -> None:
        """A report that the dispatch book has taken in: of a member, and no older than the last."""
        name = InstanceId(report.instance)
        if self._rows.get(name, (0, None))[1] == report.epoch:
            self._reports[name] = report
            self.times.on_report(report)
            self._write(report)

    def _write(self, report: LoadReport) -> None:
        row, epoch = self._rows[InstanceId(report.instance)]
        learned = self.times.coefficients(InstanceId(report.instance), epoch)
        if learned is not None:
            self.coefficients[:, row] = learned
        size, held = report.block_size, running_blocks(report)
        waiting_blocks = max(report.waiting_blocks, report.head_of_line_blocks)
        self.running[row], self.waiting[row] = report.num_running, report.num_waiting
        self.context[row], self.waiting_tokens[row] = held * size, waiting_blocks * size
        self.free_tokens[row] = (report.free_blocks - waiting_blocks) * size
        self.block_size[row] = size
        self.step_tokens[row] = report.max_step_tokens or math.inf
        self.slots[row] = report.max_running or math.inf

    # ---- predictions, one value a member
    def predicted_ttft_s(self, unseen: Floats, unseen_blocks: Floats, num_prompt_tokens: int) -> Floats:
        """`unseen`, `unseen_blocks`: own dispatches that no report has seen yet, and their demand."""
        sent_tokens = unseen_blocks * self.block_size
        before = self.waiting_tokens + sent_tokens
        ahead = before + max(1, num_prompt_tokens)
        num_steps = np.maximum(1.0, np.ceil(ahead / np.maximum(1.0, self.step_tokens - self.running)))
        prefill_s = num_steps * self._step_s(ahead / num_steps, self.running, self.context)
        # Prompts before it are taken to be of equal length: attention grows with the square of each.
        pairs = before * before / (2.0 * np.maximum(1.0, self.waiting + unseen)) + num_prompt_tokens**2 / 2.0
        batch = np.maximum(1.0, self.running)
        short_tokens = np.maximum(0.0, sent_tokens + num_prompt_tokens + 1.0 - self.free_tokens)
        short_places = np.maximum(0.0, self.running + self.waiting + unseen + 1.0 - self.slots)
        ends = np.maximum(short_tokens * batch / np.maximum(1.0, self.context), short_places)
        room_s = np.where(self.running > 0.0, ends * self.one_ends_s(), 0.0)
        ttft_s: Floats = room_s + prefill_s + self.coefficients[PER_PAIR] * pairs
        return ttft_s

    def predicted_tpot_s(self, unseen: Floats, unseen_blocks: Floats, num_prompt_tokens: int) -> Floats:
        batch = np.minimum(self.running + self.waiting + unseen + 1.0, self.slots)
        context = self.context + self.waiting_tokens + unseen_blocks * self.block_size + num_prompt_tokens
        return self._step_s(0.0, batch, context)

    def one_ends_s(self) -> Floats:
        """Time between two ends of the requests that run there, in the mean."""
        step_s = self._step_s(0.0, self.running, self.context)
        ends_s: Floats = self._params.expected_output_tokens * step_s / np.maximum(1.0, self.running)
        return ends_s

    def _step_s(self, prefill: Any, decoding: Floats, context: Floats) -> Floats:
        per = self.coefficients
        tokens = prefill + decoding
        wide = np.maximum(0.0, tokens - WIDE_STEP_TOKENS)
        seconds: Floats = per[BASE] + per[PER_TOKEN] * tokens + per[PER_WIDE_TOKEN] * wide
        seconds += per[PER_DECODE] * decoding + per[PER_CONTEXT_TOKEN] * context
        return seconds

    # ---- a choice
    def attainment(self, wanted: Wanted, unseen: Floats, unseen_blocks: Floats) -> Attainment:
        """Which members are predicted to meet the targets."""
        ttft_s = self.predicted_ttft_s(unseen, unseen_blocks, wanted.num_prompt_tokens)
        tpot_s = self.predicted_tpot_s(unseen, unseen_blocks, wanted.num_prompt_tokens)
        targets = wanted.targets
        within_ttft = ttft_s <= (math.inf if targets.ttft_s is None else targets.ttft_s)
        within_tpot = tpot_s <= (math.inf if targets.tpot_s is None else targets.tpot_s)
        return Attainment(ttft_s, tpot_s, within_ttft & within_tpot, self.one_ends_s())
