"""How do faults befall a simulated fleet? Each begins at its time, and ends at its own; all is done from outside.

Messages are lost or held back, calls wait for their way, copies break off, engines stand still; operators' commands go
through the orchestrator, as those of the admin API do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from instance.messages import FleetMessage
from migration.errors import CopyFailed
from migration.types import InstanceId
from orchestrator.effects import Result
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    DrainRequested,
    Event,
    MigrateRequested,
    MigrationNumber,
    PriorityRequested,
    ScaleRequested,
    Token,
    UndrainRequested,
)
from orchestrator.sim.faults import EVERYBODY, Fault, Kind
from orchestrator.sim.instance import SimInstance

if TYPE_CHECKING:
    from orchestrator.sim.world import World

ORCHESTRATOR = "orchestrator"
_SCHEME = "sim://"
_ASKED_BY = "chaos"


def process_of(actor_name: str) -> str:
    """`instance-1` of `instance-1-3`: partitions outlast a crash."""
    return actor_name.rpartition("-")[0] if actor_name.startswith("instance-") else actor_name


class Breaker:
    """The faults of one world. `run` once."""

    def __init__(self, world: World, faults: tuple[Fault, ...], rng: Random) -> None:
        """`rng`: which messages a lossy network loses."""
        self._world, self._faults, self._rng = world, faults, rng
        self._loop = asyncio.get_running_loop()
        self.began: Counter[Kind] = Counter()
        """Those that found somebody to befall."""
        self.log: list[tuple[float, str]] = []
        """What was done, and when."""
        self.num_lost = 0
        self.num_held = 0
        self.ended_requests: set[str] = set()
        """By their client or an operator."""
        self.asked: list[tuple[str, asyncio.Task[Result]]] = []
        """Commands to the orchestrator."""
        self._partitions: list[Fault] = []
        self._losses: list[Fault] = []
        self._standing: Counter[str] = Counter()
        """Engines that stand still, by actor: how many faults have stopped each."""
        self._frozen: Counter[str] = Counter()
        """Processes that do."""
        self._slowed: dict[str, list[float]] = {}
        self._held: list[tuple[str, str, FleetMessage]] = []
        self._changes: list[asyncio.Future[None]] = []
        world.network.loses = self._loses
        world.fleet.way = self._way
        world.links.way = self._link_way

    async def run(self) -> None:
        """Until the last one is over."""
        began_s = self._loop.time()
        async with asyncio.TaskGroup() as tasks:
            for fault in self._faults:
                tasks.create_task(self._live(fault, began_s), name=f"fault-{fault.kind.value}")

    async def _live(self, fault: Fault, began_s: float) -> None:
        await asyncio.sleep(began_s + fault.at_s - self._loop.time())
        end = self._begin(fault)
        if end is None:
            return
        self.began[fault.kind] += 1
        await asyncio.sleep(fault.for_s)
        end()

    def _begin(self, fault: Fault) -> Callable[[], object] | None:
        """What is to be done at its end; None: it has found nobody."""
        match fault.kind:
            case Kind.PARTITION:
                return self._partition(fault)
            case Kind.LOSS:
                self._say(f"{fault.amount:.2%} of messages are lost")
                self._losses.append(fault)
                return lambda: self._losses.remove(fault)
            case Kind.SCALE:
                self._ask("scale", lambda token: ScaleRequested(token, target=int(fault.amount)))
                return _nothing
            case Kind.MOVE | Kind.PRIORITY | Kind.LEAVE | Kind.END:
                return self._with_request(fault)
            case Kind.CALL_OFF:
                return self._call_off(fault)
            case _:
                instance = self._world.instances.get(fault.who)
                return None if instance is None else self._with_instance(fault, instance)

    # ---- instances
    def _with_instance(self, fault: Fault, instance: SimInstance) -> Callable[[], object]:
        name, actor_name = InstanceId(instance.name), instance.actor_name
        self._say(f"{fault.kind.value} {actor_name}")
        match fault.kind:
            case Kind.CRASH:
                self._world.kill_instance(name)
                self._change()
                return lambda: self._restart(fault)
            case Kind.HANG:
                self._freeze(instance, 1)
                return lambda: self._freeze(instance, -1)
            case Kind.STALL:
                self._stand(instance, 1)
                return lambda: self._stand(instance, -1)
            case Kind.SLOW:
                self._slow(instance, fault.amount, is_over=False)
                return lambda: self._slow(instance, fault.amount, is_over=True)
            case _:
                self._ask(f"drain {name}", lambda token: DrainRequested(token, name, wait=True))
                return lambda: self._ask(f"undrain {name}", lambda token: UndrainRequested(token, name))

    def _restart(self, fault: Fault) -> None:
        world = self._world
        if not fault.for_s or fault.who in world.instances:
            return
        epoch = 1 + max(one.epoch for one in (*world.instances.values(), *world.ended))
        self._say(f"{fault.who} starts in epoch {epoch}")
        world.orchestrator.add(world.start_instance(fault.who, epoch))

    def _stand(self, instance: SimInstance, more: int) -> None:
        """Its engine stands still while any fault wants it to."""
        name = instance.actor_name
        self._standing[name] += more
        if not instance.is_dead.is_set() and self._standing[name] == max(0, more):
            instance.host.hang(more > 0)

    def _freeze(self, instance: SimInstance, more: int) -> None:
        self._stand(instance, more)
        self._frozen[instance.actor_name] += more
        if not self._frozen[instance.actor_name]:
            del self._frozen[instance.actor_name]
            self._say(f"{instance.actor_name} goes on")
            self._change()
            self._deliver_held()

    def _slow(self, instance: SimInstance, factor: float, *, is_over: bool) -> None:
        slowed = self._slowed.setdefault(instance.actor_name, [])
        (slowed.remove if is_over else slowed.append)(factor)
        slowness = max([1.0, *slowed])

        def set_it(_: object) -> bool:
            instance.engine.runs.slowness = slowness
            return True

        if not instance.is_dead.is_set():
            instance.host.call(set_it)  # between two steps: the times of those that are made must not change

    # ---- the network
    def _partition(self, fault: Fault) -> Callable[[], object]:
        self._say(f"nothing passes between {fault.who} and {fault.other or 'anybody'}")
        self._partitions.append(fault)
        self._world.links.break_off(self._is_cut)

        def heal() -> None:
            self._partitions.remove(fault)
            self._say(f"{fault.who} and {fault.other or 'anybody'} hear each other again")
            self._change()

        return heal

    def _is_cut(self, one: str, other: str) -> bool:
        """By actor names."""
        if not self._partitions:
            return False
        ends = {process_of(one), process_of(other)}
        return len(ends) == 2 and any(
            fault.who in ends and (fault.other == EVERYBODY or fault.other in ends) for fault in self._partitions
        )

    def _loses(self, sender: str, receiver: str, message: FleetMessage) -> bool:
        one, other = sender.removeprefix(_SCHEME), receiver.removeprefix(_SCHEME)
        if self._is_cut(one, other) or any(self._rng.random() < fault.amount for fault in self._losses):
            self.num_lost += 1
            return True
        if one in self._frozen or other in self._frozen:
            self.num_held += 1
            self._held.append((sender, receiver, message))
            return True
        return False

    def _deliver_held(self) -> None:
        """In the order in which they were sent; what is still held back is kept."""
        held, self._held = self._held, []
        for sender, receiver, message in held:
            self._world.network.carry(sender, receiver, message)

    async def _way(self, actor_name: str) -> None:
        """Returns when a call may pass between the orchestrator and this actor."""
        while actor_name in self._frozen or self._is_cut(ORCHESTRATOR, actor_name):
            await self._changed()

    async def _link_way(self, source: str, destination: str) -> None:
        """Returns when blocks may pass. Raises CopyFailed when they cannot."""
        while source in self._frozen or destination in self._frozen:
            await self._changed()
        if self._is_cut(source, destination):
            raise CopyFailed(f"no way from {source} to {destination}")

    async def _changed(self) -> None:
        change = self._loop.create_future()
        self._changes.append(change)
        await change

    def _change(self) -> None:
        changes, self._changes = self._changes, []
        for change in changes:
            if not change.done():
                change.set_result(None)

    # ---- commands
    def _with_request(self, fault: Fault) -> Callable[[], object] | None:
        clients = self._world.clients
        open_now = [request_id for request_id, lived in clients.lived.items() if not lived.is_over]
        if not open_now:
            return None
        request = open_now[int(fault.amount * len(open_now))]
        match fault.kind:
            case Kind.LEAVE:
                self._say(f"the client of {request} leaves")
                self.ended_requests.add(request)
                clients.abort(request)
            case Kind.END:
                self.ended_requests.add(request)
                self._ask(f"end {request}", lambda token: CancelRequested(token, request))
            case Kind.MOVE:
                to, mode = InstanceId(fault.who), fault.how
                self._ask(f"move {request} to {to}, {mode}", lambda token: MigrateRequested(token, request, to, mode))
            case _:
                what = f"{request} is to be {fault.how}"
                self._ask(what, lambda token: PriorityRequested(token, request, fault.how, _ASKED_BY))
        return _nothing

    def _call_off(self, fault: Fault) -> Callable[[], object] | None:
        snapshot = self._world.orchestrator.snapshot()
        under_way = [record.number for record in snapshot.migrations if record.outcome is None]
        if not under_way:
            return None
        number = MigrationNumber(under_way[int(fault.amount * len(under_way))])
        self._ask(f"call migration {number} off", lambda token: CancelMigrationRequested(token, number))
        return _nothing

    def _ask(self, what: str, make: Callable[[Token], Event]) -> None:
        async def ask() -> Result:
            result = await self._world.orchestrator.ask(make)
            self._say(f"answer to [{what}]: {result}")
            return result

        self._say(what)
        self.asked.append((what, asyncio.create_task(ask(), name=what)))

    def _say(self, what: str) -> None:
        self.log.append((self._loop.time(), what))


def _nothing() -> None:
    """It was over at once."""
