"""What travels between gateways, instances and the orchestrator over their inboxes? Every fleet message, in one place.

Each process binds one inbox (ZeroMQ PULL) and pushes to the inboxes of others; every message is one-way and carries
what is needed to answer it. Values only, msgspec on the wire (`mailbox.encode`, `mailbox.decode`), never pickle.
Migration messages ride in `MigrationEnvelope`, encoded by `migration.wire`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from instance.headroom import Headroom

MAX_MESSAGE_BYTES = 64 << 20
"""Nothing larger is decoded: a prompt of a million tokens is about 5 MB."""

MAX_SPAN_S = 1e6
Span = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_SPAN_S)]
"""Seconds between two events of one request; a message with another number is not decoded."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> instance: run this request and send its tokens to `gateway_address`."""

    request_id: str
    external_id: str
    """The id the client knows (x-request-id); several requests may share one (n > 1)."""
    gateway_address: str
    epoch: int
    """The epoch the gateway believes the instance has; another one is refused."""
    sequence: int
    """Counts this gateway's submissions to this instance, from 1 (dispatch-time accounting)."""
    priority: int
    num_prompt_tokens: int
    max_tokens: int
    payload: bytes
    """The engine's own encoding of the request (`instance.vllm.codec`)."""
    ttft_s: Span | None = None
    """Target: from its arrival at the gateway to its first token. None: it has none."""
    tpot_s: Span | None = None
    """Target: mean time of each further token."""
    waited_s: Span = 0.0
    """Since its arrival at the gateway, when this was sent."""
    output_token_ids: tuple[int, ...] = ()
    """What it has put out so far, where its last owner is gone: it goes on after that."""


class SubmitAnswer(msgspec.Struct, frozen=True, tag=True):
    """Instance -> gateway: accepted (`refusal` is None), or refused: try another instance, or give up if `final`."""

    request_id: str
    instance: str
    epoch: int
    refusal: str | None = None
    final: bool = False
    """True: no instance of this kind can ever run it (it does not fit)."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> every instance that may own them: end these requests, wherever they are. Unknown ids are remembered
    for a while, so that a migration in flight cannot bring them back."""

    request_ids: tuple[str, ...]


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Gateway or orchestrator -> instance: send me your load reports until the lease runs out. Repeated to renew."""

    address: str
    lease_s: Annotated[float, msgspec.Meta(ge=0.0)]
    with_requests: bool = False
    """True: also send `RequestReport`s."""
    cached_from: int | None = None
    """Also send `CachedBlocks`: the subscriber knows all changes before this one; ALL_CACHED: it knows nothing.
    None: it wants none."""
    headroom: Headroom | None = None
    """Of the fleet's levels of priority, from now on. None: this subscriber has no say in it."""
    interval_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Reports need come no more often than that. 0: as often as they are made."""


ALL_CACHED = -1


class CachedBlocks(msgspec.Struct, frozen=True, tag=True):
    """Instance -> subscriber: which full KV blocks can be found in its prefix cache now, by hash; what has changed.

    An instance counts the changes of its cache from 0. Where `begin` is ALL_CACHED, `added` is all that is cached (the
    latest, as many as one message holds) and replaces what was known. Otherwise the message has the state after change
    `end` of every hash that changes `begin` to `end` touched: for who knows all before `begin`, or more of them. Who
    knows more than all before `end` has nothing to learn from it: it is late.
    """

    instance: str
    epoch: int
    block_size: int
    """Tokens of a block that is hashed."""
    begin: int
    end: int
    """Changes counted in this message, half open: the next one's `begin`."""
    added: bytes
    """HASH_BYTES each: the last bytes of vLLM's block hash, which chains over the whole prefix."""
    removed: bytes = b""


HASH_BYTES = 8


class OutputEntry(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one request."""

    request_id: str
    offset: int
    """Number of output tokens of the request before `token_ids`."""
    token_ids: tuple[int, ...]
    finish_reason: int | None = None
    """vLLM's FinishReason value; None while it runs."""
    stop_reason: int | str | None = None
    extra: tuple[bytes, ...] = ()
    """The engine's full encoding of the output when it holds more than tokens and the finish (logprobs ...)."""


class StepTotals(msgspec.Struct, frozen=True, array_like=True):
    """What all steps of this incarnation have computed, and how long they took: sums that only grow.

    The difference of two reports is what lies between them, whichever reports were lost in between.
    """

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_wide_tokens: int = 0
    """Tokens of a step beyond WIDE_STEP_TOKENS."""
    num_decoding: int = 0
    num_context_tokens: int = 0
    num_attended_pairs: int = 0
    busy_s: float = 0.0
    """Time in steps that computed something."""


WIDE_STEP_TOKENS = 256
"""Beyond about so many tokens a step's matrix products wait for arithmetic and no longer for the weights (120 to 332 in
fits of published GPU profiles, one at 1,196)."""


NO_STEPS = StepTotals()


class LoadReport(msgspec.Struct, frozen=True, tag=True):
    """An instance's load at a step boundary; all sizes in KV blocks of `block_size` tokens."""

    instance: str
    epoch: int
    step: int
    """Steps the engine has run; a higher one is newer."""
    state: str
    """`instance.lifecycle.State` value."""
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    total_blocks: int
    free_blocks: int
    """Free or only cached: can be given to a request at once. Reserved blocks are not free."""
    reserved_blocks: int
    """Held for migrations coming in."""
    num_running: int
    num_waiting: int
    running_by_priority: tuple[tuple[int, int], ...]
    """(priority, number of running requests)."""
    head_of_line_blocks: int
    """Full demand of the first waiting request (0: none waits)."""
    waiting_blocks: int
    """Full demand of all waiting requests."""
    step_time_s: float
    """Smoothed time of a step that decoded; 0.0 before the first."""
    num_preemptions: int
    migrations_in: int
    migrations_out: int
    submits_seen: int = 0
    """Highest `Submit.sequence` seen from the gateway this report goes to."""
    steps: StepTotals = NO_STEPS
    max_step_tokens: int = 0
    """Most tokens a step computes; 0: not told."""
    max_running: int = 0
    """Most requests that run at once; 0: not told."""


class Frame(msgspec.Struct, frozen=True, tag=True):
    """Instance -> gateway: what one engine step gave the requests of this gateway, and the instance's load."""

    instance: str
    epoch: int
    step: int
    sent_s: float
    """time.monotonic() of the sender's machine when the step ended."""
    entries: tuple[OutputEntry, ...]
    load: LoadReport


class RequestLoad(msgspec.Struct, frozen=True, array_like=True):
    """One request as the instance sees it."""

    request_id: str
    external_id: str
    status: str
    """running | waiting | preempted | migrating_out"""
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_blocks: int
    arrived_s: float
    """Seconds since it arrived at this instance."""
    movable: bool
    """False: it cannot be migrated (now or ever)."""
    ttft_s: float | None = None
    """Its targets, as in `Submit`."""
    tpot_s: float | None = None
    waited_s: float = 0.0
    """Since its arrival at the gateway, when it came to this instance: with `arrived_s` all its life, by which queues
    are in order. It does not change here, so that a journal says it once."""


class RequestReport(msgspec.Struct, frozen=True, tag=True):
    """Instance -> orchestrator, or a gateway that misses one: every request it owns (every 250 ms at most, bounded to
    the first 4,096)."""

    instance: str
    epoch: int
    step: int
    requests: tuple[RequestLoad, ...]


class OwnerChanged(msgspec.Struct, frozen=True, tag=True):
    """Destination -> gateway, at commit: this request is mine now; my first token has this offset."""

    request_id: str
    instance: str
    epoch: int
    offset: int


class PriorityChanged(msgspec.Struct, frozen=True, tag=True):
    """Instance -> gateway: this request's priority is another now; what is dispatched anew for it takes it along."""

    request_id: str
    instance: str
    epoch: int
    priority: int


class MigrationEnvelope(msgspec.Struct, frozen=True, tag=True):
    """Instance -> instance: one message of the migration protocol."""

    from_instance: str
    from_epoch: int
    from_address: str
    to_epoch: int
    """The epoch the sender believes the receiver has; another one is dropped."""
    body: bytes


FleetMessage = (
    Submit
    | SubmitAnswer
    | Abort
    | Subscribe
    | LoadReport
    | Frame
    | RequestReport
    | CachedBlocks
    | OwnerChanged
    | PriorityChanged
    | MigrationEnvelope
)
