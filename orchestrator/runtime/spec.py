"""What crosses Ray between the starting process, the orchestrator and the gateways? (msgspec JSON.)"""

from __future__ import annotations

import msgspec

from instance.spec import InstanceSpec
from orchestrator.access import ServerAccess
from orchestrator.policy.dispatch import Rule
from orchestrator.policy.levels import DEFAULT_LEVELS


class InstanceSeat(msgspec.Struct, frozen=True):
    """An instance that has started, and how to reach its actor."""

    instance: str
    epoch: int
    address: str
    actor_name: str
    model: str
    block_size: int
    total_blocks: int
    process_id: int = 0


class GatewaySeat(msgspec.Struct, frozen=True):
    """A gateway that has started, and how to reach its actor."""

    gateway: str
    actor_name: str
    url: str
    process_id: int = 0


class ScalingSpec(msgspec.Struct, frozen=True):
    """What the orchestrator needs to start further instances, and between which limits."""

    template: InstanceSpec
    """Of every instance; name and epoch are filled in."""
    num_gpus: float = 0.0
    custom_resources: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    is_spread: bool = False
    start_timeout_s: float = 300.0
    fewest: int = 1
    most: int = 1
    first_epoch: int = 2
    """Higher than that of any instance there ever was in this cluster."""
    is_automatic: bool = False
    low_steps: float = 160.0
    high_steps: float = 960.0
    period_s: float = 10.0
    cooldown_s: float = 60.0
    retire_timeout_s: float = 600.0


class OrchestratorSpec(msgspec.Struct, frozen=True):
    """What the orchestrator's actor needs to start."""

    host: str
    """Where the inbox listens."""
    admin_port: int
    """0: any free one."""
    admin_host: str = "127.0.0.1"
    admin_access: ServerAccess = ServerAccess()
    """Token and key are secret; never logged."""
    instances: tuple[InstanceSeat, ...] = ()
    gateways: tuple[GatewaySeat, ...] = ()
    tick_s: float = 0.5
    dispatch: Rule = Rule.FREENESS
    rebalance: bool = True
    threshold_steps: float = 512.0
    margin_steps: float = 64.0
    rest_s: float = 1.0
    max_migrations: int = 2
    """In and out per instance."""
    priority_levels: str = DEFAULT_LEVELS
    key_priorities: tuple[tuple[str, int], ...] = ()
    """(SHA-256 of an API key in hexadecimal, priority of its class), as gateways are started with."""
    migrate_timeout_s: float = 3600.0
    journal: str = ""
    """File of events and decisions; none when empty."""
    journal_part_bytes: int = 32 << 20
    journal_parts: int = 4
    log_level: str = "INFO"
    token: str = ""
    """Shared secret of the fleet, as the instances have it; never empty, never logged."""
    scaling: ScalingSpec | None = None
    """None: the number of instances stays as it is."""


EPOCHS_OF_A_LIFE = 1 << 24
"""So many epochs one orchestrator may give to the instances that it starts."""


def successor(spec: OrchestratorSpec, *, rebalance: bool, dispatch: Rule | None = None) -> OrchestratorSpec:
    """Of an orchestrator that takes over from one that was started with `spec`, and steers like this; `dispatch` None:
    as that one was told to. It gives no epoch that the other one may have given."""
    scaling = spec.scaling
    if scaling is not None:
        scaling = msgspec.structs.replace(scaling, first_epoch=scaling.first_epoch + EPOCHS_OF_A_LIFE)
    rule = spec.dispatch if dispatch is None else dispatch
    return msgspec.structs.replace(spec, rebalance=rebalance, dispatch=rule, scaling=scaling)


class OrchestratorStarted(msgspec.Struct, frozen=True):
    admin_address: str
    process_id: int
