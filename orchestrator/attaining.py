"""Which moves do targets ask for? What is learned of each instance's steps, and the plan that rests on it. Pure.

The models are those of the gateways (`policy/steptime.py`), learned from the same reports. They are part of the core's
state: a journal holds them as they are, so that a replay decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from instance.messages import LoadReport
from migration.types import Epoch
from orchestrator.policy.attain import plan_attain
from orchestrator.policy.moves import InstanceView, Move
from orchestrator.policy.rebalance import RebalanceParams, Resting
from orchestrator.policy.standing import Speeds
from orchestrator.policy.steptime import StepTimes
from orchestrator.policy.targets import is_any_wanted
from orchestrator.state import InstanceRecord


class Attaining:
    """One core's. Bounded by its instances."""

    def __init__(self) -> None:
        self._times = StepTimes()

    def set_members(self, members: Iterable[InstanceRecord]) -> None:
        """Forget what is known of all others."""
        self._times.set_members([(record.instance, record.epoch) for record in members])

    def on_report(self, report: LoadReport) -> None:
        """Of a living incarnation, no older than the last."""
        self._times.on_report(report)

    def moves(self, views: tuple[InstanceView, ...], resting: Resting, params: RebalanceParams) -> tuple[Move, ...]:
        if not is_any_wanted(view.tightest for view in views):
            return ()
        return plan_attain(views, self._speeds(views), resting, params)

    def _speeds(self, views: tuple[InstanceView, ...]) -> Speeds:
        """Of those that are known. One that has made no step is taken to be like those that are known well."""
        known = self._times.known()
        keys = [(view.instance, Epoch(view.load.epoch)) for view in views]
        if all(key in known for key in keys) or (prior := self._times.prior()) is None:
            return {key[0]: known[key] for key in keys if key in known}
        return {key[0]: known.get(key, prior) for key in keys}

    def check_integrity(self, instances: Iterable[InstanceRecord]) -> None:
        """Raise AssertionError when it knows others than these."""
        self._times.check_integrity({(record.instance, record.epoch) for record in instances})
