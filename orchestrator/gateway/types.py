"""What are the values the router of a gateway takes in and gives out?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from instance.messages import MAX_SPAN_S, FleetMessage, OutputEntry, Submit
from migration.types import Epoch, InstanceId, RequestId
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.relay import Owner
from orchestrator.policy.admission import NO_ASKS, Asks
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.slo import Wanted


@dataclass(frozen=True, slots=True)
class RouterParams:
    dispatch: DispatchParams = field(default_factory=DispatchParams)
    max_waiting: int = 4096
    max_retries_per_tick: int = 64
    max_lost: int = 1024
    """Ended incarnations remembered, whose late messages are dropped."""
    dispatch_timeout_s: float = 5.0
    """How long a request may wait here before it fails with BUSY or NOBODY."""
    unanswered_for_s: float = 10.0
    """A submission that was neither answered nor gave a token for so long is taken back and made anew."""
    unanswered_though_seen_for_s: float = 120.0
    """The same where the instance says it has it: the answer waits for the running step, or it was lost."""
    max_attempts: int = 5
    silent_after_s: float = 10.0
    """A member that says nothing for so long has lost its requests."""
    orphan_grace_s: float = 0.5
    """A request whose owner is gone may just have moved: the news has this long to arrive."""
    suspect_for_s: float = 60.0
    """When a member dies, any request may just have moved there, unheard: silent for so long, it counts as lost."""
    gap_timeout_s: float = 10.0
    missing_after_s: float = 10.0
    """A request of which no word came between two looks so far apart is looked for at the instances."""
    subscribe_every_s: float = 1.0
    subscribe_lease_s: float = 5.0
    max_reports_per_s: float = 4_000.0
    """Load reports of all members together that come without output: from 400 members on each sends fewer. Reports
    that come with output are not limited, and what is sent to a member counts here at once."""
    max_report_interval_s: float = 0.25
    """However many members there are; less than the least age at which reports can be told not to be believed."""

    def report_interval_s(self, num_members: int) -> float:
        """Between two reports of one member."""
        return min(self.max_report_interval_s, num_members / self.max_reports_per_s)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as vLLM's front end hands it over."""

    request_id: RequestId
    external_id: str
    priority: int
    num_prompt_tokens: int
    max_tokens: int
    payload: bytes
    payload_as: Callable[[RequestId], bytes]
    """The same request under another id: a second attempt gets one of its own."""
    asks: Asks = NO_ASKS
    prefix: tuple[int, ...] = ()
    """Hashes of the prompt's first full blocks (`orchestrator/gateway/prefixes.py`)."""


@dataclass(frozen=True, slots=True)
class Send:
    address: str
    message: FleetMessage


@dataclass(frozen=True, slots=True)
class Forget:
    """Close the connection to a dead peer."""

    address: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Output for the clients, in order."""

    sender: Owner
    entries: tuple[OutputEntry, ...]
    sent_s: float


@dataclass(frozen=True, slots=True)
class Fail:
    request_id: RequestId
    failure: Failure


Effect = Send | Forget | Deliver | Fail


@dataclass(slots=True)
class Flight:
    """A request on its way, as the router keeps it."""

    request: Outgoing
    arrival: int
    unplaced_since_s: float
    """Since when it looks for an instance."""
    wire_id: RequestId
    """Its id at the instances; the keys of the router and the relay."""
    attempt: int = 1
    refused_by: set[InstanceId] = field(default_factory=set)
    last_refusal: str = ""
    sequence: int = 0
    sent_s: float = 0.0
    arrived_s: float = 0.0
    """When its client asked, however often it has started anew."""
    output: tuple[int, ...] = ()
    """What was delivered before this attempt: it goes on after that."""

    def wanted(self, now_s: float) -> Wanted | None:
        """None: it has no targets."""
        targets = self.request.asks.targets
        return Wanted(self.request.num_prompt_tokens, targets.after(now_s - self.arrived_s)) if targets else None

    def as_client_knows_it(self, entry: OutputEntry) -> OutputEntry:
        """Output under the id the client has asked with."""
        return entry if self.attempt == 1 else msgspec.structs.replace(entry, request_id=self.request.request_id)

    def submission(self, gateway_address: str, epoch: Epoch) -> Submit:
        """What is sent to an instance of that epoch."""
        request, targets = self.request, self.request.asks.targets
        return Submit(
            request_id=self.wire_id,
            external_id=request.external_id,
            gateway_address=gateway_address,
            epoch=epoch,
            sequence=self.sequence,
            priority=request.priority,
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            payload=request.payload if self.attempt == 1 else request.payload_as(self.wire_id),
            ttft_s=targets.ttft_s,
            tpot_s=targets.tpot_s,
            waited_s=min(MAX_SPAN_S, max(0.0, round(self.sent_s - self.arrived_s, 3))),
            output_token_ids=self.output,
        )


@dataclass(slots=True)
class RouterCounts:
    dispatched: int = 0
    refused: int = 0
    redispatched: int = 0
    """Sent again: an instance died, or never answered."""
    revived: int = 0
    """Of these, with output: they went on after it elsewhere."""
    moved: int = 0
    """Requests that changed hands."""
    failed: dict[FailureKind, int] = field(default_factory=lambda: dict.fromkeys(FailureKind, 0))
