"""What does `kvferry serve` do in the foreground? Check, start, say what happens, wait for a signal, stop it all."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from rich.console import Console

from instance.spec import Carrier
from orchestrator.access import is_loopback
from orchestrator.config import Engine, ServeConfig, server_access
from orchestrator.errors import StartUpError
from orchestrator.runtime import checks
from orchestrator.runtime.compose import Composition, Phase, Progress, compose, dismantle, instance_resources
from orchestrator.runtime.journal import check_path
from orchestrator.runtime.ray_cluster import STOPPED, RayCluster, Resources, instance_of

FORCED_EXIT = 130
FOLLOW_S = 2.0
"""Time between two looks at which instances there are."""
NOTE_LOOKS = 10
"""After a new one was seen, so many looks note the processes of Ray: its own comes a while after its name."""


def run(config: ServeConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises StartUpError with one line; nothing is left running either way."""
    signal.signal(signal.SIGTERM, _interrupt)  # until the event loop takes both signals over
    checks.check_port(config.host, config.port, "--port")
    checks.check_port(config.admin_host, config.admin_port, "--admin-port")
    if not server_access(config).certificate and not is_loopback(config.admin_host):
        console.print(f"warning: the admin API on {config.admin_host} has no TLS: its token can be read on the way")
    if config.journal:
        check_path(Path(config.journal), config.journal_parts)
    tensor_parallel_size = 1
    if config.engine is Engine.VLLM:
        with console.status("checking the flags with vLLM's own parser"):
            tensor_parallel_size = checks.parse_engine_argv((config.model, *config.engine_argv)).tensor_parallel_size
    with console.status("starting Ray"):
        cluster = (
            RayCluster.join(config.ray_address) if config.ray_address else RayCluster.start_local(config.most_instances)
        )
    foreground = _Foreground(config, cluster, console)
    try:
        resources = _resources(config, cluster, tensor_parallel_size)
        asyncio.run(foreground.run(resources))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes three seconds at most
        cluster.shutdown()
    console.print("stopped; nothing is left running")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _resources(config: ServeConfig, cluster: RayCluster, tensor_parallel_size: int) -> Resources:
    num_gpus = cluster.num_gpus()
    if config.carrier is Carrier.NCCL and num_gpus == 0:
        raise StartUpError("--carrier nccl needs GPUs, and Ray sees none: use --carrier shm or --carrier tcp")
    if config.engine is Engine.FAKE or num_gpus == 0:
        return instance_resources(config, num_gpus=0)
    # A cluster that is joined may grow; a machine does not.
    instances, flag = (
        (config.instances, "--instances") if config.ray_address else (config.most_instances, "--autoscale-max")
    )
    flag = "--instances" if instances == config.instances else flag
    needed = instances * tensor_parallel_size
    if needed > num_gpus:
        raise StartUpError(
            f"{instances} instances of {tensor_parallel_size} GPUs need {needed}, there are {num_gpus:g}:"
            f" lower {flag} or --tensor-parallel-size"
        )
    return instance_resources(config, num_gpus=float(tensor_parallel_size))


class _Foreground:
    """The starting process while everything runs."""

    def __init__(self, config: ServeConfig, cluster: RayCluster, console: Console) -> None:
        self._config = config
        self._cluster = cluster
        self._console = console
        self._stop = asyncio.Event()
        self._is_stopping = False
        self._began_s: dict[str, float] = {}

    async def run(self, resources: Resources) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        composition: Composition | None = None
        starting = asyncio.create_task(compose(self._cluster, self._config, resources, self._on_progress))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            composition = starting.result()
            self._announce(composition)
            await self._watch_until(stopping, composition)
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.wait([starting])  # its failure is raised above, or not of interest any more
            try:
                if composition is not None:
                    await dismantle(self._cluster, composition)
            finally:
                self._cluster.kill_all()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._is_stopping:
            self._say(f"{number.name} again: ending at once")
            self._cluster.kill_all()
            os._exit(FORCED_EXIT)
        self._is_stopping = True
        self._say(f"{number.name}: stopping gateways, then instances (once more to end at once)")
        self._stop.set()

    def _on_progress(self, progress: Progress) -> None:
        now_s = time.monotonic()
        match progress.phase:
            case Phase.CREATED:
                self._began_s[progress.name] = now_s
            case Phase.LOADING:
                self._say(f"{progress.name} loading {progress.detail} ...")
            case Phase.READY:
                took_s = now_s - self._began_s.get(progress.name, now_s)
                self._say(f"{progress.name} ready in {took_s:.0f} s: {progress.detail}")
            case Phase.FAILED:
                self._say(f"{progress.name} failed")

    def _announce(self, composition: Composition) -> None:
        self._say(f"admin API on {composition.admin_address} (try `kvferry status`)")
        folder = self._cluster.log_folder()
        if folder:
            self._say(f"logs of all processes in {folder}")
        for url in composition.urls:
            self._say(f"OpenAI endpoint on {url}/v1")
        self._say("serving; Ctrl-C stops everything")

    async def _watch_until(self, stopping: asyncio.Task[bool], composition: Composition) -> None:
        """Say who is lost, until it is time to stop."""
        named = [(seat.instance, seat.actor_name) for seat in composition.instances]
        named += [(seat.gateway, seat.actor_name) for seat in composition.gateways]
        named.append(("orchestrator", composition.orchestrator))
        watches = [asyncio.create_task(self._watch(name, actor_name)) for name, actor_name in named]
        watches.append(asyncio.create_task(self._follow({actor_name for _, actor_name in named})))
        await asyncio.wait([stopping])
        for watch in watches:
            watch.cancel()

    async def _watch(self, name: str, actor_name: str) -> None:
        reason = await self._cluster.wait_dead(actor_name)
        if not self._is_stopping:
            self._say(f"{name} was stopped" if reason == STOPPED else f"{name} was lost ({reason}); the others go on")

    async def _follow(self, known: set[str]) -> None:
        """Watch the instances, too, that the orchestrator starts: say so, and have them end with us."""
        looks_left = 0
        async with asyncio.TaskGroup() as watches:
            while True:
                await asyncio.sleep(FOLLOW_S)
                there = await asyncio.to_thread(self._cluster.instance_actors)
                for actor_name in sorted(set(there) - known):
                    known.add(actor_name)
                    name = instance_of(actor_name)
                    self._say(f"{name} is being started by the orchestrator")
                    watches.create_task(self._watch(name, actor_name))
                    looks_left = NOTE_LOOKS
                if looks_left > 0:
                    looks_left -= 1
                    self._cluster.note_processes()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
