"""How does kvferry use Ray? Start or join a cluster; make, find, call and end actors. All Ray code besides the actors.

Instances are detached, named, never restarted by Ray (max_restarts=0) and made anew under a higher epoch: Ray's own
restarts answer `ActorUnavailable`, which does not tell whether a call has run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RaySystemError

from instance.spec import InstanceSpec, InstanceStarted, MigrationSummary
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import UpdateMembers, UpdatePriorities
from orchestrator.errors import ActorGone, CallFailed, StartUpError
from orchestrator.gateway import spec as gateway_spec
from orchestrator.runtime.reaper import Reaper
from orchestrator.runtime.spec import OrchestratorSpec, OrchestratorStarted

NAMESPACE = "kvferry"
ORCHESTRATOR_ACTOR = "kvferry-orchestrator"
INSTANCE_PREFIX = "kvferry-instance-"
RESOURCE = "kvferry_instance"
"""Custom resource an instance without a GPU holds: a node that holds none counts as idle to an autoscaler."""
OBJECT_STORE_BYTES = 96 << 20
"""Nothing of ours goes through the object store; Ray wants at least 75 MiB."""
LEAVE_S = 3.0
"""Processes that are still there so long after Ray's shutdown are killed."""
STOPPED = "it was stopped"
ASK_AGAIN_S = 0.5
"""Pause before an actor whose connection broke is asked again whether it lives."""
INSTANCE_CONCURRENCY = 256
GATEWAY_CONCURRENCY = 64
ORCHESTRATOR_CONCURRENCY = 64

Answer = TypeVar("Answer")
ActorHandle = Any
"""Ray's handles have no types."""

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster of our own listens on 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray would run its actors at nice 15: a step loop must not wait behind other work
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one instance holds, and where it may be."""

    num_gpus: float
    """0 on machines without CUDA: then one `kvferry_instance` is held."""
    custom: tuple[tuple[str, float], ...] = ()
    """Custom resources of Ray, held besides: (name, amount)."""
    labels: tuple[tuple[str, str], ...] = ()
    """Labels that its node must have: (name, value)."""
    is_spread: bool = False
    """On as many nodes as there are; otherwise Ray fills a node first."""

    def options(self) -> dict[str, Any]:
        """As Ray's `options` take them."""
        held = dict(self.custom) if self.num_gpus > 0 else {RESOURCE: 1.0, **dict(self.custom)}
        options: dict[str, Any] = {"resources": held} if held else {}
        if self.num_gpus > 0:
            options["num_gpus"] = self.num_gpus
        if self.labels:
            options["label_selector"] = dict(self.labels)
        if self.is_spread:
            options["scheduling_strategy"] = "SPREAD"
        return options

    def __str__(self) -> str:
        held = [f"{self.num_gpus:g} GPU"] if self.num_gpus > 0 else [f"1 {RESOURCE}"]
        held += [f"{amount:g} {name}" for name, amount in self.custom]
        return ", ".join([*held, *(f"a node with {name}={value}" for name, value in self.labels)])


def instance_actor_name(instance: str, epoch: int) -> str:
    return f"kvferry-{instance}-{epoch}"


def instance_of(actor_name: str) -> str:
    """The instance's name, of its actor's."""
    return actor_name.removeprefix("kvferry-").rpartition("-")[0]


def gateway_actor_name(gateway: str) -> str:
    return f"kvferry-{gateway}"


class RayCluster:
    """A connection to Ray from this process: started by us, joined, or given (inside an actor)."""

    def __init__(self, is_ours: bool) -> None:
        self._is_ours = is_ours
        self._reaper: Reaper | None = None
        self._handles: dict[str, ActorHandle] = {}
        """Of the actors made or called last, by name."""
        self._gone: set[str] = set()
        """Names whose actor is known to be gone: a call looks them up anew, since another one may have the name."""

    @classmethod
    def start_local(cls, num_instances: int) -> RayCluster:
        """Start Ray on this machine; it dies with this process. Call it from the main thread: Linux ends the processes
        of Ray when the *thread* that started them ends. Raises StartUpError when it does not come up."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cluster = cls(is_ours=True)
        cluster._reaper = Reaper()
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                resources={RESOURCE: float(num_instances)},
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
        except Exception as error:  # Ray raises nothing narrower when its processes do not come up
            cluster.shutdown()
            raise StartUpError(f"Ray does not start on this machine: {one_line(error)}") from error
        cluster.note_processes()
        return cluster

    @classmethod
    def join(cls, address: str) -> RayCluster:
        """Join a running cluster. Raises StartUpError when there is none."""
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RaySystemError) as error:
            raise StartUpError(f"no Ray cluster answers at {address!r}: {one_line(error)}") from error
        return cls(is_ours=False)

    def num_gpus(self) -> float:
        return float(ray.cluster_resources().get("GPU", 0.0))

    def log_folder(self) -> str:
        """Where the logs of all actors lie on this machine."""
        return os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs") if self._is_ours else ""

    # ------------------------------------------------------------------ making and ending actors
    def make_instance(self, spec: InstanceSpec, resources: Resources) -> str:
        """Create the actor of one instance; returns its name at once, before anything has been loaded."""
        from instance.actor import InstanceActor  # noqa: PLC0415 - heavy, and few processes need it

        name = instance_actor_name(spec.instance, spec.epoch)
        return self._make(InstanceActor, name, {"max_concurrency": INSTANCE_CONCURRENCY, **resources.options()})

    def make_gateway(self, gateway: str) -> str:
        from orchestrator.gateway.actor import GatewayActor  # noqa: PLC0415 - as above

        return self._make(GatewayActor, gateway_actor_name(gateway), {"max_concurrency": GATEWAY_CONCURRENCY})

    def make_orchestrator(self) -> str:
        from orchestrator.runtime.actor import OrchestratorActor  # noqa: PLC0415 - as above

        return self._make(OrchestratorActor, ORCHESTRATOR_ACTOR, {"max_concurrency": ORCHESTRATOR_CONCURRENCY})

    def _make(self, actor_class: Any, name: str, options: dict[str, Any]) -> str:
        remote_class = actor_class if hasattr(actor_class, "remote") else ray.remote(actor_class)
        always = {"name": name, "lifetime": "detached", "max_restarts": 0, "max_task_retries": 0, "num_cpus": 0}
        try:
            self._handles[name] = remote_class.options(**always, **options).remote()
            self._gone.discard(name)
        except ValueError as error:
            if "already taken" in str(error):
                raise StartUpError(f"an actor named {name} is there already: stop the kvferry that runs it") from error
            raise StartUpError(f"Ray does not take the options of {name}: {one_line(error)}") from error
        return name

    async def start_instance(self, actor_name: str, spec: InstanceSpec, timeout_s: float) -> InstanceStarted:
        answer = await self._call(actor_name, "start", timeout_s, msgspec.json.encode(spec))
        return msgspec.json.decode(answer, type=InstanceStarted)

    async def start_gateway(
        self, actor_name: str, config: gateway_spec.GatewayConfig, timeout_s: float
    ) -> gateway_spec.GatewayStarted:
        answer = await self._call(actor_name, "start", timeout_s, msgspec.json.encode(config))
        return msgspec.json.decode(answer, type=gateway_spec.GatewayStarted)

    async def start_orchestrator(
        self, actor_name: str, spec: OrchestratorSpec, timeout_s: float
    ) -> OrchestratorStarted:
        answer = await self._call(actor_name, "start", timeout_s, msgspec.json.encode(spec))
        return msgspec.json.decode(answer, type=OrchestratorStarted)

    async def process_id(self, actor_name: str, timeout_s: float) -> int:
        """The process of the actor; returns once the actor's class has been imported there."""
        handle = self._handle(actor_name)
        return int(await settled(handle.__ray_call__.remote(_own_process_id), timeout_s))

    async def stop_actor(self, actor_name: str, timeout_s: float) -> None:
        """Ask it to stop, then end its process either way."""
        if actor_name not in self._gone:
            with suppress(ActorGone, CallFailed):  # killed next
                await self._call(actor_name, "stop", timeout_s)
        self.kill(actor_name)

    def kill(self, actor_name: str) -> None:
        """End the process at once, that of the actor called last; unknown or dead actors are ignored."""
        try:
            ray.kill(self._handles.get(actor_name) or self._handle(actor_name), no_restart=True)
        except (ActorGone, RayError):
            return

    def kill_all(self) -> None:
        """End every process this connection has made or called at once, and the instances its orchestrator has started.

        In a cluster that was joined another kvferry may serve: without an orchestrator of ours, its instances are not.
        """
        started = self.instance_actors() if ORCHESTRATOR_ACTOR in self._handles else []
        for actor_name in {*self._handles, *started}:
            self.kill(actor_name)

    def instance_actors(self) -> list[str]:
        """The actors of instances that are there, whoever has made them; none when Ray does not answer."""
        if not ray.is_initialized():
            return []  # or asking would start one
        try:
            named = ray.util.list_named_actors()
        except (RayError, ConnectionError, RuntimeError):  # Ray itself is gone, or never came up
            return []
        return sorted(name for name in named if name.startswith(INSTANCE_PREFIX))

    def note_processes(self) -> None:
        """Have what runs by now killed, should this process itself be killed. Only for a cluster of our own."""
        if self._reaper is not None:
            self._reaper.note(self._own_processes())

    def _own_processes(self) -> list[psutil.Process]:
        """All processes of our Ray."""
        reaper = self._reaper.process_id if self._reaper is not None else None
        children = psutil.Process().children(recursive=True) if self._is_ours else []
        return [process for process in children if process.pid != reaper]

    def shutdown(self) -> None:
        """Leave Ray; a cluster that we started ends, and whatever of it is still there after LEAVE_S is killed."""
        children = self._own_processes()
        ray.shutdown()
        _, left = psutil.wait_procs(children, timeout=LEAVE_S)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1.0)
        if self._reaper is not None:
            self._reaper.dismiss()

    # ------------------------------------------------------------------ the Fleet port
    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        answer = await self._call(actor_name, "migrate", timeout_s, request_id, msgspec.json.encode(destination), mode)
        return msgspec.json.decode(answer, type=MigrationSummary)

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        return bool(await self._call(actor_name, "cancel_request", timeout_s, request_id))

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        return bool(await self._call(actor_name, "cancel_migration", timeout_s, request_id, reason))

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None:
        await self._call(actor_name, "drain" if draining else "undrain", timeout_s)

    async def set_priority(self, actor_name: str, request_id: str, priority: int, timeout_s: float) -> PriorityAnswer:
        answer = await self._call(actor_name, "set_priority", timeout_s, request_id, priority)
        return msgspec.json.decode(answer, type=PriorityAnswer)

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None:
        await self._call(actor_name, "member_lost", timeout_s, instance, epoch)

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        members = tuple(
            gateway_spec.Member(
                instance=member.incarnation.instance,
                epoch=member.incarnation.epoch,
                address=member.incarnation.address,
                actor_name=member.actor_name,
                state=member.state.value,
            )
            for member in told.members
        )
        membership = gateway_spec.Membership(members, told.num_gateways, told.dispatch)
        await self._call(actor_name, "set_members", timeout_s, msgspec.json.encode(membership))

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        now = gateway_spec.PrioritiesNow(told.levels.levels, told.key_classes)
        await self._call(actor_name, "set_priorities", timeout_s, msgspec.json.encode(now))

    async def wait_dead(self, actor_name: str) -> str:
        try:
            handle = self._handle(actor_name)
        except ActorGone as error:
            return str(error)
        reason = await why_over(handle)
        if reason != STOPPED:  # who stopped it ends its process, too, when it has cleaned up
            with suppress(RayError):  # before anybody is told: a cut off process may still run
                ray.kill(handle, no_restart=True)  # not by name, which may be another one's by now
            self._note_gone(actor_name, handle)
        return reason

    async def _call(self, actor_name: str, method: str, timeout_s: float, *arguments: object) -> bytes:
        # By name, as the port says which actor; the methods are those of the actor classes, three lines away from here.
        handle = self._handle(actor_name)
        try:
            return await settled(getattr(handle, method).remote(*arguments), timeout_s)
        except ActorGone:
            self._note_gone(actor_name, handle)
            raise

    def _note_gone(self, actor_name: str, handle: ActorHandle) -> None:
        if self._handles.get(actor_name) is handle:
            self._gone.add(actor_name)

    def _handle(self, actor_name: str) -> ActorHandle:
        handle = self._handles.get(actor_name)
        if handle is None or actor_name in self._gone:
            try:
                handle = ray.get_actor(actor_name, namespace=NAMESPACE)
            except ValueError as error:
                raise ActorGone(f"no actor is named {actor_name}") from error
            self._handles[actor_name] = handle
            self._gone.discard(actor_name)
        return handle


def _own_process_id(_actor: object) -> int:
    return os.getpid()


async def why_over(handle: ActorHandle, ask_again_s: float = ASK_AGAIN_S) -> str:
    """Return, with the reason in one line, once the actor's `lifetime` is over; a broken connection is not the end."""
    while True:
        try:
            await handle.lifetime.remote()
        except ActorUnavailableError:
            await asyncio.sleep(ask_again_s)  # a RayActorError, but unknown, not dead
        except RayActorError:
            return "its process ended"
        except RayError as error:
            return one_line(error)
        else:
            return STOPPED


async def settled(answer: Awaitable[Answer], timeout_s: float) -> Answer:
    """Wait for an actor's answer. Raises ActorGone or CallFailed."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as error:
        raise CallFailed(f"no answer within {timeout_s:g} s") from error
    except ActorUnavailableError as error:  # a RayActorError, but unknown, not dead
        raise CallFailed(f"its connection broke: {one_line(error)}") from error
    except RayActorError as error:
        raise ActorGone("its process ended") from error
    except RayError as error:
        raise CallFailed(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """What went wrong, without the traceback that Ray adds: the cause's own words, first line."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
