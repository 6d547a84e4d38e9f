"""How many instances should there be, and what is done about it now? The target, set by hand or by the policy; pure.

One target, one loop: what is missing is started, what is too much is emptied and stopped. Instances that an operator
drains count as present and are left alone: a drain is no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from instance.lifecycle import State
from migration.types import Incarnation, InstanceId
from orchestrator.effects import AnnounceScaling, Answer, Effect, Refused, ScalingSet, StopInstance
from orchestrator.errors import RefusalKind
from orchestrator.events import InstanceLost, InstanceStartFailed, ScaleRequested
from orchestrator.policy.autoscale import FleetView, Limits, Trend, choose_victim, plan_autoscale
from orchestrator.policy.load import LoadParams
from orchestrator.policy.moves import InstanceView
from orchestrator.retiring import Drains, Retirements
from orchestrator.starting import Starts
from orchestrator.state import InstanceRecord, ScalingParams, ScalingSnapshot

Records = Mapping[InstanceId, InstanceRecord]
Setting = TypeVar("Setting")
_BY_HAND = "by hand"


class Scaling:
    """The number of instances. The core hands it the events it needs, and its records to look at."""

    def __init__(self, params: ScalingParams, max_instances: int) -> None:
        self._params = params
        self._limits = Limits(params.fewest, min(params.most, params.capacity))
        self._is_automatic = params.is_automatic
        self._target: int | None = None
        self._trend = Trend()
        self._mean_steps: float | None = None
        self._reason = ""
        self._signal_age_s = 0.0
        self._starts = Starts(params)
        self._retirements = Retirements(params, max_instances)

    def set_load(self, load: LoadParams) -> None:
        """Reckon with these headrooms from now on."""
        self._params = replace(self._params, autoscale=replace(self._params.autoscale, load=load))

    # ------------------------------------------------------------------ who comes and goes
    def why_not_taken_in(self, incarnation: Incarnation) -> list[StopInstance]:
        """A start that was given up and has come after all is ended. Nothing: it is welcome."""
        if not self._starts.is_abandoned(incarnation):
            return []
        return [StopInstance(incarnation.instance, incarnation.epoch, "its start had been given up", 0.0)]

    def on_started(self, incarnation: Incarnation, now_s: float) -> None:
        self._starts.on_started(incarnation, now_s)

    def on_start_failed(self, event: InstanceStartFailed, now_s: float) -> list[Effect]:
        if not self._starts.on_failed(event.instance, event.epoch, now_s):
            return []
        again = f"next try in {self._starts.retry_in_s(now_s):.0f} s at the earliest"
        return self._say(event.instance, f"it did not start: {event.error}; {again}", 0.0)

    def on_lost(self, event: InstanceLost, now_s: float) -> None:
        is_planned = self._retirements.on_lost(event.instance, event.epoch)
        self._starts.on_lost(event.instance, event.epoch, is_planned, now_s)

    def is_stopping(self, instance: InstanceId) -> bool:
        return self._retirements.is_stopping(instance)

    def on_undrained(self, instance: InstanceId, now_s: float) -> None:
        """An operator has put it back into service: his word stands, and the target follows it."""
        if instance in self._retirements:
            self._retirements.leave_alone(instance, now_s)
            if self._target is not None:
                self._set_target(self._limits.clamp(self._target + 1), f"{instance} was put back {_BY_HAND}", 0.0)
                self._trend = Trend(changed_s=now_s, is_by_hand=True)

    # ------------------------------------------------------------------ by hand
    def on_requested(self, event: ScaleRequested, records: Records, now_s: float) -> list[Effect]:
        """All that is given, or nothing of it."""
        fewest = _given(event.fewest, self._limits.fewest)
        most = _given(event.most, self._limits.most)
        target = self._target if self._target is not None else self._num_present(records)
        refusal = self._why_not(fewest, most, event.target)
        if refusal is not None:
            return [Answer(event.token, Refused(RefusalKind.PRECONDITION, refusal))]
        self._limits = Limits(fewest, most)
        self._is_automatic = _given(event.is_automatic, self._is_automatic)
        self._mean_steps = self._mean_steps if self._is_automatic else None
        self._starts.forgive()
        self._trend = Trend(changed_s=now_s, is_by_hand=True)
        self._set_target(self._limits.clamp(_given(event.target, target)), _BY_HAND, 0.0)
        told = self._say(None, f"{self._reason}: {'autoscaling' if self._is_automatic else 'no autoscaling'}", 0.0)
        return [*told, Answer(event.token, ScalingSet(self.snapshot(records, now_s)))]

    def _why_not(self, fewest: int, most: int, target: int | None) -> str | None:
        if not self._params.can_start:
            return "this orchestrator was not told how instances are started: it cannot scale"
        if fewest < 1:
            return f"the fewest instances are {fewest}, there must be one at least"
        if most > self._params.capacity:
            return (
                f"there are places for {self._params.capacity} instances, not for {most}:"
                " `kvferry serve --autoscale-max` says how many there shall be"
            )
        if fewest > most:
            return f"the fewest instances are {fewest}, which is more than the most, {most}"
        if target is not None and not fewest <= target <= most:
            return f"{target} instances are outside the limits {fewest} to {most}: change them with --min and --max"
        return None

    # ------------------------------------------------------------------ by itself
    @property
    def is_active(self) -> bool:
        """False: nobody wants any number of instances, so there is nothing to look at."""
        return self._params.can_start and (self._target is not None or self._is_automatic)

    def tick(self, views: tuple[InstanceView, ...], drains: Drains, now_s: float) -> list[Effect]:
        records = drains.records
        effects = [*self._starts.tick(now_s), *self._retirements.tick(drains, now_s)]
        if self._target is None:
            if not records:
                return effects  # nobody has come yet
            self._set_target(self._limits.clamp(self._num_present(records)), "as many as there are", 0.0)
        if self._is_automatic:
            effects += self._decide(views, records, now_s)
        return effects + self._approach(views, drains, now_s)

    def _decide(self, views: tuple[InstanceView, ...], records: Records, now_s: float) -> list[Effect]:
        assert self._target is not None
        num_present = self._num_present(records)
        num_serving = sum(record.state is State.SERVING for record in records.values())
        num_heard = sum(not view.draining for view in views)
        fleet = FleetView(
            instances=views,
            num_unheard=max(0, num_serving - num_heard),
            num_pending=max(0, self._target - num_present),
            num_retiring=len(self._retirements.names),
            newest_age_s=self._starts.newest_age_s(now_s),
        )
        before, params = self._target, self._params.autoscale
        decision, self._trend = plan_autoscale(fleet, before, self._limits, self._trend, params, now_s)
        self._mean_steps = decision.mean_steps
        if decision.target == before:
            return []
        self._set_target(decision.target, decision.reason, decision.signal_age_s)
        return self._say(None, decision.reason, decision.signal_age_s)

    def _approach(self, views: tuple[InstanceView, ...], drains: Drains, now_s: float) -> list[Effect]:
        """Do what brings the number of instances nearer to the target, as far as bounds allow it now."""
        assert self._target is not None
        missing = self._target - self._num_present(drains.records)
        num_starting = len(self._starts.names)
        why = f"{self._target} instances are wanted: {self._reason}"
        if missing > 0 and num_starting == 0:
            # One that is being emptied is there sooner than one that must load.
            called_off = self._retirements.call_off_one(drains, why, now_s)
            if called_off:
                return called_off
        if missing > num_starting:
            return self._starts.begin(missing - num_starting, drains.records, why, self._signal_age_s, now_s)
        if num_starting and missing < num_starting:
            return self._starts.abandon_one(f"wanted no more, {why}")
        if missing < 0:
            return self._retire(views, drains, why, now_s)
        return []

    def _retire(self, views: tuple[InstanceView, ...], drains: Drains, why: str, now_s: float) -> list[Effect]:
        if len(self._retirements.names) >= self._params.max_retiring:
            return []
        serving = [view for view in views if not view.draining]
        candidates = tuple(view for view in serving if view.instance not in self._retirements.resting)
        is_one_left = len(serving) > len(candidates)
        victim = choose_victim(candidates, self._params.autoscale, is_one_left)
        if victim is None:
            return []
        age_s = max(self._signal_age_s, victim.signal_age_s)
        reason = f"scale in, the cheapest to empty; {why}"
        begun = self._retirements.begin(drains, victim.instance, reason, age_s, now_s)
        return [*self._say(victim.instance, reason, age_s), *begun]

    # ------------------------------------------------------------------ small things
    def _num_present(self, records: Records) -> int:
        return sum(instance not in self._retirements for instance in records)

    def _set_target(self, target: int, reason: str, signal_age_s: float) -> None:
        self._target, self._reason, self._signal_age_s = target, reason, signal_age_s

    def _say(self, instance: InstanceId | None, reason: str, signal_age_s: float) -> list[Effect]:
        return [AnnounceScaling(self._target or 0, instance, reason, signal_age_s)]

    def snapshot(self, records: Records, now_s: float) -> ScalingSnapshot:
        return ScalingSnapshot(
            target=self._target,
            fewest=self._limits.fewest,
            most=self._limits.most,
            is_automatic=self._is_automatic,
            num_present=self._num_present(records),
            starting=self._starts.names,
            retiring=self._retirements.names,
            mean_freeness_steps=self._mean_steps,
            reason=self._reason,
            num_start_failures=self._starts.num_failures,
            retry_in_s=self._starts.retry_in_s(now_s),
        )

    def check_integrity(self, records: Records) -> None:
        """Raise AssertionError when a bound is passed, or what is under way contradicts the records."""
        self._starts.check_integrity()
        self._retirements.check_integrity(records)
        assert self._target is None or self._limits.clamp(self._target) == self._target, "a target outside the limits"
        assert not set(self._starts.names) & records.keys(), "a name is used twice"


def _given(given: Setting | None, otherwise: Setting) -> Setting:
    return otherwise if given is None else given
