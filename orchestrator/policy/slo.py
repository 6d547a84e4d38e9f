"""When would a request get its first token on each instance, and how fast the next ones? By load and step time.

Of instance i, with the coefficients of its step-time model (`steptime.py`) and what it last reported:

    ahead  = tokens of the prompts that wait there or were sent since, and this request's own that are not cached there
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
    within_ttft: Mask
    """A request that has no such target is within it everywhere."""
    within_tpot: Mask
    one_ends_s: Floats

    @property
    def meets(self) -> Mask:
        return self.within_ttft & self.within_tpot

    def narrow(self, pool: Mask) -> Mask:
        """Of `pool` those that meet both targets; if none does, those that meet the TTFT, else the TPOT, else all.

        A first token that came late stays late; what decodes too slowly may still be moved (`attain.py`). A target
        that every one meets, or that the request has not, narrows nothing.
        """
        for mask in (self.meets, self.within_ttft, self.within_tpot):
            some = pool & mask
            if bool(some.any()):
                return some
        return pool

    def on(self, row: int) -> Predicted:
        return Predicted(
            float(self.ttft_s[row]), float(self.tpot_s[row]), bool(self.meets[row]), float(self.one_ends_s[row])
        )


@dataclass(frozen=True, slots=True)
class SloParams:
    expected_output_tokens: float = 256.0
    """Mean answer; how long a request that runs goes on, whatever it has given already."""


COLUMNS = (
    "per_base", "per_prefill_token", "per_wide_token", "per_decode", "per_context_token", "per_pair", "block_size",
    "waiting", "waiting_tokens", "prefill_room", "narrow_room", "decode_s", "free_tokens", "ends_per_token",
    "places_left", "one_ends_s", "batch", "slots", "context",
)  # fmt: skip


class Pace:
    """What predictions need to know of each member: columns, one row a member."""

    def __init__(self, params: SloParams | None = None) -> None:
        self._params = params or SloParams()
        self.times = StepTimes()
        self._rows: dict[InstanceId, tuple[int, Epoch]] = {}
        self._reports: dict[InstanceId, LoadReport] = {}
        self._make_columns()

    def set_members(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Keep only these, with rows in the order given."""
        self.times.set_members(members)
        self._rows = {name: (row, epoch) for row, (name, epoch) in enumerate(members)}
        self._reports = {
            name: report
            for name, report in self._reports.items()
            if name in self._rows and report.epoch == self._rows[name][1]
        }
        self._make_columns()

    def _make_columns(self) -> None:
        self._table: Floats = np.zeros((len(COLUMNS), len(self._rows)))
        self._columns = dict(zip(COLUMNS, self._table, strict=True))
        self._columns["prefill_room"][:] = 1.0  # of those that have not reported: nobody asks, but it is divided by
        self._unwritten = dict.fromkeys(self._reports)

    def _written(self) -> dict[str, Floats]:
        """The columns. Most requests want nothing: a report is written when somebody asks what they say."""
        for name in self._unwritten:
            self._write(self._reports[name])
        self._unwritten.clear()
        return self._columns

    def on_report(self, report: LoadReport) -> None:
        """A report that the dispatch book has taken in: of a member, and no older than the last."""
        name = InstanceId(report.instance)
        if self._rows.get(name, (0, None))[1] == report.epoch:
            self._reports[name] = report
            self.times.on_report(report)
            self._unwritten[name] = None

    def _write(self, report: LoadReport) -> None:
        """What a prediction needs of a member, as far as it does not depend on the request."""
        row, epoch = self._rows[InstanceId(report.instance)]
        learned = self.times.coefficients(InstanceId(report.instance), epoch)
        per = [0.0] * NUM_TERMS if learned is None else learned.tolist()
        size, running, context = report.block_size, report.num_running, running_blocks(report) * report.block_size
        waiting_blocks = max(report.waiting_blocks, report.head_of_line_blocks)
        slots = report.max_running or math.inf
        decode_s = per[BASE] + (per[PER_TOKEN] + per[PER_DECODE]) * running + per[PER_CONTEXT_TOKEN] * context
        step_s = decode_s + per[PER_WIDE_TOKEN] * max(0, running - WIDE_STEP_TOKENS)
        self._table[:, row] = (  # in the order of COLUMNS
            per[BASE],
            per[PER_TOKEN],
            per[PER_WIDE_TOKEN],
            per[PER_TOKEN] + per[PER_DECODE],
            per[PER_CONTEXT_TOKEN],
            per[PER_PAIR],
            size,
            report.num_waiting,
            waiting_blocks * size,
            max(1.0, (report.max_step_tokens or math.inf) - running),
            WIDE_STEP_TOKENS - running,
            decode_s,
            (report.free_blocks - waiting_blocks) * size,
            running / max(1.0, context),
            slots - running - report.num_waiting,
            self._params.expected_output_tokens * step_s / running if running else 0.0,
            running + report.num_waiting,
            slots,
            context + waiting_blocks * size,
        )

    # ---- predictions, one value a member
    def predicted_ttft_s(
        self, unseen: Floats, unseen_blocks: Floats, num_prompt_tokens: int, saved_tokens: Floats | float = 0.0
    ) -> Floats:
        """`unseen`, `unseen_blocks`: own dispatches that no report has seen yet, and their demand. `saved_tokens`: how
        much of the prompt's beginning a member has cached. That is not computed, but the rest attends to it."""
        of = self._written()
        sent_tokens = unseen_blocks * of["block_size"]
        before = of["waiting_tokens"] + sent_tokens
        ahead = before + np.maximum(1.0, num_prompt_tokens - saved_tokens)
        num_steps = np.maximum(1.0, np.ceil(ahead / of["prefill_room"]))
        wide = np.maximum(0.0, ahead - num_steps * of["narrow_room"])
        ttft_s: Floats = num_steps * of["decode_s"] + of["per_prefill_token"] * ahead + of["per_wide_token"] * wide
        # Prompts before it are taken to be of equal length: attention grows with the square of each.
        pairs = before * before / np.maximum(2.0, 2.0 * (of["waiting"] + unseen))
        ttft_s += of["per_pair"] * (pairs + (num_prompt_tokens**2 - saved_tokens**2) / 2.0)
        short_tokens = sent_tokens + (num_prompt_tokens + 1.0) - of["free_tokens"]
        ends = np.maximum(short_tokens * of["ends_per_token"], unseen + 1.0 - of["places_left"])
        ttft_s += np.maximum(0.0, ends) * of["one_ends_s"]
        return ttft_s

    def predicted_tpot_s(self, unseen: Floats, unseen_blocks: Floats, num_prompt_tokens: int) -> Floats:
        of = self._written()
        batch = np.minimum(of["batch"] + unseen + 1.0, of["slots"])
        context = of["context"] + unseen_blocks * of["block_size"] + num_prompt_tokens
        tpot_s: Floats = of["per_base"] + of["per_decode"] * batch + of["per_context_token"] * context
        tpot_s += of["per_wide_token"] * np.maximum(0.0, batch - WIDE_STEP_TOKENS)
        return tpot_s

    def check_integrity(self, members: Collection[tuple[InstanceId, Epoch]]) -> None:
        """Raise AssertionError unless it knows just these members, and the columns are those of their reports."""
        assert {(name, epoch) for name, (_, epoch) in self._rows.items()} == set(members)
        assert self._reports.keys() <= self._rows.keys()
        self._written()
        kept = self._table.copy()
        self._make_columns()
        self._written()
        assert np.array_equal(kept, self._table), "predictions rest on stale columns"

    # ---- a choice
    def attainment(
        self, wanted: Wanted, unseen: Floats, unseen_blocks: Floats, saved_tokens: Floats | float = 0.0
    ) -> Attainment:
        """Which members are predicted to meet the targets."""
        targets = wanted.targets
        ttft_s = self.predicted_ttft_s(unseen, unseen_blocks, wanted.num_prompt_tokens, saved_tokens)
        tpot_s = self.predicted_tpot_s(unseen, unseen_blocks, wanted.num_prompt_tokens)
        within_ttft = ttft_s <= (math.inf if targets.ttft_s is None else targets.ttft_s)
        within_tpot = tpot_s <= (math.inf if targets.tpot_s is None else targets.tpot_s)
        return Attainment(ttft_s, tpot_s, within_ttft, within_tpot, self._columns["one_ends_s"])
