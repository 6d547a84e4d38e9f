"""How do the gateways hear who is there, and how urgent requests may be? The latest word to each, until it has it."""

from __future__ import annotations

import asyncio

from instance.headroom import Headroom
from orchestrator.effects import Member, UpdateMembers, UpdatePriorities
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.log import fields, logger
from orchestrator.runtime.ports import Fleet

_log = logger("orchestrator")


class _Listener:
    """One live gateway, and what it has heard last."""

    def __init__(self, actor_name: str) -> None:
        self.actor_name = actor_name
        self.members: UpdateMembers | None = None
        self.priorities: UpdatePriorities | None = None
        self.is_gone = False
        """Its process has ended; the notice of that is on its way."""
        self.has_news = asyncio.Event()
        self.telling: asyncio.Task[None] | None = None


class GatewayTeller:
    """The live gateways, and what they are to know. `run` tells each by itself, so that one that hangs keeps no other
    on what held before; nothing here waits for it but `until_known`."""

    def __init__(self, fleet: Fleet, call_timeout_s: float, retry_s: float) -> None:
        self._fleet = fleet
        self._call_timeout_s, self._retry_s = call_timeout_s, retry_s
        self._listeners: dict[str, _Listener] = {}
        """By gateway."""
        self._members: UpdateMembers | None = None
        self._priorities: UpdatePriorities | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._is_known = asyncio.Event()
        self._is_known.set()  # there is nothing to know yet

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members.members if self._members is not None else ()

    @property
    def headroom(self) -> Headroom | None:
        """Of the levels of priority; None: it is not known yet."""
        return self._members.dispatch.load.headroom_blocks if self._members is not None else None

    @property
    def actor_names(self) -> tuple[str, ...]:
        """Of live gateways."""
        return tuple(listener.actor_name for listener in self._listeners.values())

    def add(self, gateway: str, actor_name: str) -> None:
        """A gateway has started, and has heard nothing; it takes the place of one of that name."""
        self._silence(gateway)
        listener = self._listeners[gateway] = _Listener(actor_name)
        self._begin(listener)
        self._note()

    def lost(self, gateway: str) -> None:
        self._silence(gateway)
        self._note()

    def update(self, effect: UpdateMembers | UpdatePriorities) -> None:
        """From now on this is what gateways are to know."""
        if isinstance(effect, UpdateMembers):
            _log.info("members %s", fields(num=len(effect.members), reason=effect.reason))
            self._members = effect
        else:
            _log.info("priorities %s", fields(num_keys=len(effect.key_classes), reason=effect.reason))
            self._priorities = effect
        self._note()

    async def until_known(self) -> None:
        """Return once every gateway has been told the latest."""
        await self._is_known.wait()

    async def run(self) -> None:
        """Push the latest to every gateway until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for listener in self._listeners.values():
                self._begin(listener)
            try:
                await asyncio.Event().wait()  # the group is there for whoever is added
            finally:
                self._tasks = None

    def _begin(self, listener: _Listener) -> None:
        if self._tasks is not None:
            listener.telling = self._tasks.create_task(self._tell(listener), name=f"tell-{listener.actor_name}")

    def _silence(self, gateway: str) -> None:
        listener = self._listeners.pop(gateway, None)
        if listener is not None and listener.telling is not None:
            listener.telling.cancel()

    def _note(self) -> None:
        """Something has changed: who has news, and does everybody know?"""
        lacking = [listener for listener in self._listeners.values() if self._has_news_for(listener)]
        for listener in lacking:
            listener.has_news.set()
        if lacking:
            self._is_known.clear()
        else:
            self._is_known.set()

    def _has_news_for(self, listener: _Listener) -> bool:
        has_all = listener.members is self._members and listener.priorities is self._priorities
        return not (has_all or listener.is_gone)

    async def _tell(self, listener: _Listener) -> None:
        """One push at a time, so that no older one overtakes a newer one."""
        while not listener.is_gone:
            await listener.has_news.wait()
            listener.has_news.clear()
            try:
                await self._push(listener)
            except ActorGone:
                listener.is_gone = True
            except CallFailed as error:
                _log.warning("gateway not told %s", fields(gateway=listener.actor_name, reason=error))
                await asyncio.sleep(self._retry_s)
            self._note()

    async def _push(self, listener: _Listener) -> None:
        members, priorities = self._members, self._priorities
        if priorities is not None and listener.priorities is not priorities:
            await self._fleet.set_priorities(listener.actor_name, priorities, self._call_timeout_s)
            listener.priorities = priorities
        if members is not None and listener.members is not members:
            await self._fleet.set_members(listener.actor_name, members, self._call_timeout_s)
            listener.members = members
