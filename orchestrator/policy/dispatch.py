"""Which instance gets a new request? A book of what instances say and of what was sent since, and one pure choice.

The book adds each own dispatch to the instance's load until a report arrives that has seen it, so that a burst between
two reports spreads out instead of herding, also where several gateways see the same reports. It keeps its sums as
columns, one row an instance (`columns.py`); tests/support/slow_dispatch.py is the same choice written out, and tests
hold the two together. A choice filters, scores and picks; the instance may still refuse.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from instance.lifecycle import State
from instance.messages import CachedBlocks, LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.columns import Columns, Dispatch, DispatchParams, Entry, Rule, Scores
from orchestrator.policy.prefixes import PrefixIndex
from orchestrator.policy.slo import Pace, Predicted, Wanted

__all__ = [
    "Choice",
    "ClusterView",
    "DispatchBook",
    "DispatchParams",
    "InstanceView",
    "NoChoice",
    "Rule",
    "demand_blocks",
]

MAX_SEEN_KEPT = 4096
"""Dispatches that have been seen are dropped from the list by age once there are so many."""


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the dispatcher sees it now."""

    instance: InstanceId
    epoch: Epoch
    report: LoadReport
    report_age_s: float
    known_for_s: float
    """Age of its first report."""
    num_dispatched: int
    """Own dispatches no report has seen yet."""
    dispatched_blocks: int
    """Their demand."""
    dispatched_levels: frozenset[int] = frozenset()
    """Ranks of their levels of priority, as far as these have headroom."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    instances: tuple[InstanceView, ...] = ()
    num_gateways: int = 1
    """That dispatch to them."""


class Choice(msgspec.Struct, frozen=True):
    instance: InstanceId
    epoch: Epoch
    reason: str
    signal_age_s: float
    """Age of the report the choice rests on."""
    predicted: Predicted | None = None
    """Of a request with targets."""


@dataclass(frozen=True, slots=True)
class NoChoice:
    """Nobody can take it now, and why."""

    reason: str
    any_serving: bool
    """True: instances serve, but each was excluded or is stale. False: nobody is there."""


def demand_blocks(num_prompt_tokens: int, block_size: int) -> int:
    """Blocks the request needs to give its first token."""
    return -(-(num_prompt_tokens + 1) // max(1, block_size))


class DispatchBook:
    """What each member last reported, and what was dispatched to it since. Members come and go by `set_members`."""

    def __init__(
        self,
        params: DispatchParams | None = None,
        max_unseen: int = 4096,
        unseen_for_s: float = 10.0,
        gateway: str = "",
    ) -> None:
        """`max_unseen`: dispatches of one instance remembered without a report. `unseen_for_s`: and for how long.
        `gateway`: whose book it is; each of several breaks ties its own way, so that not all choose the same one."""
        self._params = params or DispatchParams()
        self._gateway = gateway
        self._num_gateways = 1
        self._entries: dict[InstanceId, Entry] = {}
        """In order of rows."""
        self._names: list[InstanceId] = []
        self._columns = Columns([], self._params, 1)
        self._max_unseen = max_unseen
        self._unseen_for_s = unseen_for_s
        self._sent: deque[tuple[float, InstanceId, Epoch, int]] = deque()
        """(when, to whom, sequence), oldest first: what may have to be forgotten. Some have been seen since."""
        self._num_unseen = 0
        self.pace = Pace()
        self.prefixes = PrefixIndex()
        self._last_row = -1
        """Chosen last, for taking turns."""

    @property
    def params(self) -> DispatchParams:
        return self._params

    def set_params(self, params: DispatchParams) -> None:
        """Choose by these from now on."""
        if params != self._params:
            self._params = params
            self._columns = Columns(list(self._entries.values()), params, self._num_gateways)
            if not params.heeds_prefixes:
                self.prefixes.clear()

    # ---- members and what they say
    def set_members(self, members: Collection[tuple[InstanceId, Epoch]], num_gateways: int | None = None) -> None:
        """Keep only these; a new epoch starts with an empty page. `num_gateways`: that dispatch to them, this one too;
        None: as many as before."""
        kept = dict(members)
        if num_gateways is not None:
            self._num_gateways = max(1, num_gateways)
        gone = [name for name, entry in self._entries.items() if kept.get(name) != entry.epoch]
        if gone:
            self._sent = deque(sent for sent in self._sent if sent[1] not in gone)
        self._entries = {
            name: known
            if (known := self._entries.get(name)) is not None and known.epoch == kept[name]
            else Entry(kept[name])
            for name in sorted(kept, key=self._rank)
        }
        self._names = list(self._entries)
        for row, entry in enumerate(self._entries.values()):
            entry.row = row
        self._num_unseen = sum(len(entry.unseen) for entry in self._entries.values())
        self._columns = Columns(list(self._entries.values()), self._params, self._num_gateways)
        rows = [(name, entry.epoch) for name, entry in self._entries.items()]
        self.pace.set_members(rows)
        self.prefixes.set_members(rows)
        self._drop_seen()

    def _rank(self, name: InstanceId) -> tuple[int, InstanceId]:
        """The order of the rows, and so of ties: by name, and where there are several gateways in one of its own."""
        return (zlib.crc32(f"{self._gateway}/{name}".encode()) if self._num_gateways > 1 else 0, name)

    def on_report(self, report: LoadReport, now_s: float) -> bool:
        """Take a report in. False: it is from no member, or older than the last one."""
        entry = self._entries.get(InstanceId(report.instance))
        if entry is None or entry.epoch != report.epoch:
            return False
        if entry.report is not None and report.step < entry.report.step:
            return False
        if entry.report is None:
            entry.first_report_s = now_s
        entry.report, entry.reported_s = report, now_s
        while entry.unseen and entry.unseen[0].sequence <= report.submits_seen:
            self._forget_oldest(entry)
        self._columns.write_report(entry)
        self.pace.on_report(report)
        self._drop_seen()
        return True

    def on_cached(self, message: CachedBlocks) -> None:
        """A member says what its prefix cache holds."""
        if self._params.heeds_prefixes:
            self.prefixes.on_cached(message)

    def cached_from(self, instance: InstanceId) -> int | None:
        """What a member is to be told with the next subscription (`Subscribe.cached_from`)."""
        return self.prefixes.cached_from(instance) if self._params.heeds_prefixes else None

    def on_dispatched(self, instance: InstanceId, demand_blocks: int, now_s: float, priority: int = 0) -> int:
        """Count a dispatch to a member and return its sequence number, from 1."""
        entry = self._entries[instance]
        entry.last_sequence += 1
        level = self._params.load.bearing(priority)
        entry.unseen.append(Dispatch(entry.last_sequence, demand_blocks, level))
        entry.unseen_blocks += demand_blocks
        self._num_unseen += 1
        if len(entry.unseen) > self._max_unseen:
            self._forget_oldest(entry)
        self._sent.append((now_s, instance, entry.epoch, entry.last_sequence))
        self._drop_seen()
        self._columns.write_load(entry)
        return entry.last_sequence

    def on_not_taken(self, instance: InstanceId, epoch: Epoch, sequence: int) -> None:
        """A dispatch was refused: it is no load any more."""
        entry = self._entries.get(instance)
        if entry is None or entry.epoch != epoch:
            return
        kept = deque(sent for sent in entry.unseen if sent.sequence != sequence)
        self._num_unseen -= len(entry.unseen) - len(kept)
        entry.unseen, entry.unseen_blocks = kept, sum(sent.demand_blocks for sent in kept)
        self._columns.write_load(entry)
        self._drop_seen()

    # ---- what is known
    def submits_seen(self, now_s: float) -> dict[tuple[InstanceId, Epoch], int]:
        """Up to which of our submissions each member has received them, by its report, if that is fresh."""
        fresh = (one for one in self.view(now_s).instances if one.report_age_s <= self._params.max_report_age_s)
        return {(one.instance, one.epoch): one.report.submits_seen for one in fresh}

    def has_said_farewell(self, instance: InstanceId, epoch: Epoch) -> bool:
        """Its last word was that it drains and that nothing is left on it: nothing can have come there since."""
        entry = self._entries.get(instance)
        if entry is None or entry.epoch != epoch or entry.report is None:
            return False
        last = entry.report
        num_there = last.num_running + last.num_waiting + last.migrations_in + last.migrations_out
        return last.state == State.DRAINING.value and num_there == 0

    @property
    def block_size(self) -> int:
        """Tokens of a block, as instances report it; 16 before any does."""
        reports = (entry.report for entry in self._entries.values())
        return next((report.block_size for report in reports if report is not None), 16)

    @property
    def hashed_block_size(self) -> int | None:
        """Tokens of a block by whose hash members say what they have cached; None: nobody has anything."""
        return self.prefixes.block_size if self.prefixes.num_hashes else None

    def choose(
        self,
        demand_blocks: int,
        now_s: float,
        excluded: Collection[InstanceId] = (),
        wanted: Wanted | None = None,
        prefix: Sequence[int] = (),
        priority: int = 0,
    ) -> Choice | NoChoice:
        """Pick the instance whose score with this request is highest (`Columns.scores`); ties by fewest dispatched,
        then by fewest cached blocks (else an idle fleet would fill one cache), then by this gateway's own order.
        `prefix`: hashes of the prompt's blocks, from the first one on; what an instance has of them counts for it.

        If it wants something, those that are predicted to meet its targets come first, if any is. An instance it can
        never fit on is only asked when there is no other: its refusal then says so to the client.
        """
        self._forget_late(now_s)
        columns = self._columns
        columns.expire(now_s)
        left_out = [self._entries[name].row for name in excluded if name in self._entries] if excluded else []
        num_candidates = columns.num_usable - sum(map(columns.is_usable, left_out))
        if not num_candidates:
            return self._nobody(now_s)
        saved = self.prefixes.saved_blocks(prefix) if prefix else None
        level = self._params.load.bearing(priority)
        is_plain = saved is None and wanted is None and level is None and not left_out
        if is_plain and self._params.rule is Rule.FREENESS:
            highest = columns.highest(demand_blocks, now_s)
            if highest is not None:
                row = self._least_used(np.array(highest.rows)) if len(highest.rows) > 1 else highest.rows[0]
                return self._choice(row, f"score {highest.score:.2f} highest of {num_candidates}", now_s)
        scores = columns.scores(demand_blocks, now_s, left_out, saved, best_only=wanted is None, level=level)
        attainment = None
        if wanted is not None:
            saved_tokens = 0.0 if saved is None else saved * self.prefixes.block_size
            attainment = self.pace.attainment(wanted, columns.unseen, columns.unseen_blocks, saved_tokens)
            scores = np.where(attainment.narrow(scores > -math.inf), scores, -math.inf)
        is_next = self._params.rule is Rule.ROUND_ROBIN
        row = self._next(scores) if is_next else self._best(scores)
        why = f"next of {num_candidates}" if is_next else f"score {scores[row]:.2f} highest of {num_candidates}"
        num_saved = 0.0 if saved is None else saved[row]
        return self._choice(row, why, now_s, num_saved, None if attainment is None else attainment.on(row))

    def _choice(
        self, row: int, why: str, now_s: float, num_saved: float = 0.0, predicted: Predicted | None = None
    ) -> Choice:
        name = self._names[row]
        entry = self._entries[name]
        of_prefix = f", {num_saved:.0f} blocks saved" if num_saved else ""
        reason = f"{why} ({len(entry.unseen)} dispatched since its report{of_prefix})"
        return Choice(name, entry.epoch, reason, max(0.0, now_s - entry.reported_s), predicted)

    def _best(self, scores: Scores) -> int:
        row = int(scores.argmax())
        best = (scores == scores[row]).nonzero()[0]
        return row if len(best) == 1 else self._least_used(best)

    def _least_used(self, rows: npt.NDArray[np.intp]) -> int:
        """Of equally good ones, in ascending order."""
        unseen = self._columns.unseen[rows]
        rows = rows[unseen == unseen.min()]
        return int(rows[self.prefixes.num_held[rows].argmin()])

    def _next(self, scores: Scores) -> int:
        possible = (scores > -math.inf).nonzero()[0]
        later = possible[possible > self._last_row]
        self._last_row = int(later[0] if len(later) else possible[0])
        return self._last_row

    def why_nobody(self, now_s: float) -> str | None:
        """None: somebody serves and has said so lately. Only looks: no turn is taken."""
        self._forget_late(now_s)
        self._columns.expire(now_s)
        return None if self._columns.num_usable else self._nobody(now_s).reason

    def _nobody(self, now_s: float) -> NoChoice:
        view = self.view(now_s)
        num_serving = sum(seen.report.state == State.SERVING.value for seen in view.instances)
        num_fresh = self._columns.num_usable
        return NoChoice(_why_nobody(view, num_serving, num_fresh), any_serving=bool(num_fresh))

    def view(self, now_s: float) -> ClusterView:
        """What is known now, in order of instance id; members without a report are left out."""
        self._forget_late(now_s)
        return ClusterView(
            tuple(
                InstanceView(
                    name,
                    entry.epoch,
                    entry.report,
                    max(0.0, now_s - entry.reported_s),
                    max(0.0, now_s - entry.first_report_s),
                    len(entry.unseen),
                    entry.unseen_blocks,
                    frozenset(sent.level for sent in entry.unseen if sent.level is not None),
                )
                for name, entry in sorted(self._entries.items())
                if entry.report is not None
            ),
            self._num_gateways,
        )

    # ---- what is forgotten
    def _forget_late(self, now_s: float) -> None:
        """Of an instance that reports no count: forget rather than shun it for ever."""
        if not self._sent or now_s - self._sent[0][0] <= self._unseen_for_s:
            return
        while self._sent and now_s - self._sent[0][0] > self._unseen_for_s:
            _, instance, epoch, sequence = self._sent.popleft()
            entry = self._entries.get(instance)
            if entry is None or entry.epoch != epoch:
                continue
            while entry.unseen and entry.unseen[0].sequence <= sequence:
                self._forget_oldest(entry)
            self._columns.write_load(entry)
        self._drop_seen()

    def _forget_oldest(self, entry: Entry) -> None:
        entry.unseen_blocks -= entry.unseen.popleft().demand_blocks
        self._num_unseen -= 1

    def _drop_seen(self) -> None:
        """Keep the list of what was sent in proportion to what is unseen of it."""
        if len(self._sent) <= 2 * self._num_unseen + MAX_SEEN_KEPT:
            return
        unseen = {(name, entry.epoch, sent.sequence) for name, entry in self._entries.items() for sent in entry.unseen}
        self._sent = deque(sent for sent in self._sent if sent[1:] in unseen)

    def check_integrity(self) -> None:
        """Raise AssertionError unless sequences rise, bounds hold and the sums are those of what they stand for."""
        for row, (name, entry) in enumerate(self._entries.items()):
            sequences = [sent.sequence for sent in entry.unseen]
            assert sequences == sorted(set(sequences)), "sequences must rise"
            assert len(sequences) <= self._max_unseen, "unseen dispatches are bounded"
            assert not sequences or sequences[-1] <= entry.last_sequence
            assert entry.unseen_blocks == sum(sent.demand_blocks for sent in entry.unseen)
            assert (entry.row, self._names[row]) == (row, name)
        assert list(self._entries) == sorted(self._entries, key=self._rank)
        assert self._num_unseen == sum(len(entry.unseen) for entry in self._entries.values())
        assert len(self._sent) <= 2 * self._num_unseen + MAX_SEEN_KEPT
        self._columns.check_integrity(list(self._entries.values()))
        rows = [(name, entry.epoch) for name, entry in self._entries.items()]
        self.pace.check_integrity(rows)
        self.prefixes.check_integrity(rows)


def _why_nobody(view: ClusterView, num_serving: int, num_fresh: int) -> str:
    if not view.instances:
        return "no instance is ready yet"
    if not num_serving:
        states = ", ".join(f"{seen.instance} is {seen.report.state}" for seen in view.instances[:8])
        return f"no instance serves ({states})"
    if not num_fresh:
        return "no instance has reported lately"
    return f"each of the {num_fresh} serving instances has refused it"
