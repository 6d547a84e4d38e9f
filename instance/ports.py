"""What do agents, gateways and the orchestrator's loop stand on? An inbox, and whoever steps the engine.

`Mailbox` and `EngineLoop` are the real ones, over sockets and a thread; the simulator has its own, in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from instance.engine import Engine
from instance.messages import FleetMessage
from instance.types import EngineLoad

T = TypeVar("T")


class Inbox(Protocol):
    """The inbox of one process and its way to those of others."""

    @property
    def address(self) -> str:
        """Where others reach this inbox."""

    async def receive(self) -> FleetMessage:
        """The next message of a member."""

    def send(self, address: str, message: FleetMessage) -> bool:
        """Queue it for that inbox without waiting. False: it was dropped."""

    def forget(self, address: str) -> None:
        """Drop what is queued for that inbox. Unknown addresses are ignored."""


class EngineHost(Protocol):
    """Steps one engine, and lets others visit it between two steps. Called from one asyncio loop."""

    @property
    def engine(self) -> Engine:
        """For its `facts` and its `mover` only: the rest belongs to whoever steps it."""

    @property
    def min_step_s(self) -> float:
        """No step starts earlier after the one before."""

    @property
    def num_steps(self) -> int: ...

    @property
    def load(self) -> EngineLoad:
        """As of the last step or visit. Raises EngineFailed before the engine has started."""

    def now_s(self) -> float:
        """The asyncio loop's clock."""

    def call(self, fn: Callable[[Engine], T], then: Callable[[T], None] | None = None) -> asyncio.Future[T]:
        """Run `fn` between two steps. `then` runs on the asyncio loop before any later step is delivered there.

        The future fails with EngineFailed when the engine has ended, else with what `fn` raised.
        """

    def look(self, fn: Callable[[Engine], T]) -> asyncio.Future[T]:
        """As `call`, for what changes nothing that steps depend on."""

    def call_until(self, fn: Callable[[Engine], T | None]) -> asyncio.Future[T]:
        """As `call`, but while `fn` returns None it is tried again after every step, in the order of the calls."""
