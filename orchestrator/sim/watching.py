"""Who looks at a simulated fleet once a second? It touches nothing of it.

Its timer is one among the others, though: which of two that fire at the same instant comes first hangs on how many
there are (`jumping_loop.py`). So it is always there, whether anybody reads what it has seen or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from instance.report import Standing, load_report
from migration.types import Outcome
from orchestrator.policy.load import LoadParams, freeness
from orchestrator.sim.fleet import SimFleet
from orchestrator.sim.fragmentation import fragmented_blocks
from orchestrator.sim.instance import SimInstance
from orchestrator.sim.series import Glimpse, Moment

INTERVAL_S = 1.0


class Watch:
    """Of one world, from `begin` to `end`."""

    def __init__(self, instances: Mapping[str, SimInstance], fleet: SimFleet, levels: LoadParams) -> None:
        self._instances = instances
        self._fleet = fleet
        self._levels = levels
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._began_s = 0.0
        self.moments: list[Moment] = []

    def begin(self) -> None:
        self._began_s = self._loop.time()
        self._look()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        blocks, total = [], 0
        glimpses: dict[str, Glimpse] = {}
        for instance in self._instances.values():
            glimpses[instance.name] = _glimpse(instance, self._levels)
            batch = instance.engine.batch
            first = batch.head_of_line()
            lacking = 0 if first is None else batch.blocks_for(first.tokens) - first.blocks
            blocks.append((batch.free, lacking))
            total += batch.config.num_blocks
        self.moments.append(
            Moment(
                self._loop.time() - self._began_s,
                glimpses,
                self._fleet.outcomes[Outcome.COMMITTED.value],
                fragmented_blocks(blocks) / total if total else 0.0,
            )
        )
        self._timer = self._loop.call_at(self._began_s + len(self.moments) * INTERVAL_S, self._look)


def _glimpse(instance: SimInstance, levels: LoadParams) -> Glimpse:
    load, facts = instance.host.load, instance.engine.facts
    standing = Standing(
        instance=instance.name,
        epoch=instance.epoch,
        step=0,
        state=instance.agent.state,
        block_size=facts.block_size,
        total_blocks=facts.total_blocks,
        step_time_s=0.0,
        migrations_in=0,
        migrations_out=0,
    )
    report = load_report(standing, load, 0)
    return Glimpse(freeness(report, levels), load.free_blocks, load.num_running, load.num_waiting)
