"""Which instances are being started, under which names, and when may the next start be tried? State and rules, pure.

A name is used again once its instance is gone; an epoch never is, also not that of a start that failed.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import Effect, StartInstance, StopInstance
from orchestrator.state import ScalingParams

NAME = "instance-"


@dataclass(frozen=True, slots=True)
class _Start:
    epoch: Epoch
    begun_s: float


class Starts:
    """Starts under way, and the pause after those that failed."""

    def __init__(self, params: ScalingParams) -> None:
        self._params = params
        self._under_way: dict[InstanceId, _Start] = {}
        self._next_epoch = params.first_epoch
        self._abandoned: dict[tuple[InstanceId, Epoch], None] = {}
        self._young: dict[InstanceId, _Start] = {}
        """Started lately; lost now, they count as failed."""
        self.num_failures = 0
        self._retry_at_s = 0.0
        self._served_s: float | None = None

    @property
    def names(self) -> tuple[InstanceId, ...]:
        return tuple(sorted(self._under_way))

    def retry_in_s(self, now_s: float) -> float:
        return max(0.0, self._retry_at_s - now_s)

    def newest_age_s(self, now_s: float) -> float:
        """Since the latest instance began to serve; infinite when none was heard of."""
        return float("inf") if self._served_s is None else now_s - self._served_s

    def begin(self, num: int, taken: Container[InstanceId], reason: str, age_s: float, now_s: float) -> list[Effect]:
        """Start so many, or fewer: as bounds and pauses allow. `taken`: names that are in use."""
        if now_s < self._retry_at_s:
            return []
        effects: list[Effect] = []
        # One try after a failure: many would only fail alike.
        at_once = 1 if self.num_failures else self._params.max_starting
        for _ in range(min(num, at_once - len(self._under_way))):
            instance, epoch = self._free_name(taken), Epoch(self._next_epoch)
            self._next_epoch += 1
            self._under_way[instance] = _Start(epoch, now_s)
            effects.append(StartInstance(instance, epoch, reason, age_s))
        return effects

    def _free_name(self, taken: Container[InstanceId]) -> InstanceId:
        number = 0
        while (name := InstanceId(f"{NAME}{number}")) in taken or name in self._under_way:
            number += 1
        return name

    def is_abandoned(self, incarnation: Incarnation) -> bool:
        """It was given up before: it must not serve."""
        return (incarnation.instance, incarnation.epoch) in self._abandoned

    def on_started(self, incarnation: Incarnation, now_s: float) -> None:
        """An instance serves, whoever has started it."""
        self._next_epoch = max(self._next_epoch, incarnation.epoch + 1)
        self._served_s = now_s
        begun = self._under_way.get(incarnation.instance)
        if begun is not None and begun.epoch == incarnation.epoch:
            del self._under_way[incarnation.instance]
            self._young[incarnation.instance] = _Start(incarnation.epoch, now_s)

    def on_failed(self, instance: InstanceId, epoch: Epoch, now_s: float) -> bool:
        """A start did not succeed. False: it was given up before, or is unknown."""
        begun = self._under_way.get(instance)
        if begun is None or begun.epoch != epoch:
            return False
        del self._under_way[instance]
        self._pause(now_s)
        return True

    def on_lost(self, instance: InstanceId, epoch: Epoch, is_planned: bool, now_s: float) -> None:
        """An instance that served is gone. `is_planned`: it was to be stopped."""
        young = self._young.get(instance)
        if young is not None and young.epoch == epoch:
            del self._young[instance]
            if not is_planned:
                self._pause(now_s)

    def tick(self, now_s: float) -> list[Effect]:
        """Give up the starts nobody answers; an instance that has served for a while ends the row of failures."""
        for instance, young in list(self._young.items()):
            if now_s - young.begun_s >= self._params.stable_after_s:
                del self._young[instance]
                self.forgive()
        effects: list[Effect] = []
        for instance, begun in list(self._under_way.items()):
            if now_s - begun.begun_s >= self._params.start_timeout_s:
                self.on_failed(instance, begun.epoch, now_s)
                effects.append(self._abandon(instance, begun.epoch, "its start was never answered"))
        return effects

    def abandon_one(self, reason: str) -> list[Effect]:
        """It is wanted no more: end the start that was begun last."""
        if not self._under_way:
            return []
        instance = max(self._under_way, key=lambda name: self._under_way[name].epoch)
        return [self._abandon(instance, self._under_way.pop(instance).epoch, reason)]

    def _abandon(self, instance: InstanceId, epoch: Epoch, reason: str) -> StopInstance:
        self._abandoned[instance, epoch] = None
        while len(self._abandoned) > self._params.max_abandoned:
            del self._abandoned[next(iter(self._abandoned))]
        return StopInstance(instance, epoch, reason, 0.0)

    def forgive(self) -> None:
        """Try again at once."""
        self.num_failures, self._retry_at_s = 0, 0.0

    def _pause(self, now_s: float) -> None:
        self.num_failures += 1
        doublings = min(self.num_failures - 1, 30)  # a float's range is not the bound
        pause_s = min(self._params.backoff_s * 2**doublings, self._params.max_backoff_s)
        if self.num_failures >= self._params.max_start_failures:
            pause_s = self._params.give_up_rest_s
        self._retry_at_s = now_s + pause_s

    def check_integrity(self) -> None:
        """Raise AssertionError when a bound is passed or an epoch could come twice."""
        assert len(self._under_way) <= self._params.max_starting
        assert len(self._abandoned) <= self._params.max_abandoned
        assert all(begun.epoch < self._next_epoch for begun in self._under_way.values())
        assert all((name, begun.epoch) not in self._abandoned for name, begun in self._under_way.items())
