"""Who carries out the starts and stops that the core asks for? Each ends as one event, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.effects import AnnounceScaling, StartInstance, StopInstance
from orchestrator.errors import LimitExceeded, StartUpError
from orchestrator.events import Event, InstanceStarted, InstanceStartFailed
from orchestrator.log import fields, logger
from orchestrator.runtime.ports import Launcher

_log = logger("orchestrator")


class InstanceKeeper:
    """Between the loop and the launcher. `handle`: where events go."""

    def __init__(self, launcher: Launcher, handle: Callable[[Event], None]) -> None:
        self._launcher = launcher
        self._handle = handle

    async def start(self, effect: StartInstance) -> None:
        _log.info(
            "starting %s",
            fields(instance=effect.instance, epoch=effect.epoch, reason=effect.reason, age_s=effect.signal_age_s),
        )
        try:
            event = await self._launcher.start(effect.instance, effect.epoch)
        except StartUpError as error:
            self._failed(effect, str(error))
            return
        try:
            self._handle(event)
        except LimitExceeded as error:
            await self._launcher.stop(effect.instance, effect.epoch)
            self._failed(effect, str(error))

    def _failed(self, effect: StartInstance, error: str) -> None:
        _log.warning("instance did not start %s", fields(instance=effect.instance, epoch=effect.epoch, reason=error))
        self._handle(InstanceStartFailed(effect.instance, effect.epoch, error))

    async def stop(self, effect: StopInstance) -> None:
        _log.info("stopping %s", fields(instance=effect.instance, epoch=effect.epoch, reason=effect.reason))
        await self._launcher.stop(effect.instance, effect.epoch)

    @staticmethod
    def announce(effect: AnnounceScaling) -> None:
        _log.info(
            "scaling %s",
            fields(
                target=effect.target,
                instance=effect.instance or "none",
                reason=effect.reason,
                signal_age_s=effect.signal_age_s,
            ),
        )


class NoLauncher:
    """A launcher that starts nothing: of an orchestrator that was not told how."""

    async def start(self, *_: object) -> InstanceStarted:
        raise StartUpError("this orchestrator was not told how instances are started")

    async def stop(self, *_: object) -> None:
        return
