"""Are instances drained in turn, under load, and put back whatever happens? On a jumping clock."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from orchestrator.demo.answers import Move
from orchestrator.demo.drains import DrainPlan, conduct
from orchestrator.demo.watch import History, InstanceView, Observation, watch
from orchestrator.sim.jumping_loop import run_jumping

PLAN = DrainPlan(at=(0.3, 0.6), extra_at=(0.8,), wanted_moves=5, patience=0.12, give_up_s=30.0)


def committed(number: int) -> Move:
    return Move(
        migration_id=str(number),
        request_id="demo-a.1",
        source="a",
        destination="b",
        outcome="committed",
        reason="",
        moved_tokens=5,
        num_blocks=1,
        num_bytes=1,
        stopped_s=0.001,
        ended_s=0.0,
    )


@dataclass
class ModelFleet:
    """Two instances; a drain takes `drain_takes_s`."""

    drain_takes_s: float = 2.0
    num_running: int = 10
    num_moves: int = 0
    draining: set[str] = field(default_factory=set)
    calls: list[tuple[float, str, str]] = field(default_factory=list)

    def _note(self, what: str, instance: str) -> None:
        self.calls.append((asyncio.get_running_loop().time(), what, instance))

    async def observe(self) -> Observation:
        views = tuple(
            InstanceView(name, "draining" if name in self.draining else "serving", 100, 40, self.num_running, 0)
            for name in ("a", "b")
        )
        return Observation(views, tuple(committed(number) for number in range(self.num_moves)))

    async def drain(self, instance: str, within_s: float) -> None:
        self._note("drain", instance)
        self.draining.add(instance)
        await asyncio.sleep(self.drain_takes_s)

    async def undrain(self, instance: str) -> None:
        self._note("undrain", instance)
        self.draining.discard(instance)


def played(fleet: ModelFleet, duration_s: float = 100.0, plan: DrainPlan = PLAN) -> History:
    async def main() -> History:
        history = History("demo-a", asyncio.get_running_loop().time())
        watcher = asyncio.create_task(watch(fleet, history))
        await conduct(fleet, history, duration_s, plan)
        watcher.cancel()
        return history

    return run_jumping(main())


def test_each_instance_is_drained_in_its_turn_and_put_back() -> None:
    fleet = ModelFleet(num_moves=9)
    history = played(fleet)
    assert [(what, instance) for _, what, instance in fleet.calls] == [
        ("drain", "a"),
        ("undrain", "a"),
        ("drain", "b"),
        ("undrain", "b"),
    ]
    assert 30.0 <= fleet.calls[0][0] < 31.0 and 60.0 <= fleet.calls[2][0] < 61.0
    assert [drain.drain_s for drain in history.drains] == [2.0, 2.0]
    assert history.drains[0].num_owned == 10


def test_further_drains_follow_only_while_too_few_requests_have_moved() -> None:
    assert len(played(ModelFleet(num_moves=9)).drains) == 2
    assert len(played(ModelFleet(num_moves=1)).drains) == 3


def test_a_drain_waits_for_load_but_not_for_ever() -> None:
    fleet = ModelFleet(num_moves=9, num_running=1)
    played(fleet)
    assert 42.0 <= fleet.calls[0][0] < 43.0


def test_an_idle_instance_is_not_drained() -> None:
    assert not played(ModelFleet(num_moves=9, num_running=0)).drains


def test_a_drain_that_does_not_end_is_given_up_recorded_and_undone() -> None:
    fleet = ModelFleet(num_moves=9, drain_takes_s=1e5)
    history = played(fleet, 100.0, replace(PLAN, at=(0.3,), extra_at=()))
    assert [what for _, what, _ in fleet.calls] == ["drain", "undrain"]
    assert history.drains[0].drain_s is None
    assert not fleet.draining
