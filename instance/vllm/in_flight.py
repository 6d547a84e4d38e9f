"""Which steps have been scheduled whose outputs have not come yet? With asynchronous scheduling, one between two steps.

What such a step computes is counted as computed by vLLM's scheduler already, so whoever asks about a request between
steps must know what is still on its way. Pure; outputs are told apart by identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from instance.types import NO_WORK, StepWork


class StepsInFlight:
    """In the order in which they were scheduled, which is that in which their outputs come."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Any, frozenset[str], frozenset[str], StepWork]] = deque()

    def scheduled(self, output: Any, admitted: Collection[str], work: StepWork = NO_WORK) -> None:
        """`admitted`: requests that begin (again) with this step, at whatever prefix was cached for them."""
        self._steps.append((output, frozenset(output.num_scheduled_tokens), frozenset(admitted), work))

    def processed(self, output: Any) -> StepWork:
        """Its outputs have come; returns what it computed. A step whose execution failed is never heard of again, and
        goes with the next one."""
        while self._steps:
            done, _, _, work = self._steps.popleft()
            if done is output:
                return work
        return NO_WORK

    def holds(self, request_id: str) -> bool:
        """Whether a step in flight computes something for it."""
        return any(request_id in held for _, held, _, _ in self._steps)

    def admits(self, request_id: str) -> bool:
        """Whether it begins with a step in flight. Then its prefix may be another request's, of the same step or of the
        one before: found in the cache, and not computed yet."""
        return any(request_id in admitted for _, _, admitted, _ in self._steps)
