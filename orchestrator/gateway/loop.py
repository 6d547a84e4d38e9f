"""How does the router meet the world? Its mailbox, its clock, and the performing of its effects. One asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from instance.messages import Submit
from instance.ports import Inbox
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.errors import Failure
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Deliver, Effect, Fail, Forget, Outgoing, RouterParams, Send
from orchestrator.policy.dispatch import DispatchBook, DispatchParams

TICK_S = 0.05


class GatewayLoop:
    """Owns the mailbox and the router; every method is called on the loop that runs `run`."""

    def __init__(self, mailbox: Inbox, params: RouterParams, book: DispatchBook | None = None) -> None:
        """`book`: chooses instances; None: one of `params.dispatch`."""
        self._mailbox = mailbox
        self._clock = asyncio.get_running_loop().time
        self.router = Router(mailbox.address, params, book)
        self._on_deliver: Callable[[Deliver], None] = lambda _: None
        self._on_fail: Callable[[Fail], None] = lambda _: None

    def connect(self, on_deliver: Callable[[Deliver], None], on_fail: Callable[[Fail], None]) -> None:
        """Who takes the output and the failures. Call before `run`."""
        self._on_deliver, self._on_fail = on_deliver, on_fail

    @property
    def address(self) -> str:
        """Where this gateway's inbox listens."""
        return self._mailbox.address

    def now_s(self) -> float:
        return self._clock()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._tick())

    def set_members(self, members: Iterable[Incarnation], num_gateways: int) -> None:
        self._perform(self.router.set_members(members, self._clock(), num_gateways))

    def set_dispatch(self, params: DispatchParams) -> None:
        self.router.set_dispatch(params)

    def member_lost(self, instance: InstanceId, epoch: Epoch) -> None:
        self._perform(self.router.on_member_lost(instance, epoch, self._clock()))

    def submit(self, request: Outgoing) -> None:
        self._perform(self.router.submit(request, self._clock()))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Never waits: a client's disconnect runs in a cancelled scope, where the first await would raise."""
        self._perform(self.router.abort(request_ids))

    def fail_all(self, failure: Failure) -> None:
        self._perform(self.router.fail_all(failure))

    def cancel(self, request_id: str, failure: Failure) -> bool:
        """End one request, by its id at the instances; False: there is none."""
        effects = self.router.fail_all(failure, (RequestId(request_id),))
        self._perform(effects)
        return bool(effects)

    async def _receive(self) -> None:
        while True:
            message = await self._mailbox.receive()
            self._perform(self.router.on_message(message, self._clock()))

    async def _tick(self) -> None:
        while True:
            self._perform(self.router.tick(self._clock()))
            await asyncio.sleep(TICK_S)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    is_queued = self._mailbox.send(effect.address, effect.message)  # a full queue drops it, counted
                    if not is_queued and isinstance(effect.message, Submit):
                        self._perform(self.router.on_unsent(effect.message.request_id, self._clock()))
                case Forget():
                    self._mailbox.forget(effect.address)
                case Deliver():
                    self._on_deliver(effect)
                case Fail():
                    self._on_fail(effect)
