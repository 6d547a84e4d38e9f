"""Which instances are being emptied to be stopped, and how far is each? State and rules, pure.

An instance is drained, and stopped when it has been empty for a moment. What cannot be moved runs to its end there;
where that takes too long the instance is put back into service: nothing that runs is killed to save an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from instance.lifecycle import State
from migration.types import Epoch, InstanceId
from orchestrator.effects import Effect, StopInstance
from orchestrator.resting import RestingPlace
from orchestrator.state import InstanceRecord, ScalingParams


@dataclass(frozen=True, slots=True)
class Drains:
    """What the core lends for one call: its records, and its own way of draining, which tells gateways and answers who
    waits. Never kept: the journal writes the core's state by its shape, and a method is no value."""

    records: Mapping[InstanceId, InstanceRecord]
    begin: Callable[[InstanceRecord, str], list[Effect]]
    end: Callable[[InstanceRecord, str], list[Effect]]


@dataclass(slots=True)
class _Retirement:
    epoch: Epoch
    begun_s: float
    reason: str
    signal_age_s: float
    empty_since_s: float | None = None
    told_s: float | None = None
    """When it was last told to stop."""


class Retirements:
    """Instances on their way out."""

    def __init__(self, params: ScalingParams, max_instances: int) -> None:
        self._params = params
        self._under_way: dict[InstanceId, _Retirement] = {}
        self._rests: RestingPlace[InstanceId] = RestingPlace(max_instances)

    @property
    def names(self) -> tuple[InstanceId, ...]:
        return tuple(sorted(self._under_way))

    @property
    def resting(self) -> frozenset[InstanceId]:
        """Not to be chosen for a while."""
        return self._rests.names()

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._under_way

    def is_stopping(self, instance: InstanceId) -> bool:
        """It has been told to stop: nothing brings it back."""
        known = self._under_way.get(instance)
        return known is not None and known.told_s is not None

    def begin(
        self, drains: Drains, instance: InstanceId, reason: str, signal_age_s: float, now_s: float
    ) -> list[Effect]:
        record = drains.records[instance]
        self._under_way[instance] = _Retirement(record.epoch, now_s, reason, signal_age_s)
        return drains.begin(record, reason)

    def leave_alone(self, instance: InstanceId, now_s: float) -> None:
        """It is on its way out no more, and not chosen again for a while."""
        self._under_way.pop(instance, None)
        self._rests.rest(instance, now_s + self._params.victim_rest_s)

    def call_off_one(self, drains: Drains, reason: str, now_s: float) -> list[Effect]:
        """Put the one begun last back into service, unless it has been told to stop. Nothing: there is none."""
        able = [name for name, known in self._under_way.items() if known.told_s is None and name in drains.records]
        if not able:
            return []
        instance = max(able, key=lambda name: (self._under_way[name].begun_s, name))
        return self._put_back(drains, drains.records[instance], reason, now_s)

    def _put_back(self, drains: Drains, record: InstanceRecord, reason: str, now_s: float) -> list[Effect]:
        self.leave_alone(record.instance, now_s)
        return drains.end(record, reason) if record.state is State.DRAINING else []

    def on_lost(self, instance: InstanceId, epoch: Epoch) -> bool:
        """True: it was on its way out; whether it stopped or died does not matter any more."""
        known = self._under_way.get(instance)
        if known is None or known.epoch != epoch:
            return False
        del self._under_way[instance]
        return True

    def tick(self, drains: Drains, now_s: float) -> list[Effect]:
        """Stop those that are empty, tell those again that do not stop, call off what takes too long."""
        self._rests.forget_rested(now_s)
        effects: list[Effect] = []
        for instance, known in list(self._under_way.items()):
            record = drains.records.get(instance)
            if record is None or record.epoch != known.epoch:
                del self._under_way[instance]
            elif known.told_s is not None:
                if now_s - known.told_s >= self._params.stop_retry_s:
                    effects.append(self._stop(instance, known, now_s))
            elif record.state is not State.DRAINING:
                self.leave_alone(instance, now_s)  # it did not carry the drain out
            elif record.drained:
                known.empty_since_s = now_s if known.empty_since_s is None else known.empty_since_s
                if now_s - known.empty_since_s >= self._params.linger_s:
                    effects.append(self._stop(instance, known, now_s))
            elif now_s - known.begun_s >= self._params.retire_timeout_s:
                why = f"not empty after {self._params.retire_timeout_s:g} s, {len(record.requests)} requests are left"
                effects += self._put_back(drains, record, why, now_s)
        return effects

    def _stop(self, instance: InstanceId, known: _Retirement, now_s: float) -> StopInstance:
        known.told_s = now_s
        return StopInstance(instance, known.epoch, known.reason, known.signal_age_s)

    def check_integrity(self, records: Mapping[InstanceId, InstanceRecord]) -> None:
        """Raise AssertionError when what is on its way out contradicts the records."""
        assert len(self._under_way) <= self._params.max_retiring
        for instance, known in self._under_way.items():
            record = records.get(instance)
            assert record is not None and record.epoch == known.epoch, f"{instance} retires, and is not there"
            assert known.told_s is None or record.drained, f"{instance} was stopped before it was empty"
