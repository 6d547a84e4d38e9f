"""What do preemptions cost? Tokens whose KV is thrown away, and the time until it has been computed again. Pure.

A preempted request gets no token until then. It may wait and be computed again on another instance than the one that
preempted it, so one book is kept for a whole fleet.
"""

from __future__ import annotations

from dataclasses import dataclass

from migration.types import RequestId


@dataclass(slots=True)
class Loss:
    """Of one request."""

    num_preemptions: int = 0
    tokens: int = 0
    """Computed once, thrown away. Those of a prompt that was half computed, too."""
    seconds: float = 0.0
    """From the step in which it was preempted to the end of the one that has computed all of it again. Not those of a
    request that ended before."""


class Losses:
    """Of one fleet; only requests that were preempted are in it."""

    def __init__(self) -> None:
        self.by_request: dict[RequestId, Loss] = {}
        self._since_s: dict[RequestId, float] = {}

    @property
    def is_any_open(self) -> bool:
        return bool(self._since_s)

    def preempted(self, request_id: RequestId, num_computed: int, now_s: float) -> None:
        loss = self.by_request.setdefault(request_id, Loss())
        loss.num_preemptions += 1
        loss.tokens += num_computed
        self._since_s.setdefault(request_id, now_s)  # preempted again before all of it was there: the time runs on

    def got_token(self, request_id: RequestId, now_s: float) -> None:
        """All of it had been computed."""
        since_s = self._since_s.pop(request_id, None)
        if since_s is not None:
            self.by_request[request_id].seconds += now_s - since_s
