"""What must hold whatever goes wrong? Every token once and in order, one owner a request, one end, nothing left behind.

Tokens are given a content that follows from request and offset, so that one that is lost, said twice or swapped is seen
by the client. Design: failure table; `README.md` here says what is looked at when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

from migration.types import RequestId
from orchestrator.errors import JournalError
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.journal.lines import LineReader
from orchestrator.journal.replay import Replay
from orchestrator.sim.arrivals import Lived
from orchestrator.sim.faults import Fault, Kind
from orchestrator.sim.instance import SimInstance
from orchestrator.sim.lengths import Sequence
from orchestrator.sim.runs import Content
from orchestrator.sim.world import World

MAX_BROKEN = 20
"""Violations that are kept of one play."""
_LOOK_S = 0.25
"""Between two looks at all parts while they run."""
_REST_LOOK_S = 0.5
_AFTERMATH_S = 90.0
"""A fault may be the cause of a failure so long after its end: past every time-out of a gateway."""

_APART = frozenset({Kind.CRASH, Kind.HANG, Kind.PARTITION, Kind.LOSS})
_CAUSES: dict[FailureKind, frozenset[Kind]] = {
    FailureKind.INSTANCE_LOST: _APART,
    FailureKind.NOBODY: _APART | {Kind.DRAIN, Kind.SCALE},
    FailureKind.BUSY: _APART | {Kind.DRAIN, Kind.SCALE, Kind.STALL, Kind.SLOW},
    FailureKind.CANCELLED: frozenset({Kind.END}),
}
"""What can have made a request fail so; other failures have no cause here."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that did not hold."""

    at_s: float
    what: str
    requests: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.at_s:.3f} s: {self.what}"


def token(external_id: str, offset: int) -> int:
    """What the token at that offset of a client's request says."""
    return (crc32(external_id.encode()) << 16) + offset


@dataclass(frozen=True, slots=True)
class _Made:
    """Tokens that one engine has made of one request, one after the other."""

    where: SimInstance
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.where.actor_name} made {self.begin}..{self.end}"


class Checks:
    """Of one world. Made before its `play`; `broken` is what there is to say after it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loop = asyncio.get_running_loop()
        self.broken: list[Broken] = []
        self.made: dict[RequestId, list[_Made]] = {}
        """Where the tokens of each attempt at a request were made."""
        self._had: dict[str, int] = {}
        """Tokens that each client has been told."""
        self._began_s = 0.0
        self._look_handle = self._loop.call_later(world.params.settle_s, self._begin)
        world.on_instance = self._attach
        world.clients.watch = self
        world.epilogue = self._at_rest

    def note(self, what: str, *requests: str) -> None:
        self.note_at(self._loop.time(), what, *requests)

    def note_at(self, at_s: float, what: str, *requests: str) -> None:
        """Each thing once: it may be seen at every look."""
        if len(self.broken) < MAX_BROKEN and all(one.what != what for one in self.broken):
            self.broken.append(Broken(at_s, what, requests))

    # ---- tokens
    def _attach(self, instance: SimInstance) -> None:
        instance.engine.runs.content = self._content(instance)

    def _content(self, instance: SimInstance) -> Content:
        def content(sequence: Sequence, count: int) -> tuple[int, ...]:
            end = sequence.num_output
            self._note_made(instance, sequence.request_id, end - count, end)
            first = token(sequence.external_id, end - count)
            return tuple(range(first, first + count))

        return content

    def _note_made(self, where: SimInstance, request_id: RequestId, begin: int, end: int) -> None:
        """Each token is made once, by the owner; what a dead one had made beyond the hand-over may be made again.
        A later attempt goes on after what its client has had by then."""
        made = self.made.setdefault(request_id, [])
        last = made[-1] if made else None
        if last is None:
            name, _, attempt = request_id.partition("~")
            had = self._had.get(name, 0) if attempt else 0
            if begin != had:
                self.note(f"{where.actor_name} begins {request_id} at token {begin}, not {had}", request_id)
        elif last.where is where and last.end == begin:
            made[-1] = _Made(where, last.begin, end)
            return
        elif begin != last.end and not (last.where.is_dead.is_set() and begin < last.end):
            what = f"{where.actor_name} makes token {begin} of {request_id}, which {last.where.actor_name}"
            self.note(f"{what}, alive, has brought to {last.end}", request_id)
        made.append(_Made(where, begin, end))

    def told(self, lived: Lived, token_ids: tuple[int, ...], has_ended: bool) -> None:
        """See `clients.Watch`."""
        name = lived.arrival.name
        if lived.is_over:
            self.note(f"{name} was told {len(token_ids)} tokens after its end", name)
        first = token(name, lived.num_tokens)
        if token_ids != tuple(range(first, first + len(token_ids))):
            offsets = [one - token(name, 0) for one in token_ids]
            self.note(f"{name} had {lived.num_tokens} tokens, and was told those at {offsets}", name)
        num_tokens = self._had[name] = lived.num_tokens + len(token_ids)
        if has_ended and num_tokens != lived.arrival.num_answer:
            self.note(f"{name} ended with {num_tokens} of {lived.arrival.num_answer} tokens", name)

    def failed(self, lived: Lived, failure: Failure) -> None:
        """See `clients.Watch`."""
        name, now_s = lived.arrival.name, self._loop.time() - self._began_s
        if lived.is_over:
            self.note(f"{name} failed after its end: {failure.message}", name)
        causes = _CAUSES.get(failure.kind, frozenset())
        faults = self._world.params.faults
        if not any(_may_have_caused(fault, causes, now_s) for fault in faults):
            self.note(f"{name} failed, and nothing can have caused it: {failure.kind.value}: {failure.message}", name)

    # ---- all parts, now and then
    def _begin(self) -> None:
        self._began_s = self._loop.time()
        self._look()

    def _look(self) -> None:
        self._check_parts()
        self._look_handle = self._loop.call_later(_LOOK_S, self._look)

    def _check_parts(self) -> None:
        world = self._world
        self._holds("core", world.core.check_integrity)
        for number, gateway in enumerate(world.gateways):
            self._holds(f"gateway-{number}", gateway.router.check_integrity)
        owners: dict[RequestId, str] = {}
        for instance in world.instances.values():
            self._holds(instance.actor_name, instance.engine.check_integrity)
            batch = instance.engine.batch
            for sequence in (*batch.running, *batch.holding, *batch.waiting):
                other = owners.setdefault(sequence.request_id, instance.actor_name)
                if other != instance.actor_name:
                    self.note(f"{sequence.request_id} is stepped by {other} and {instance.actor_name}")

    def _holds(self, who: str, check: Callable[[], None]) -> None:
        try:
            check()
        except AssertionError as error:
            self.note(f"{who}: {error or 'an assertion'}")

    # ---- the end
    async def _at_rest(self) -> None:
        """Wait until nothing is under way any more, for as long as for an answer; then look at what is left."""
        until_s = self._loop.time() + self._world.params.give_up_s
        while self._loop.time() < until_s and any(self._left()):  # noqa: ASYNC110 - nobody tells when all is at rest
            await asyncio.sleep(_REST_LOOK_S)
        self._look_handle.cancel()
        self._check_parts()
        for what in self._left():
            self.note(f"at rest: {what}")
        for lived in self._world.clients.lived.values():
            if not lived.is_over:
                self.note(f"{lived.arrival.name} was never answered: {lived.num_tokens} tokens", lived.arrival.name)

    def _left(self) -> Iterator[str]:
        """What should not be there when all is over."""
        world = self._world
        for instance in world.instances.values():
            name, batch = instance.actor_name, instance.engine.batch
            if batch.sequences:
                yield f"{name} has {', '.join(batch.sequences)}"
            elif batch.free != batch.config.num_blocks:
                yield f"{name} has {batch.free} of {batch.config.num_blocks} blocks free, and no request"
            try:
                instance.agent.check_integrity()
            except AssertionError as error:
                yield f"{name}: migrations are left {error}"
            if instance.agent.num_streams:
                yield f"{name} has {instance.agent.num_streams} streams"
        for number, gateway in enumerate(world.gateways):
            if gateway.router.num_requests:
                yield f"gateway-{number} has {gateway.router.num_requests} requests"
        for record in world.orchestrator.snapshot().migrations:
            if record.outcome is None:
                yield f"migration {record.number} of {record.request_id} has not ended"
        for what, task in world.breaker.asked if world.breaker is not None else ():
            if not task.done():
                yield f"nobody has answered [{what}]"


def _may_have_caused(fault: Fault, causes: frozenset[Kind], now_s: float) -> bool:
    return fault.kind in causes and fault.at_s <= now_s <= fault.ends_s + _AFTERMATH_S


def replay_differs(lines: list[bytes]) -> str | None:
    """Where the core, given the journal's events again, decides otherwise; None: nowhere."""
    reader, replay = LineReader(), Replay()
    try:
        for number, line in enumerate(lines, start=1):
            replay.take(reader.read(line), f"line {number}")
    except JournalError as error:
        return str(error)
    found = replay.divergence
    return None if found is None else f"{found.where}, {found.after}: {found.written} was, {found.replayed} is"
