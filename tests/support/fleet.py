"""How does a test run instances in one process, without Ray? Fake engines, real mailboxes, and a strict gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

from instance.fake_model import FakeRequest, encode_fake, expected_output
from instance.mailbox import Mailbox
from instance.messages import (
    Abort,
    CachedBlocks,
    FleetMessage,
    Frame,
    LoadReport,
    OutputEntry,
    OwnerChanged,
    PriorityChanged,
    RequestReport,
    Submit,
    SubmitAnswer,
    Subscribe,
)
from instance.service import InstanceService
from instance.spec import EngineKind, InstanceSpec, InstanceStarted
from instance.types import NO_WISHES, Wishes
from migration.types import Epoch, Incarnation, InstanceId
from tests.support.known_blocks import KnownBlocks

PATIENCE_S = 20.0
TOKEN = "test"
"""The secret of every fleet in these tests."""


class Gateway:
    """An inbox that keeps all it hears, and checks at once that no token comes twice and offsets fit."""

    def __init__(self) -> None:
        self.mailbox = Mailbox(TOKEN)
        self.answers: dict[str, SubmitAnswer] = {}
        self.entries: dict[str, list[tuple[str, OutputEntry]]] = defaultdict(list)
        self.owners: dict[str, list[OwnerChanged]] = defaultdict(list)
        self.priorities: dict[str, list[PriorityChanged]] = defaultdict(list)
        self.reports: dict[str, LoadReport] = {}
        self.num_reports: dict[str, int] = defaultdict(int)
        self.request_reports: dict[str, RequestReport] = {}
        self.known: dict[str, KnownBlocks] = defaultdict(KnownBlocks)
        self.cached: dict[str, list[CachedBlocks]] = defaultdict(list)
        self._sequence: dict[str, int] = defaultdict(int)
        self.num_heard = 0
        self._heard = asyncio.Event()

    async def run(self) -> None:
        while True:
            self._take(await self.mailbox.receive())
            self.num_heard += 1
            self._heard.set()

    def _take(self, message: FleetMessage) -> None:
        match message:
            case SubmitAnswer():
                self.answers[message.request_id] = message
            case Frame():
                self.reports[message.instance] = message.load
                for entry in message.entries:
                    self.entries[entry.request_id].append((message.instance, entry))
            case LoadReport():
                self.reports[message.instance] = message
                self.num_reports[message.instance] += 1
            case RequestReport():
                self.request_reports[message.instance] = message
            case CachedBlocks():
                self.known[message.instance].hear(message)
                self.cached[message.instance].append(message)
            case OwnerChanged():
                self.owners[message.request_id].append(message)
            case PriorityChanged():
                self.priorities[message.request_id].append(message)
            case _:
                raise AssertionError(f"a gateway hears no {type(message).__name__}")

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self._heard.clear()
                await self._heard.wait()

    async def hear_more(self, num_messages: int, unless_finished: str) -> None:
        enough = self.num_heard + num_messages
        await self.until(lambda: self.num_heard >= enough or self.is_finished(unless_finished))

    def submit(
        self,
        to: Incarnation,
        request_id: str,
        request: FakeRequest,
        priority: int = 0,
        epoch: int | None = None,
        wishes: Wishes = NO_WISHES,
    ) -> None:
        self._sequence[to.instance] += 1
        submit = Submit(
            request_id=request_id,
            external_id=f"client-{request_id}",
            gateway_address=self.mailbox.address,
            epoch=to.epoch if epoch is None else epoch,
            sequence=self._sequence[to.instance],
            priority=priority,
            num_prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
            payload=encode_fake(request),
            ttft_s=wishes.ttft_s,
            tpot_s=wishes.tpot_s,
            waited_s=wishes.waited_s,
        )
        assert self.mailbox.send(to.address, submit)

    def abort(self, *members: Incarnation, request_ids: tuple[str, ...]) -> None:
        for member in members:
            self.mailbox.send(member.address, Abort(request_ids))

    def subscribe(
        self, to: Incarnation, lease_s: float = 5.0, with_requests: bool = False, cached_from: int | None = None
    ) -> None:
        self.mailbox.send(to.address, Subscribe(self.mailbox.address, lease_s, with_requests, cached_from))

    def num_tokens(self, request_id: str) -> int:
        return sum(len(entry.token_ids) for _, entry in self.entries[request_id])

    def is_finished(self, request_id: str) -> bool:
        return any(entry.finish_reason is not None for _, entry in self.entries[request_id])

    def is_whole(self, request_id: str) -> bool:
        """It has finished, and no token is missing (two instances' frames may overtake each other)."""
        ends = [e.offset + len(e.token_ids) for _, e in self.entries[request_id] if e.finish_reason is not None]
        return bool(ends) and self.num_tokens(request_id) >= ends[0]

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """All tokens by offset. Raises AssertionError for a token that came twice, or a gap."""
        by_offset: dict[int, int] = {}
        for instance, entry in self.entries[request_id]:
            for index, token in enumerate(entry.token_ids):
                offset = entry.offset + index
                assert offset not in by_offset, f"{request_id}: offset {offset} came twice, again from {instance}"
                by_offset[offset] = token
        assert sorted(by_offset) == list(range(len(by_offset))), f"{request_id}: a gap in {sorted(by_offset)}"
        return tuple(by_offset[offset] for offset in range(len(by_offset)))

    def senders(self, request_id: str) -> list[str]:
        """Instances in the order in which they first sent tokens of it."""
        return list(dict.fromkeys(instance for instance, _ in self.entries[request_id]))


class Fleet:
    """Instances i0, i1, ... and one gateway."""

    def __init__(self) -> None:
        self.gateway = Gateway()
        self.services: dict[str, InstanceService] = {}
        self.members: dict[str, Incarnation] = {}
        self.started: dict[str, InstanceStarted] = {}

    async def add(self, instance: str, *flags: str, epoch: int = 1, **spec: Any) -> Incarnation:
        service = InstanceService()
        argv = ("fake", "--step-time-ms", "1", *flags)
        whole = InstanceSpec(instance, epoch, EngineKind.FAKE, argv, token=TOKEN, **spec)
        self.started[instance] = await service.start(whole)
        self.services[instance] = service
        self.members[instance] = Incarnation(InstanceId(instance), Epoch(epoch), self.started[instance].address)
        return self.members[instance]

    async def run(self, at: str, request_id: str, request: FakeRequest, num_tokens: int) -> None:
        """Submit it, and wait until so many tokens have come."""
        self.gateway.submit(self.members[at], request_id, request)
        await self.gateway.until(lambda: self.gateway.num_tokens(request_id) >= num_tokens)

    async def finish(self, *request_ids: str) -> None:
        await self.gateway.until(lambda: all(self.gateway.is_whole(request_id) for request_id in request_ids))

    async def check_rest(self) -> None:
        """Nothing is left of any request or migration at any instance that lives."""
        for service in self.services.values():
            await service.loop.call(lambda engine: engine.check_integrity())
            load = await service.loop.call(lambda engine: engine.load())
            assert (load.num_running, load.num_waiting, load.reserved_blocks) == (0, 0, 0), load
            assert load.free_blocks == service.facts().total_blocks
            assert await service.loop.call(lambda engine: engine.requests()) == ()
            service.agent.check_integrity()
            assert service.agent.num_streams == 0

    async def kill(self, instance: str) -> Incarnation:
        """As near to SIGKILL as one process allows: its agent stops in the middle of whatever it does."""
        service = self.services.pop(instance)
        await service.break_down()
        return self.members.pop(instance)


@contextlib.asynccontextmanager
async def fleet_of(num_instances: int, *flags: str, **spec: Any) -> AsyncIterator[Fleet]:
    fleet = Fleet()
    await fleet.gateway.mailbox.open()
    hearing = asyncio.create_task(fleet.gateway.run())
    try:
        for index in range(num_instances):
            await fleet.add(f"i{index}", *flags, **spec)
        yield fleet
    finally:
        for service in fleet.services.values():
            await service.stop()
        hearing.cancel()
        await asyncio.wait((hearing,))
        fleet.gateway.mailbox.close()
    assert hearing.cancelled(), hearing.exception()


def a_request(key: int, num_prompt_tokens: int = 60, max_tokens: int = 200, seed: int = 0) -> FakeRequest:
    prompt = tuple((key * 7919 + i * i * 31 + i) % 32_000 for i in range(num_prompt_tokens))
    return FakeRequest(prompt, max_tokens, seed)


__all__ = ["TOKEN", "Fleet", "Gateway", "a_request", "expected_output", "fleet_of"]
