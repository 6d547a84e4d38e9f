"""Who misses targets, and where could a request go? What moves by attainment must know of a whole fleet, as columns.

The formulas are those of `standing.py`, which a test holds the columns to. They leave out what cannot be: whoever they
let through is looked at in full, so that a tick costs a few array operations and a few looks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import chain
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from instance.lifecycle import State
from instance.messages import WIDE_STEP_TOKENS, LoadReport
from migration.types import InstanceId
from orchestrator.policy.moves import InstanceView, freeness_steps
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.policy.standing import EXPECTED_OUTPUT_TOKENS, NOBODY, Speeds, Standing

Floats = npt.NDArray[np.float64]
OF_LOAD = (
    "block_size", "free_blocks", "total_blocks", "head_of_line_blocks", "num_running", "num_waiting", "waiting_blocks",
    "max_running", "max_step_tokens",
)  # fmt: skip
OF_VIEW = ("slots_out", "slots_in", "tightest.tpot_s", "tightest.left_s", "signal_age_s")
"""Fields that are columns as they stand."""
_SERVING = State.SERVING.value
LEAST_LEFT_S = 1e-3
CANNOT = -math.inf
"""Steps left of an instance that nothing may go to."""


class Places:
    """Columns, one row an instance, in order of name. Sizes in tokens, times in seconds."""

    def __init__(self, views: Sequence[InstanceView], speeds: Speeds, params: RebalanceParams) -> None:
        self._params = params
        self._names = [view.instance for view in views]
        self._columns(views, np.array([speeds[name] for name in self._names]))
        self._fastest: tuple[float, float] | None = None
        self._by_steps: npt.NDArray[np.intp] | None = None
        """Rows, the freest first."""

    def _columns(self, views: Sequence[InstanceView], speeds: Floats) -> None:
        loads = [view.load for view in views]
        size, free, total, head, running, waiting, waiting_blocks, slots, step_tokens = _table(OF_LOAD, loads)
        slots_out, slots_in, tight_tpot_s, tight_left_s, age_s = _table(OF_VIEW, views)
        base, per_token, per_wide, per_decode, self.per_context, per_pair = speeds.reshape(-1, 6).T
        waiting_blocks = np.maximum(waiting_blocks, head)
        slots, step_tokens = (np.where(most != 0.0, most, math.inf) for most in (slots, step_tokens))  # 0: not told
        self.per_token, self.room = per_token, free - waiting_blocks
        context, queued = (total - free) * size, waiting_blocks * size

        def step_s(batch: Floats, num_context_tokens: Floats) -> Floats:
            seconds: Floats = base + (per_token + per_decode) * batch + self.per_context * num_context_tokens
            seconds += per_wide * np.maximum(0.0, batch - WIDE_STEP_TOKENS)
            return seconds

        def first_s(tokens_ahead: Floats, num_ahead: Floats, num_pairs: Floats) -> Floats:
            tokens = tokens_ahead + 1.0
            num_steps = np.maximum(1.0, np.ceil(tokens / np.maximum(1.0, step_tokens - running)))
            wide = np.maximum(0.0, tokens - num_steps * (WIDE_STEP_TOKENS - running))
            decode_s = base + (per_token + per_decode) * running + self.per_context * context
            seconds: Floats = num_steps * decode_s + per_token * tokens + per_wide * wide + per_pair * num_pairs
            short = tokens - free * size
            ends = np.maximum(short * running / np.maximum(1.0, context), running + num_ahead + 1.0 - slots)
            each_s = EXPECTED_OUTPUT_TOKENS * step_s(running, context) / np.maximum(1.0, running)
            seconds += np.where(running > 0.0, np.maximum(0.0, ends) * each_s, 0.0)
            return seconds

        def tpot_s(num_running: Floats) -> Floats:
            fits = np.where(queued > free * size, np.maximum(0.0, free * size) / np.maximum(1.0, queued), 1.0)
            return step_s(np.minimum(num_running + fits * waiting, slots), context + fits * queued)

        nobody = np.zeros(len(views))
        self.tpot_s, self.first_s = tpot_s(running + 1.0), first_s(nobody, nobody, nobody)
        """Of a newcomer of no length, who is the most urgent there."""
        spare = (free - head - self._headrooms(loads)) * size
        steps = np.where(spare >= 0.0, spare / np.maximum(1.0, running), spare)
        can_take = (slots_in > 0.0) & np.array([load.state == _SERVING for load in loads], dtype=np.bool_)
        self.steps = np.where(can_take & (steps >= self._params.threshold_steps), steps, CANNOT)
        last_s = first_s(queued, waiting, queued * queued / np.maximum(2.0, 2.0 * waiting))
        tight_left_s = tight_left_s - age_s
        # One whose time has just run out, since its report, must not hide others behind it.
        is_due = tight_left_s < math.inf
        by_ttft = np.where(is_due, last_s / np.where(is_due, np.maximum(tight_left_s, LEAST_LEFT_S), 1.0), 0.0)
        self.misses_by = np.where(slots_out > 0.0, np.maximum(tpot_s(running) / tight_tpot_s, by_ttft), 0.0)
        """About how far the worst prediction there is from its target, as a ratio; 0: it cannot send anything."""

    def _headrooms(self, loads: Sequence[LoadReport]) -> Floats | float:
        """Blocks kept free on each."""
        params = self._params.load
        if not params.headroom_blocks:
            return 0.0
        return np.array([params.headroom_of(load.running_by_priority) for load in loads], dtype=np.float64)

    # ---- who
    def missing(self) -> list[int]:
        """Rows of those that miss, by the least first; `attain_sources` at most."""
        rows = (self.misses_by > 1.0 + self._params.attain_margin).nonzero()[0]
        return list(rows[np.argsort(self.misses_by[rows], kind="stable")][: self._params.attain_sources].tolist())

    # ---- where
    def fastest(self) -> tuple[float, float]:
        """(TPOT, TTFT) that no newcomer is below."""
        if self._fastest is None:
            can_take = self.steps > CANNOT
            tpot_s, first_s = (float(of.min(where=can_take, initial=math.inf)) for of in (self.tpot_s, self.first_s))
            self._fastest = tpot_s, first_s
        return self._fastest

    def freest(
        self,
        num_blocks: int,
        num_tokens: int,
        within: tuple[float, float],
        not_these: Collection[InstanceId],
    ) -> list[int]:
        """Rows of the freest `max_destinations` that have room, and might give it a token every `within[0]` seconds and
        the first one in `within[1]`."""
        most_tpot_s, most_ttft_s = within
        possible = (self.steps > CANNOT) & (self.room >= num_blocks)
        if most_tpot_s < math.inf:
            possible &= self.tpot_s + self.per_context * num_tokens <= most_tpot_s
        if most_ttft_s < math.inf:
            possible &= self.first_s + self.per_token * (num_tokens - 1) <= most_ttft_s
        if self._by_steps is None:
            self._by_steps = np.argsort(-self.steps, kind="stable")  # of equals the first by name
        most = self._params.max_destinations
        freest = self._by_steps[possible[self._by_steps]][: most + len(not_these)].tolist()
        return [row for row in freest if self._names[row] not in not_these][:most]

    def changed(self, row: int, load: LoadReport, standing: Standing, slots_in: int) -> None:
        """It stands elsewhere now, by a move that was planned or by what is on its way there."""
        self._fastest = self._by_steps = None
        steps = freeness_steps(load, self._params.load)
        self.steps[row] = steps if slots_in > 0 and steps >= self._params.threshold_steps else CANNOT
        self.room[row] = load.free_blocks - standing.num_waiting_tokens / max(1, load.block_size)
        self.tpot_s[row] = standing.with_running(0).tpot_s()
        self.first_s[row] = standing.first_token_s(NOBODY, 0)


def _table(fields: tuple[str, ...], of: Sequence[object]) -> Floats:
    """(fields, `of`): a row for each field, a column for each of these."""
    told = chain.from_iterable(map(attrgetter(*fields), of))
    return np.fromiter(told, np.float64, len(of) * len(fields)).reshape(len(of), len(fields)).T
