"""Which cluster does the demo run on? Two instances and a gateway, composed as `kvferry serve` does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import msgspec
from rich.console import Console

from instance.spec import Carrier
from orchestrator.config import ServeConfig
from orchestrator.demo.fleet import AdminFleet
from orchestrator.demo.options import DemoOptions
from orchestrator.errors import StartUpError
from orchestrator.policy.dispatch import Rule
from orchestrator.runtime import checks
from orchestrator.runtime.compose import Composition, Phase, Progress, compose, dismantle
from orchestrator.runtime.ray_cluster import RayCluster, Resources
from orchestrator.runtime.spec import successor

MODEL_NAME = "kvferry-demo"
NUM_INSTANCES = 2
MAX_MODEL_LEN = 4096
NUM_BLOCKS = 320
"""Of 32 tokens: small, so that load matters, and yet one instance can hold what both have when the other is drained."""
TICK_S = 0.25
MAX_MIGRATIONS = 3
REST_S = 3.0
"""Answers last seconds here, so a moved request may be moved again sooner than by default."""
ORCHESTRATOR_START_S = 60.0
ORCHESTRATOR_STOP_S = 3.0
POLL_S = 0.1


def demo_config(model: str, options: DemoOptions) -> ServeConfig:
    """What `kvferry serve` would be given. `options`: checked."""
    return ServeConfig(
        model=model,
        engine_argv=(
            *("--served-model-name", MODEL_NAME),
            *("--dtype", "float32"),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--block-size", "32"),
            *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
            *("--kv-cache-memory-bytes", "1G"),
            *("--max-num-seqs", "48"),
        ),
        instances=NUM_INSTANCES,
        gateways=1,
        port=0,
        admin_port=0,
        tick_s=TICK_S,
        max_migrations=MAX_MIGRATIONS,
        rest_s=REST_S,
        log_level="WARNING",
        carrier=Carrier(options.carrier),
        carrier_checksum=options.carrier_checksum,
    )


@dataclass(slots=True)
class Cluster:
    """A running cluster; `fleet` changes when the orchestrator is replaced."""

    ray: RayCluster
    composition: Composition
    fleet: AdminFleet

    @property
    def base_url(self) -> str:
        return self.composition.urls[0]

    @property
    def model(self) -> str:
        return MODEL_NAME

    async def stop_rebalancing(self) -> None:
        """Move nothing by itself any more."""
        await self.replace_orchestrator(rebalance=False)

    async def replace_orchestrator(self, *, rebalance: bool, dispatch: Rule | None = None) -> None:
        """Another one takes over and steers like this; `dispatch` None, and all else, as the first one was told at its
        start. Instances and gateways serve on meanwhile."""
        self.fleet.close()
        await self.ray.stop_actor(self.composition.orchestrator, ORCHESTRATOR_STOP_S)
        actor_name = await _make_orchestrator(self.ray)
        spec = successor(self.composition.spec, rebalance=rebalance, dispatch=dispatch)
        started = await self.ray.start_orchestrator(actor_name, spec, ORCHESTRATOR_START_S)
        kept = msgspec.structs.replace(self.composition.spec, scaling=spec.scaling)  # its epochs are spent
        self.composition = replace(self.composition, admin_address=started.admin_address, spec=kept)
        self.fleet = AdminFleet(started.admin_address)


async def _make_orchestrator(ray: RayCluster) -> str:
    """The name is free again a moment after the old actor has ended."""
    deadline_s = time.monotonic() + ORCHESTRATOR_STOP_S
    while True:
        try:
            return ray.make_orchestrator()
        except StartUpError:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(POLL_S)


def start_ray(config: ServeConfig, console: Console) -> RayCluster:
    """Check the flags and start a Ray of our own, from the main thread. Raises StartUpError with one line."""
    with console.status("checking the flags with vLLM's own parser"):
        checks.parse_engine_argv((config.model, *config.engine_argv))
    with console.status("starting Ray"):
        return RayCluster.start_local(NUM_INSTANCES)


@asynccontextmanager
async def running_cluster(ray: RayCluster, config: ServeConfig, console: Console) -> AsyncIterator[Cluster]:
    """Start everything on that Ray; stop it again at the end. Raises StartUpError with one line."""
    began_s = time.monotonic()

    def tell(progress: Progress) -> None:
        if progress.phase is not Phase.CREATED:
            took_s = time.monotonic() - began_s
            text = f"{took_s:4.0f} s  {progress.name} {progress.phase.value} {progress.detail}".rstrip()
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    starting = asyncio.create_task(compose(ray, config, Resources(num_gpus=0), tell))
    cluster: Cluster | None = None
    try:
        composition = await starting
        cluster = Cluster(ray, composition, AdminFleet(composition.admin_address))
        yield cluster
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError, StartUpError):
            await starting
        if cluster is not None:
            cluster.fleet.close()
            await dismantle(ray, cluster.composition)
