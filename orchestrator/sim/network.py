"""How do simulated processes reach each other? Inboxes by name, one latency for all; what is lost, the world decides.

Messages are handed over as they are: frozen values, never encoded. Between two processes they keep their order.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from instance.messages import FleetMessage

Loses = Callable[[str, str, FleetMessage], bool]
"""(sender, receiver, message): whether the network loses this one."""


def nothing_lost(sender: str, receiver: str, message: FleetMessage) -> bool:  # noqa: ARG001 - the shape of `Loses`
    return False


class Network:
    """All inboxes of one world."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.loses: Loses = nothing_lost
        self.num_messages = 0
        self._inboxes: dict[str, SimInbox] = {}

    def open(self, name: str) -> SimInbox:
        """The inbox of a process that has just started. Raises ValueError when there is one of that name."""
        address = f"sim://{name}"
        if address in self._inboxes:
            raise ValueError(f"an inbox named {name} is open")
        inbox = self._inboxes[address] = SimInbox(self, address)
        return inbox

    def close(self, address: str) -> None:
        """Its process is gone: what is on its way there arrives nowhere."""
        self._inboxes.pop(address, None)

    def carry(self, sender: str, receiver: str, message: FleetMessage) -> bool:
        """False: nobody listens there, or the sender is gone. What the network loses is lost without a word."""
        inbox = self._inboxes.get(receiver)
        if inbox is None or sender not in self._inboxes:
            return False
        self.num_messages += 1
        if not self.loses(sender, receiver, message):
            inbox.put(message, self.latency_s)
        return True


class SimInbox:
    """See `instance.ports.Inbox`. A message takes between one latency and two: what comes to one inbox meanwhile comes
    together, so that a thousand instances do not wake their gateway once for each word. What was sent first arrives
    first."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, FleetMessage]] = deque()
        """(when it arrives, what): in that order."""
        self._waiting: asyncio.Future[None] | None = None

    @property
    def address(self) -> str:
        return self._address

    def send(self, address: str, message: FleetMessage) -> bool:
        return self._network.carry(self._address, address, message)

    def forget(self, address: str) -> None:
        """Nothing is queued at a sender here."""

    def put(self, message: FleetMessage, latency_s: float) -> None:
        due_s = self._loop.time() + latency_s
        if latency_s > 0.0:
            due_s = math.ceil(due_s / latency_s) * latency_s
        if self._queue:
            due_s = max(due_s, self._queue[-1][0])
        self._queue.append((due_s, message))
        if len(self._queue) == 1 and self._waiting is not None:
            self._loop.call_at(due_s, self._wake)

    async def receive(self) -> FleetMessage:
        while not self._queue or self._queue[0][0] > self._loop.time():
            self._waiting = self._loop.create_future()
            if self._queue:
                self._loop.call_at(self._queue[0][0], self._wake)
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._queue.popleft()[1]

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
