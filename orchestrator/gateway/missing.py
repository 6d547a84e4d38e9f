"""Which requests does no instance have any more, though their clients wait? Those that nobody lists who is asked. Pure.

The last frames of a request may be lost: its end, or all that a new owner has said of it; or the request itself was,
on its way there. No later token shows such a gap. So whoever is silent for a while is looked for in the lists of
requests that instances send to whoever subscribes to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from instance.messages import RequestReport
from instance.report import MAX_REPORTED_REQUESTS
from migration.types import Epoch, InstanceId, RequestId
from orchestrator.gateway.relay import Owner, Relay
from orchestrator.gateway.types import Flight

ROUNDS = 2
"""Lists of every instance that must lack a request: between two of one round it may have moved."""
_Standing = tuple[int, Owner | None, int]
"""Which of the gateway's submissions it is, its owner, its tokens so far."""


class Missing:
    """The search of one gateway, over its requests and their streams."""

    def __init__(self, flights: Mapping[RequestId, Flight], relay: Relay, look_every_s: float) -> None:
        """A request is looked for that has not stirred between two looks: after one to two times `look_every_s`."""
        self._flights, self._relay = flights, relay
        self._look_every_s = look_every_s
        self._looked_s = 0.0
        self._standing: dict[RequestId, _Standing] = {}
        """At the last look."""
        self._sought: dict[RequestId, _Standing] = {}
        self._listed: set[Owner] = set()
        """Who has said in this round what it has."""
        self._rounds = 0

    @property
    def is_seeking(self) -> bool:
        """Lists of requests are wanted."""
        return bool(self._sought)

    def tick(self, not_sent: Set[RequestId], now_s: float) -> None:
        """Which have not stirred since the last look, of those that were sent to an instance?"""
        if now_s - self._looked_s < self._look_every_s:
            return
        sent = [one for one in self._flights if one not in not_sent]
        before, self._standing, self._looked_s = self._standing, {one: self._stands(one) for one in sent}, now_s
        self._begin({one: stands for one, stands in self._standing.items() if before.get(one) == stands})

    def on_report(self, report: RequestReport, members: Set[Owner]) -> list[RequestId]:
        """What one instance has. Returns those that none of the members has, each once, when it ends the search."""
        if len(report.requests) >= MAX_REPORTED_REQUESTS:
            self._begin({})  # it may have any of them
        if not self._sought:
            return []
        for request in report.requests:
            self._sought.pop(RequestId(request.request_id), None)
        self._listed.add((InstanceId(report.instance), Epoch(report.epoch)))
        self._listed &= members
        if not self._sought or not members or not members <= self._listed:
            return []
        self._listed = set()
        self._rounds += 1
        if self._rounds < ROUNDS:
            return []
        sought = self._sought
        self._begin({})
        return [one for one, stood in sought.items() if one in self._flights and self._stands(one) == stood]

    def _begin(self, sought: dict[RequestId, _Standing]) -> None:
        self._sought, self._listed, self._rounds = sought, set(), 0

    def _stands(self, request_id: RequestId) -> _Standing:
        relay = self._relay
        return self._flights[request_id].sequence, relay.owner(request_id), relay.num_tokens(request_id)
