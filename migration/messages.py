"""What do source and destination say to each other? All control messages of the migration protocol, in one place.

Values only. `migration_id` routes a message to its machine; `request_id` names what is moved. Encoding: `wire.py`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_COUNT = 2**31 - 1
MAX_ID_CHARS = 256
"""Ids are remembered and logged."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
"""Of tokens, blocks or preemptions. What a peer gone mad says is malformed here, before it is reckoned with."""
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
"""Neither negative nor NaN, which no timer takes."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    migration_id: Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]


class Reserve(_Message, frozen=True, tag=True):
    """Source -> destination: may this request come to you?"""

    request_id: str
    source_instance: str
    source_epoch: int
    source_address: str
    destination_epoch: int
    """The epoch the source believes the destination has; another one refuses."""
    payload: bytes
    settled_tokens: Count
    kv_fingerprint: str
    block_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
    num_preemptions: Count
    lease_s: Seconds
    """The reservation ends by itself this long after the last message of the source."""


class Reserved(_Message, frozen=True, tag=True):
    """Destination -> source: blocks are held; push to these endpoints (one a rank)."""

    num_cached_tokens: Count
    num_blocks: Count
    endpoints: tuple[str, ...]


class Refused(_Message, frozen=True, tag=True):
    """Destination -> source: no, and why. Final for this migration: nothing is held (any more)."""

    reason: str


class Grow(_Message, frozen=True, tag=True):
    """Source -> destination: hold blocks for this many tokens."""

    num_tokens: Count


class Grown(_Message, frozen=True, tag=True):
    """Destination -> source: so many blocks are held now."""

    num_blocks: Count


class Prepare(_Message, frozen=True, tag=True):
    """Source -> destination: tell me when a commit could be served at once (grammar compiled, adapter loaded)."""


class Prepared(_Message, frozen=True, tag=True):
    """Destination -> source: a commit can be served at once."""


class Commit(_Message, frozen=True, tag=True):
    """Source -> destination: all blocks have landed, here is the rest; you own it from now. Idempotent: send until
    answered.
    """

    state: bytes


class Committed(_Message, frozen=True, tag=True):
    """Destination -> source: I own it (repeated to every repetition of `Commit`)."""


class Cancel(_Message, frozen=True, tag=True):
    """Source -> destination: give the blocks back. Never sent once a `Commit` may have been seen."""

    outcome: str
    """The `Outcome` at the source, so that both ends count the same."""


class Cancelled(_Message, frozen=True, tag=True):
    """Destination -> source: nothing is held for this migration."""


ToDestination = Reserve | Grow | Prepare | Commit | Cancel
ToSource = Reserved | Refused | Grown | Prepared | Committed | Cancelled
Message = Reserve | Reserved | Refused | Grow | Grown | Prepare | Prepared | Commit | Committed | Cancel | Cancelled
