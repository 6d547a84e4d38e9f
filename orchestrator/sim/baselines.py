"""What would others decide? Dispatch and rebalancing to compare with, over the same reports; pure but for their dice.

*Llumnix as its paper states it* (Sun et al., OSDI'24; `policy/load.py` has its virtual usage and freeness), not as its
artifact does: only the head of the queue counts, headroom is split. All of them count what they have sent since the
last report, as ours does: a report is a tenth of a second old here, where theirs came with every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

from migration.types import InstanceId
from orchestrator.policy.columns import DispatchParams, Entry
from orchestrator.policy.dispatch import Choice, DispatchBook, NoChoice
from orchestrator.policy.load import LoadParams, virtual_usage_blocks
from orchestrator.policy.moves import InstanceView, Move, move_of
from orchestrator.policy.rebalance import Plan, RebalanceParams, Resting
from orchestrator.policy.slo import Wanted

Score = Callable[[Entry, LoadParams], float]
"""The higher, the better is this member for the next request. It has reported, and serves."""


def fewest_requests(entry: Entry, params: LoadParams) -> float:  # noqa: ARG001 - the shape of `Score`
    report = entry.report
    assert report is not None
    return -float(report.num_running + report.num_waiting + len(entry.unseen))


def infaas(entry: Entry, params: LoadParams) -> float:  # noqa: ARG001
    """INFaaS++ of Llumnix's paper: the memory that is used, and all that the queue demands."""
    report = entry.report
    assert report is not None
    return -float(report.total_blocks - report.free_blocks + report.waiting_blocks + entry.unseen_blocks)


def llumnix_freeness(entry: Entry, params: LoadParams) -> float:
    """(blocks - virtual usage) / batch, negative too."""
    report = entry.report
    assert report is not None
    free = report.total_blocks - virtual_usage_blocks(report, params) - entry.unseen_blocks
    return free / max(1, report.num_running + len(entry.unseen))


def least_free(entry: Entry, params: LoadParams) -> float:
    """Of those with room for more the fullest first, and of the others the one that is the most short."""
    return -llumnix_freeness(entry, params)


class BaselineBook(DispatchBook):
    """Production's book, but for the choice: the best score, ties by name; `of_two`: of two members at random."""

    def __init__(self, params: DispatchParams, score: Score, of_two: Random | None = None) -> None:
        super().__init__(params)
        self._score = score
        self._of_two = of_two

    def choose(
        self,
        demand_blocks: int,  # noqa: ARG002
        now_s: float,
        excluded: Collection[InstanceId] = (),
        wanted: Wanted | None = None,  # noqa: ARG002
        prefix: Sequence[int] = (),  # noqa: ARG002
        priority: int = 0,  # noqa: ARG002
    ) -> Choice | NoChoice:
        if (nobody := self.why_nobody(now_s)) is not None:
            return NoChoice(nobody, any_serving=False)
        able = [
            (name, entry)
            for name, entry in self._entries.items()
            if name not in excluded and self._columns.is_usable(entry.row)
        ]
        if not able:
            return NoChoice("each has refused it", any_serving=True)
        if self._of_two is not None and len(able) > 2:
            able = self._of_two.sample(able, 2)
        name, entry = max(able, key=lambda one: self._score(one[1], self.params.load))
        return Choice(name, entry.epoch, "the best of a baseline", max(0.0, now_s - entry.reported_s))


@dataclass(slots=True)
class _Side:
    view: InstanceView
    freeness: float


def llumnix_plan(threshold: float) -> Plan:
    """Its pairing: sources below the threshold with destinations above it (blocks a request), the lowest with the
    highest, each once; the source gives its least urgent, then shortest request. Nothing rests."""

    def plan(views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:  # noqa: ARG001
        sides = sorted((_Side(view, _freeness(view, params)) for view in views), key=lambda one: one.freeness)
        sources = [one for one in sides if one.freeness < threshold and one.view.slots_out > 0]
        destinations = [
            one
            for one in reversed(sides)
            if one.freeness > threshold and one.view.slots_in > 0 and not one.view.draining
        ]
        moves = []
        for source, destination in zip(sources, destinations, strict=False):
            able = [one for one in source.view.requests if one.movable and one.status == "running"]
            if able:
                chosen = min(able, key=lambda one: (-one.priority, one.num_prompt_tokens + one.num_output_tokens))
                reason = f"llumnix: freeness {source.freeness:.1f} here, {destination.freeness:.1f} there"
                moves.append(move_of(chosen, source.view, destination.view, reason))
        return tuple(moves)

    return plan


def _freeness(view: InstanceView, params: RebalanceParams) -> float:
    if view.draining:
        return -math.inf
    load = view.load
    return (load.total_blocks - virtual_usage_blocks(load, params.load)) / max(1, load.num_running)
