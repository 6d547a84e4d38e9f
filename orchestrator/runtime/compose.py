"""How does a whole kvferry come up and go down? Instances and gateways in parallel, then the orchestrator."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from instance.spec import EngineKind, InstanceSpec, InstanceStarted
from orchestrator import config_scaling
from orchestrator.config import AS_SUITS, Engine, Placement, ServeConfig, server_access
from orchestrator.errors import ActorGone, CallFailed, StartUpError
from orchestrator.gateway.spec import GatewayConfig
from orchestrator.runtime import checks
from orchestrator.runtime.launch import STOP_INSTANCE_S, find_place, load
from orchestrator.runtime.ray_cluster import RayCluster, Resources
from orchestrator.runtime.spec import GatewaySeat, InstanceSeat, OrchestratorSpec, ScalingSpec

FIRST_EPOCH = 1
LOCAL = "127.0.0.1"
ORCHESTRATOR_START_S = 60.0
HEALTHY_S = 30.0
STOP_ORCHESTRATOR_S = 3.0
STOP_GATEWAY_S = 4.0


class Phase(Enum):
    """How far a process is."""

    CREATED = "starting a process"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Progress:
    name: str
    phase: Phase
    detail: str = ""


OnProgress = Callable[[Progress], None]
Started = TypeVar("Started", InstanceSeat, GatewaySeat)


@dataclass(frozen=True, slots=True)
class Composition:
    """What runs."""

    instances: tuple[InstanceSeat, ...]
    gateways: tuple[GatewaySeat, ...]
    orchestrator: str
    """Actor name."""
    admin_address: str
    token: str = field(repr=False)
    """The fleet's shared secret, for whoever starts a further member."""
    spec: OrchestratorSpec = field(repr=False)
    """What the orchestrator was started with."""

    @property
    def urls(self) -> tuple[str, ...]:
        """The OpenAI endpoints, each once."""
        return tuple(dict.fromkeys(gateway.url for gateway in self.gateways))


def instance_specs(config: ServeConfig, token: str) -> list[InstanceSpec]:
    kind = EngineKind.FAKE if config.engine is Engine.FAKE else EngineKind.VLLM
    return [
        InstanceSpec(
            instance=f"instance-{index}",
            epoch=FIRST_EPOCH,
            engine=kind,
            engine_argv=(config.model, *config.engine_argv),
            carrier=config.carrier,
            carrier_checksum=config.carrier_checksum,
            copy_bytes_per_s=None if config.copy_mb_per_s == AS_SUITS else config.copy_mb_per_s * 1e6,
            token=token,
            num_sharing=config.most_instances,
            max_migrations_in=config.max_migrations,
            max_migrations_out=config.max_migrations,
        )
        for index in range(config.instances)
    ]


def scaling_spec(config: ServeConfig, template: InstanceSpec, resources: Resources) -> ScalingSpec:
    return ScalingSpec(
        template=template,
        num_gpus=resources.num_gpus,
        custom_resources=resources.custom,
        labels=resources.labels,
        is_spread=resources.is_spread,
        start_timeout_s=config.start_timeout_s,
        fewest=config.autoscale_min,
        most=config.most_instances,
        first_epoch=FIRST_EPOCH + 1,
        is_automatic=config.autoscale,
        low_steps=config.autoscale_low_steps,
        high_steps=config.autoscale_high_steps,
        period_s=config.autoscale_period_s,
        cooldown_s=config.autoscale_cooldown_s,
        retire_timeout_s=config.retire_timeout_s,
    )


def instance_resources(config: ServeConfig, num_gpus: float) -> Resources:
    """What each instance holds, and where it may be."""
    is_spread = config.placement is Placement.SPREAD
    return Resources(num_gpus, config_scaling.resources(config), config_scaling.labels(config), is_spread)


def gateway_configs(config: ServeConfig, token: str) -> list[GatewayConfig]:
    return [
        GatewayConfig(
            argv=(config.model, *config.engine_argv),
            host=config.host,
            port=config.port,
            gateway=f"gateway-{index}",
            reuse_port=config.gateways > 1,
            priority_levels=config.priority_levels,
            key_priorities=config.key_priorities,
            slo_classes=config.slo_classes,
            token=token,
        )
        for index in range(config.gateways)
    ]


async def compose(
    cluster: RayCluster, config: ServeConfig, resources: Resources, on_progress: OnProgress
) -> Composition:
    """Start everything. Raises StartUpError with the first failure's one line; what has started by then still runs."""
    orchestrator = cluster.make_orchestrator()
    token = config.token or secrets.token_hex(16)
    specs, gateways = instance_specs(config, token), gateway_configs(config, token)
    try:
        async with asyncio.TaskGroup() as tasks:
            instance_tasks = [
                tasks.create_task(_start_instance(cluster, spec, resources, config.start_timeout_s, on_progress))
                for spec in specs
            ]
            gateway_tasks = [
                tasks.create_task(_start_gateway(cluster, item, config.start_timeout_s, on_progress))
                for item in gateways
            ]
    except ExceptionGroup as group:
        failures, others = group.split(StartUpError)
        if failures is None or others is not None:
            raise
        raise failures.exceptions[0] from None
    instance_seats = tuple(task.result() for task in instance_tasks)
    gateway_seats = tuple(task.result() for task in gateway_tasks)
    spec = OrchestratorSpec(
        host=LOCAL,
        admin_port=config.admin_port,
        admin_host=config.admin_host,
        admin_access=server_access(config),
        instances=instance_seats,
        gateways=gateway_seats,
        tick_s=config.tick_s,
        dispatch=config.dispatch,
        rebalance=config.rebalance,
        threshold_steps=config.threshold_steps,
        margin_steps=config.margin_steps,
        rest_s=config.rest_s,
        max_migrations=config.max_migrations,
        journal=_whole_path(config.journal),
        journal_part_bytes=config.journal_part_mib << 20,
        journal_parts=config.journal_parts,
        priority_levels=config.priority_levels,
        key_priorities=config.key_priorities,
        log_level=config.log_level,
        token=token,
        scaling=scaling_spec(config, specs[0], resources),
    )
    try:
        started = await cluster.start_orchestrator(orchestrator, spec, ORCHESTRATOR_START_S)
    except (ActorGone, CallFailed) as error:
        raise StartUpError(f"orchestrator: {error}") from error
    for url in dict.fromkeys(seat.url for seat in gateway_seats):
        await checks.await_health(url, HEALTHY_S)
    cluster.note_processes()
    return Composition(instance_seats, gateway_seats, orchestrator, started.admin_address, token, spec)


async def _start_instance(
    cluster: RayCluster, spec: InstanceSpec, resources: Resources, timeout_s: float, on_progress: OnProgress
) -> InstanceSeat:
    async def start() -> InstanceSeat:
        on_progress(Progress(spec.instance, Phase.CREATED))
        actor_name = cluster.make_instance(spec, resources)
        process_id = await find_place(cluster, actor_name, resources, timeout_s)
        on_progress(Progress(spec.instance, Phase.LOADING, _engine_name(spec.engine)))
        started = await load(cluster, actor_name, spec, timeout_s)
        on_progress(Progress(spec.instance, Phase.READY, _size(started)))
        return InstanceSeat(
            instance=started.instance,
            epoch=started.epoch,
            address=started.address,
            actor_name=actor_name,
            model=started.model,
            block_size=started.block_size,
            total_blocks=started.total_blocks,
            process_id=process_id,
        )

    return await _reported(spec.instance, start(), on_progress)


async def _start_gateway(
    cluster: RayCluster, config: GatewayConfig, timeout_s: float, on_progress: OnProgress
) -> GatewaySeat:
    async def start() -> GatewaySeat:
        on_progress(Progress(config.gateway, Phase.CREATED))
        actor_name = cluster.make_gateway(config.gateway)
        process_id = await cluster.process_id(actor_name, timeout_s)
        on_progress(Progress(config.gateway, Phase.LOADING, "vLLM's OpenAI server"))
        started = await cluster.start_gateway(actor_name, config, timeout_s)
        on_progress(Progress(config.gateway, Phase.READY, started.url))
        return GatewaySeat(config.gateway, actor_name, started.url, process_id)

    return await _reported(config.gateway, start(), on_progress)


async def _reported(name: str, work: Coroutine[None, None, Started], on_progress: OnProgress) -> Started:
    try:
        return await work
    except (ActorGone, CallFailed, StartUpError) as error:
        on_progress(Progress(name, Phase.FAILED, str(error)))
        raise StartUpError(f"{name}: {error}") from error


def _whole_path(path: str) -> str:
    """Of a file that another process opens, in whatever folder that one works."""
    return str(Path(path).absolute()) if path else ""


def _engine_name(kind: EngineKind) -> str:
    return "vLLM" if kind is EngineKind.VLLM else "the fake engine"


def _size(started: InstanceStarted) -> str:
    num_tokens = started.total_blocks * started.block_size
    return f"{num_tokens:,} tokens of KV cache in {started.total_blocks:,} blocks"


async def dismantle(cluster: RayCluster, composition: Composition) -> None:
    """Stop everything: deciding first, then the front door, then the engines. What does not stop in time is killed."""
    await cluster.stop_actor(composition.orchestrator, STOP_ORCHESTRATOR_S)
    await asyncio.gather(*(cluster.stop_actor(seat.actor_name, STOP_GATEWAY_S) for seat in composition.gateways))
    # The orchestrator is gone by now: what it has started since lives, what it has stopped does not.
    instances = {*cluster.instance_actors(), *(seat.actor_name for seat in composition.instances)}
    await asyncio.gather(*(cluster.stop_actor(actor_name, STOP_INSTANCE_S) for actor_name in sorted(instances)))
