"""What can the orchestrator's core be told? Every event, in the past tense, with all the core needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from instance.messages import LoadReport, RequestReport
from migration.types import Epoch, Incarnation, InstanceId, Outcome

Token = NewType("Token", int)
"""Names one waiting caller of the shell; the core answers it exactly once."""

MigrationNumber = NewType("MigrationNumber", int)
"""The orchestrator's own count of the migrations it started, from 1."""


@dataclass(frozen=True, slots=True)
class InstanceStarted:
    """An instance serves; a higher epoch replaces the instance of that name."""

    incarnation: Incarnation
    actor_name: str
    model: str
    block_size: int
    total_blocks: int
    process_id: int = 0
    """0: unknown."""


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """The process of this incarnation is gone, or it was declared dead."""

    instance: InstanceId
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class GatewayStarted:
    gateway: str
    actor_name: str
    url: str
    process_id: int = 0


@dataclass(frozen=True, slots=True)
class GatewayLost:
    gateway: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReportReceived:
    report: LoadReport


@dataclass(frozen=True, slots=True)
class RequestsReceived:
    report: RequestReport


@dataclass(frozen=True, slots=True)
class MigrationFigures:
    """What a migration did, as its source reports it."""

    cached_tokens: int = 0
    moved_tokens: int = 0
    num_stages: int = 0
    copied_blocks: int = 0
    tail_blocks: int = 0
    num_bytes: int = 0
    duration_s: float = 0.0
    stopped_s: float = 0.0
    steps_during_copy: int = 0


@dataclass(frozen=True, slots=True)
class MigrationEnded:
    """Exactly one for each `StartMigration`, also when the source is dead or never answered."""

    number: MigrationNumber
    outcome: Outcome
    reason: str
    figures: MigrationFigures


@dataclass(frozen=True, slots=True)
class DrainingSet:
    """A `SetDraining` was carried out (`error` is None) or failed."""

    instance: InstanceId
    epoch: Epoch
    draining: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time to look for moves."""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    token: Token
    instance: InstanceId
    wait: bool
    """True: the answer comes when the instance is empty."""


@dataclass(frozen=True, slots=True)
class UndrainRequested:
    token: Token
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class MigrateRequested:
    token: Token
    reference: str
    """The engine's request id, the client's id, or a prefix of either that fits one request only."""
    destination: InstanceId
    mode: str = "live"


@dataclass(frozen=True, slots=True)
class InstanceStartFailed:
    """A `StartInstance` did not end with a serving instance; nothing of it is left running."""

    instance: InstanceId
    epoch: Epoch
    error: str


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """Change what is given; None leaves a setting as it is."""

    token: Token
    target: int | None = None
    fewest: int | None = None
    most: int | None = None
    is_automatic: bool | None = None


@dataclass(frozen=True, slots=True)
class WaiterGone:
    """The caller no longer waits; its token must not be answered."""

    token: Token


Event = (
    InstanceStarted
    | InstanceLost
    | GatewayStarted
    | GatewayLost
    | ReportReceived
    | RequestsReceived
    | MigrationEnded
    | DrainingSet
    | Ticked
    | DrainRequested
    | UndrainRequested
    | MigrateRequested
    | InstanceStartFailed
    | ScaleRequested
    | WaiterGone
)
