"""The orchestrator's process: a detached Ray actor that holds the loop and serves the gRPC admin API."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from instance.mailbox import Mailbox
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator import log
from orchestrator.admin.server import AdminServer
from orchestrator.core import Orchestrator
from orchestrator.errors import JournalError, StartUpError
from orchestrator.events import GatewayStarted, InstanceStarted
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.drain import DrainParams
from orchestrator.policy.levels import parse_levels
from orchestrator.policy.load import LoadParams
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.runtime.journal import Journal, JournalParams
from orchestrator.runtime.launch import RayLauncher
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.runtime.ray_cluster import RayCluster, Resources
from orchestrator.runtime.spec import OrchestratorSpec, OrchestratorStarted, ScalingSpec
from orchestrator.state import CoreParams, ScalingParams

STOP_GRACE_S = 1.0
START_GRACE_S = 30.0
"""A start that its own time-outs have not ended by then has failed."""


class OrchestratorActor:
    """`start` once; `lifetime` returns only when it was stopped, and raises when the loop failed."""

    def __init__(self) -> None:
        self._loop: OrchestratorLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._server: AdminServer | None = None
        self._mailbox: Mailbox | None = None
        self._journal: Journal | None = None
        self._started = asyncio.Event()

    async def start(self, config: bytes) -> bytes:
        """Start the loop and the admin API. Raises StartUpError when its port is taken, without a token, or when the
        journal cannot be opened; nothing is left open then."""
        spec = msgspec.json.decode(config, type=OrchestratorSpec)
        log.set_up(spec.log_level)
        try:
            self._mailbox = Mailbox(spec.token)
        except ValueError as error:
            raise StartUpError(str(error)) from error
        try:
            await self._mailbox.open(spec.host)
            core = Orchestrator(core_params(spec))
            cluster = RayCluster(is_ours=False)
            launcher = _launcher(cluster, spec.scaling) if spec.scaling is not None else None
            params = LoopParams(tick_s=spec.tick_s, migrate_timeout_s=spec.migrate_timeout_s)
            loop = OrchestratorLoop(core, cluster, self._mailbox, params, launcher=launcher)
            self._server = AdminServer(loop, spec.admin_access)
            address = self._server.bind(spec.admin_host, spec.admin_port)
            # Last of what can fail: it begins a part, which may cost the oldest one.
            self._journal = loop.journal = _journal(spec, core)
            await self._server.serve()
        except BaseException:
            await self.stop()
            raise
        self._loop = loop
        self._running = asyncio.get_running_loop().create_task(loop.run())
        await asyncio.sleep(0)  # let `run` open its task group: what comes next starts tasks in it
        for gateway in spec.gateways:
            loop.add(GatewayStarted(gateway.gateway, gateway.actor_name, gateway.url, gateway.process_id))
        for seat in spec.instances:
            incarnation = Incarnation(InstanceId(seat.instance), Epoch(seat.epoch), seat.address)
            loop.add(
                InstanceStarted(
                    incarnation, seat.actor_name, seat.model, seat.block_size, seat.total_blocks, seat.process_id
                )
            )
        await loop.until_gateways_know()
        self._started.set()
        return msgspec.json.encode(OrchestratorStarted(address, os.getpid()))

    async def lifetime(self) -> None:
        await self._started.wait()
        assert self._running is not None
        await asyncio.shield(self._running)

    async def stop(self) -> None:
        """Stop answering, then stop the loop. What it would still have decided is not decided."""
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        if self._loop is not None and self._running is not None:
            self._loop.stop()
            await asyncio.wait([self._running], timeout=STOP_GRACE_S)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
        if self._mailbox is not None:
            self._mailbox.close()


def _journal(spec: OrchestratorSpec, core: Orchestrator) -> Journal | None:
    if not spec.journal:
        return None
    params = JournalParams(max_part_bytes=spec.journal_part_bytes, max_parts=spec.journal_parts)
    try:
        return Journal(Path(spec.journal), core, asyncio.get_running_loop().time(), params)
    except JournalError as error:
        raise StartUpError(str(error)) from error
    except OSError as error:
        raise StartUpError(f"--journal: {error}") from error


def core_params(spec: OrchestratorSpec) -> CoreParams:
    levels = parse_levels(spec.priority_levels)
    return CoreParams(
        rebalance=RebalanceParams(
            threshold_steps=spec.threshold_steps,
            margin_steps=spec.margin_steps,
            rest_s=spec.rest_s,
            load=levels.load_params,
        ),
        dispatch=DispatchParams(rule=spec.dispatch, load=levels.load_params),
        drain=DrainParams(load=levels.load_params),
        levels=levels,
        key_classes=tuple(sorted(spec.key_priorities)),
        is_rebalancing=spec.rebalance,
        max_migrations_out=spec.max_migrations,
        max_migrations_in=spec.max_migrations,
        scaling=_scaling_params(spec.scaling, levels.load_params) if spec.scaling is not None else ScalingParams(),
    )


def _scaling_params(spec: ScalingSpec, load: LoadParams) -> ScalingParams:
    autoscale = AutoscaleParams(
        low_steps=spec.low_steps,
        high_steps=spec.high_steps,
        cap_steps=2 * spec.high_steps,
        margin_steps=spec.low_steps,
        period_s=spec.period_s,
        cooldown_s=spec.cooldown_s,
        settle_s=spec.cooldown_s,
        load=load,
    )
    return ScalingParams(
        can_start=True,
        fewest=spec.fewest,
        most=spec.most,
        capacity=spec.most,
        is_automatic=spec.is_automatic,
        autoscale=autoscale,
        first_epoch=spec.first_epoch,
        start_timeout_s=2 * spec.start_timeout_s + START_GRACE_S,  # for a place, then for loading
        retire_timeout_s=spec.retire_timeout_s,
    )


def _launcher(cluster: RayCluster, spec: ScalingSpec) -> RayLauncher:
    resources = Resources(spec.num_gpus, spec.custom_resources, spec.labels, spec.is_spread)
    return RayLauncher(cluster, spec.template, resources, spec.start_timeout_s)
