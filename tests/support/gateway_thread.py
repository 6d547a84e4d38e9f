"""A gateway on a thread of its own, as in Ray's async actors (uvloop, not the main thread), for plain clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig, GatewayStarted, Member

Answer = TypeVar("Answer")


class GatewayThread:
    """`start`, use `url`, `stop`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway")
        self._service = GatewayService()
        self._started: GatewayStarted | None = None

    @property
    def url(self) -> str:
        assert self._started is not None
        return self._started.url

    def start(self, config: GatewayConfig, members: Sequence[Member], timeout_s: float = 60.0) -> None:
        """Returns when every member has reported."""
        self._thread.start()
        self._started = self._wait(self._service.start(config), timeout_s)
        self.set_members(members)
        self._wait(self._until(self._all_have_reported(len(members))), timeout_s)

    def set_members(self, members: Sequence[Member]) -> None:
        async def tell() -> None:
            self._service.set_members(members)

        self._wait(tell(), 5.0)

    def member_lost(self, member: Member) -> None:
        async def tell() -> None:
            self._service.member_lost(member.instance, member.epoch)

        self._wait(tell(), 5.0)

    def ask(self, question: Callable[[GatewayService], Answer]) -> Answer:
        """Answer it on the gateway's loop."""

        async def answer() -> Answer:
            return question(self._service)

        return self._wait(answer(), 5.0)

    def until(self, is_so: Callable[[GatewayService], bool], timeout_s: float = 10.0) -> None:
        self._wait(self._until(lambda: is_so(self._service)), timeout_s)

    def stop(self) -> None:
        self._wait(self._service.stop(), 5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def _all_have_reported(self, num_members: int) -> Callable[[], bool]:
        return lambda: len(self._service.loop.router.view(self._service.loop.now_s()).instances) == num_members

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():  # noqa: ASYNC110 - it waits for sockets, which set no event of ours
            await asyncio.sleep(0.01)

    def _wait(self, work: Coroutine[Any, Any, Answer], timeout_s: float) -> Answer:
        future: Future[Answer] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)
