"""Is there a place for one more request that waits? Asked on the engine's thread, where how many wait is known."""

from __future__ import annotations

from instance.engine import Engine
from instance.types import EngineLoad, EngineRefusal, Submission


class WaitingRoom:
    """Counts what was added since the engine's load was last worked out: that is a walk over all that waits, too long
    for every request of a burst."""

    def __init__(self, max_waiting: int) -> None:
        self.refusal = EngineRefusal(f"{max_waiting} requests wait here", final=False)
        self._max_waiting = max_waiting
        self._load: EngineLoad | None = None
        self._num_added = 0

    def add(self, engine: Engine, submission: Submission, load: EngineLoad) -> EngineRefusal | None:
        """Add it, if there is a place. `load`: the latest."""
        if load is not self._load:
            self._load, self._num_added = load, 0
        if load.num_waiting + self._num_added >= self._max_waiting:
            return self.refusal
        refusal = engine.add(submission)
        self._num_added += refusal is None
        return refusal
