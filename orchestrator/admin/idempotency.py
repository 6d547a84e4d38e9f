"""Was this command given before? Answers by request_id, so that a repetition does nothing twice (AIP-155)."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from orchestrator.admin.failures import Failure, invalid

MAX_ID_CHARS = 64
_ID_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass(frozen=True, slots=True)
class RepetitionParams:
    keep_s: float = 600.0
    """An answer is remembered for so long."""
    max_remembered: int = 4096
    """Past it the oldest answer is forgotten first."""
    max_under_way: int = 256
    """Commands with an id that have not ended; they go on when their caller leaves."""


@dataclass(slots=True)
class _Entry:
    content: bytes
    task: asyncio.Task[Any]
    ended_s: float = 0.0


class Repetitions:
    """Commands that carry a request_id. A command that fails is forgotten at once: a repetition tries it anew."""

    def __init__(self, params: RepetitionParams | None = None, clock: Callable[[], float] | None = None) -> None:
        """`clock` in seconds; without it the event loop's."""
        self._params = params or RepetitionParams()
        self._clock = clock
        self._under_way: dict[str, _Entry] = {}
        self._answered: OrderedDict[str, _Entry] = OrderedDict()

    def begin(
        self, request_id: str, command: Message, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> asyncio.Task[Any]:
        """The task of this command: a new one, or that of the first time. Await it shielded: it is everybody's.

        Raises Failure: not an id, the id of another command, or too many under way.
        """
        if len(request_id) > MAX_ID_CHARS or not _ID_CHARS.issuperset(request_id):
            raise invalid("request_id", f"it must be at most {MAX_ID_CHARS} letters, digits, dots, dashes, underscores")
        self._forget_old()
        content = _digest(command)
        known = self._under_way.get(request_id) or self._answered.get(request_id)
        if known is not None:
            if known.content != content:
                text = f"request_id {request_id} was given with another command: use a new one"
                raise Failure(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", text)
            return known.task
        if len(self._under_way) >= self._params.max_under_way:
            text = f"{self._params.max_under_way} commands are under way already"
            raise Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_COMMANDS", text)
        entry = _Entry(content, asyncio.get_running_loop().create_task(work(), name=f"command-{request_id}"))
        self._under_way[request_id] = entry
        entry.task.add_done_callback(lambda task: self._ended(request_id, entry, task))
        return entry.task

    def close(self) -> None:
        """Nobody will be answered any more."""
        for entry in tuple(self._under_way.values()):
            entry.task.cancel()

    @property
    def num_remembered(self) -> int:
        """Those under way, too."""
        return len(self._under_way) + len(self._answered)

    def _ended(self, request_id: str, entry: _Entry, task: asyncio.Task[Any]) -> None:
        del self._under_way[request_id]
        if task.cancelled() or task.exception() is not None:
            return
        entry.ended_s = self._now_s()
        self._answered[request_id] = entry
        while len(self._answered) > self._params.max_remembered:
            self._answered.popitem(last=False)

    def _forget_old(self) -> None:
        too_old_s = self._now_s() - self._params.keep_s
        while self._answered and next(iter(self._answered.values())).ended_s < too_old_s:
            self._answered.popitem(last=False)

    def _now_s(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()


def _digest(command: Message) -> bytes:
    """Of its type and content."""
    content = command.SerializeToString(deterministic=True)
    return hashlib.sha256(command.DESCRIPTOR.full_name.encode() + b"\0" + content).digest()
