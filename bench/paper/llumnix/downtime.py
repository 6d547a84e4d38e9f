"""How long does a simulated request stand still while it moves? The paper's three ways, over its network."""

from __future__ import annotations

import asyncio

from instance.spec import MigrationSummary
from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.steptime import LLUMNIX_FLEET
from orchestrator.sim.world import World, WorldParams

ENGINE = LengthConfig(max_model_len=12_000)
MOVES_AFTER_S = 5.0
"""The prompt is computed by then, and the request decodes."""
MODES = ("live", "blocking", "recompute")


def stopped_s(num_tokens: int, mode: str) -> float:
    """From the stop at the source until it may go on at the destination, of one request of so many tokens.

    Raises:
        RuntimeError: it did not move.
    """

    async def play() -> float:
        world = World(WorldParams(num_instances=2, engine=ENGINE, times=LLUMNIX_FLEET))
        arrival = Arrival(0, 0.0, num_tokens, 400, 400)
        summary: list[MigrationSummary] = []

        async def move() -> None:
            await asyncio.sleep(world.params.settle_s + MOVES_AFTER_S)
            owner = next(one for one in world.instances.values() if one.engine.batch.sequences)
            other = next(one for one in world.instances.values() if one is not owner)
            summary.append(await world.fleet.migrate(owner.actor_name, "r0", other.incarnation, mode, 60.0))

        moving = asyncio.create_task(move())
        await world.play([arrival])
        await moving
        if summary[0].outcome != "committed":
            raise RuntimeError(f"{num_tokens} tokens, {mode}: {summary[0].outcome}: {summary[0].reason}")
        again_s = LLUMNIX_FLEET.step_s(((num_tokens, 0),), 0, 0) if mode == "recompute" else 0.0
        return summary[0].stopped_s + again_s

    return run_jumping(play())
