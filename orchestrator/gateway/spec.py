"""What must a gateway be told to start, and who are its members? (msgspec JSON between Ray actors.)"""

from __future__ import annotations

import msgspec

from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.levels import DEFAULT_LEVELS, Level


class GatewayConfig(msgspec.Struct, frozen=True):
    """One gateway to start."""

    argv: tuple[str, ...]
    """`vllm serve` arguments, the model first, exactly as a user would write them; host and port come from below."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free port."""
    gateway: str = "gateway-0"
    reuse_port: bool = False
    """True: other gateways of this fleet listen on the same port (SO_REUSEPORT)."""
    inbox_host: str = "127.0.0.1"
    """Address the inbox binds to and instances reach it at."""
    dispatch_timeout_s: float = 5.0
    """How long a request waits here while every instance refuses it."""
    priority_levels: str = DEFAULT_LEVELS
    key_priorities: tuple[tuple[str, int], ...] = ()
    """(SHA-256 of an API key in hexadecimal, priority of its class)."""
    slo_classes: str = ""
    """`NAME=TTFT_MS/TPOT_MS,...` (`orchestrator.policy.slo.parse_classes`)."""
    token: str = ""
    """Shared secret of the fleet, as the instances have it; never empty, never logged."""


class PrioritiesNow(msgspec.Struct, frozen=True):
    """How urgent requests may be, from now on."""

    levels: tuple[Level, ...]
    key_classes: tuple[tuple[str, int], ...]
    """(SHA-256 of an API key in hexadecimal, priority of its class)."""


class Member(msgspec.Struct, frozen=True):
    """One instance a gateway may use."""

    instance: str
    epoch: int
    address: str
    """Where its inbox listens."""
    actor_name: str = ""
    """Its Ray actor, whose end is its death notice; empty: nobody gives one, its silence must do."""
    state: str = "serving"
    """As the orchestrator last knew; the instance's own reports are what counts."""


class Membership(msgspec.Struct, frozen=True):
    """Whom a gateway may use, and who else does."""

    members: tuple[Member, ...]
    num_gateways: int
    """That dispatch to them, this one too."""
    dispatch: DispatchParams = DispatchParams()
    """How an instance is chosen."""


class GatewayStarted(msgspec.Struct, frozen=True):
    """What the actor's `start` returns."""

    gateway: str
    address: str
    """Where its inbox listens."""
    url: str
    """`http://host:port`."""
