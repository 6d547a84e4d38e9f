"""When is which instance drained during the demo? Each in turn, under load, until enough requests have moved."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from orchestrator.demo.watch import Drain, Fleet, History, InstanceView

LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """Drains start at these shares of the duration, or up to `patience` later if the load is low then."""

    at: tuple[float, ...] = (0.25, 0.5)
    extra_at: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)
    """Further ones, only while fewer than `wanted_moves` have been committed."""
    wanted_moves: int = 40
    patience: float = 0.17
    """Share of the duration to wait for `min_running`."""
    min_running: int = 7
    """That is load: so many requests run on the instance that is to be drained."""
    hold: float = 0.03
    """Share of the duration that a drained instance stays empty before it takes requests again."""
    give_up_s: float = 30.0


async def conduct(fleet: Fleet, history: History, duration_s: float, plan: DrainPlan) -> None:
    """Drain and undrain as planned; every drain ends in `history.drains`."""
    for number, share in enumerate((*plan.at, *plan.extra_at)):
        await _sleep_until(history.started_s + share * duration_s)
        if number >= len(plan.at) and history.num_committed >= plan.wanted_moves:
            return
        victim = await _wait_for_load(history, plan, plan.patience * duration_s, number)
        if victim is not None:
            await _drain(fleet, history, victim, plan, plan.hold * duration_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _sleep_until(at_s: float) -> None:
    await asyncio.sleep(max(0.0, at_s - _now_s()))


async def _wait_for_load(history: History, plan: DrainPlan, patience_s: float, number: int) -> InstanceView | None:
    """The instance whose turn it is, as soon as it is loaded; when patience ends, if it runs anything at all."""
    until_s = _now_s() + patience_s
    while True:
        serving = [view for view in history.instances if view.state == "serving"]
        if len(serving) > 1:
            victim = sorted(serving, key=lambda view: view.instance)[number % len(serving)]
            if victim.num_running >= plan.min_running or (victim.num_running and _now_s() >= until_s):
                return victim
        if _now_s() >= until_s:
            return None
        await asyncio.sleep(LOOK_S)


async def _drain(fleet: Fleet, history: History, victim: InstanceView, plan: DrainPlan, hold_s: float) -> None:
    called_s = _now_s() - history.started_s
    empty_s: float | None = None
    try:
        async with asyncio.timeout(plan.give_up_s):
            await fleet.drain(victim.instance, plan.give_up_s)
        empty_s = _now_s() - history.started_s
        await asyncio.sleep(hold_s)
    except TimeoutError:
        # The drain failed its bar; the run goes on, so that the rest can be seen.
        pass
    await fleet.undrain(victim.instance)
    history.drains.append(
        Drain(
            instance=victim.instance,
            called_s=called_s,
            empty_s=empty_s,
            undrained_s=_now_s() - history.started_s,
            num_owned=victim.num_running + victim.num_waiting,
        )
    )
