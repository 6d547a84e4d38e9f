"""How does a request come into the engine: as a new one, or to go on after the output that it has had elsewhere?

One whose owner is gone is reserved and committed as if it moved here, between two steps: nobody is left to export it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from instance.engine import Engine
from instance.errors import EngineFailed
from instance.ports import EngineHost
from instance.types import EngineRefusal, Submission
from instance.waiting_room import WaitingRoom
from migration.types import MigrationId, Refusal


@dataclass(frozen=True, slots=True)
class Decided:
    refusal: EngineRefusal | None
    """None: it is in the engine."""


def let_in(
    loop: EngineHost, room: WaitingRoom, submission: Submission, output_token_ids: tuple[int, ...]
) -> asyncio.Future[Decided]:
    """`output_token_ids`: what it has put out; empty: it is new. An abort that comes meanwhile does not call it off."""
    if output_token_ids:
        return loop.call_until(Revival(submission, output_token_ids))
    return loop.call(lambda engine: Decided(room.add(engine, submission, loop.load)))


def refusal_of(done: asyncio.Future[Decided]) -> EngineRefusal | None:
    """A request on which a living engine raises is not tried elsewhere; when the engine has ended, it is."""
    error = done.exception()
    if error is None:
        return done.result().refusal
    return EngineRefusal(f"the engine raised {error!r}", final=not isinstance(error, EngineFailed))


class Revival:
    """One request; called between steps until it is decided: its grammar may take a while to compile."""

    def __init__(self, submission: Submission, output_token_ids: tuple[int, ...]) -> None:
        self._submission = submission
        self._output = output_token_ids
        self._id = MigrationId(f"revival of {submission.request_id}")
        self._state: bytes | None = None

    def __call__(self, engine: Engine) -> Decided | None:
        """None: call again after the next step, or a while later. A refusal leaves nothing behind."""
        if self._state is None:
            found = engine.rescue(self._submission, self._output)
            if isinstance(found, EngineRefusal):
                return Decided(found)
            reserved = engine.reserve(self._id, found.description, 0)
            if isinstance(reserved, Refusal):
                return Decided(EngineRefusal(reserved.reason, final=False))
            self._state = found.state
        ready = engine.is_ready(self._id)
        if isinstance(ready, Refusal):
            engine.cancel(self._id)
            return Decided(EngineRefusal(ready.reason, final=True))
        if not ready:
            return None
        committed = engine.commit(self._id, self._state)
        return Decided(EngineRefusal(committed.reason, final=True) if isinstance(committed, Refusal) else None)
