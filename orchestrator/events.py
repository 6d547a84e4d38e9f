"""What can the orchestrator's core be told? Every event, in the past tense, with all the core needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from instance.messages import LoadReport, RequestReport
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.errors import RefusalKind

Token = NewType("Token", int)
"""Names one waiting caller of the shell; the core answers it exactly once."""

MigrationNumber = NewType("MigrationNumber", int)
"""The orchestrator's own count of the migrations it started, from 1."""

ChangeNumber = NewType("ChangeNumber", int)
"""The orchestrator's own count of the changes of priority, from 1."""


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
class CancelRequested:
    """End a running request, wherever it is."""

    token: Token
    reference: str
    """As in `MigrateRequested`."""
    validate_only: bool = False
    """True: say what would end, and end nothing."""


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """An `EndRequest` was carried out (`error` is None), or whether it was is unknown."""

    token: Token
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CancelMigrationRequested:
    token: Token
    number: MigrationNumber


@dataclass(frozen=True, slots=True)
class MigrationWithdrawn:
    """A `WithdrawMigration` reached the source (`error` is None), or whether it did is unknown."""

    token: Token
    error: str | None = None


PolicyValue = bool | int | float


@dataclass(frozen=True, slots=True)
class PolicyUpdateRequested:
    """Change parameters of the policies: all of these, or none."""

    token: Token
    changes: tuple[tuple[str, PolicyValue | None], ...]
    """(path, new value); None: back to what it was at the start. See `orchestrator.tuning`."""
    etag: str = ""
    """When given, the policy must have it still."""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class PriorityRequested:
    """Somebody wants a request to be more, or less, urgent."""

    token: Token
    reference: str
    """As in `MigrateRequested`."""
    level: str
    """A level's name, or a number."""
    asked_by: str
    """The way it came, such as `admin API SetRequestPriority`; never a secret."""


@dataclass(frozen=True, slots=True)
class PriorityAnswered:
    """Exactly one for each `SetPriority`: the instance's answer, or why there is none."""

    number: ChangeNumber
    answer: PriorityAnswer | None
    failure: RefusalKind = RefusalKind.UNAVAILABLE
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KeyClassRequested:
    """Give an API key another class, or none."""

    token: Token
    key_sha256: str
    """Of the key, 64 hexadecimal digits in lower case; the key itself is nowhere."""
    level: str | None
    """A level's name, or a number; None: no class any more."""
    asked_by: str
    """As in `PriorityRequested`."""
    etag: str = ""
    """When given, the priorities must have it still."""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class LevelRequested:
    """Change the rank or the headroom of a level, or both; None leaves it as it is."""

    token: Token
    name: str
    rank: int | None
    headroom_blocks: int | None
    asked_by: str
    etag: str = ""
    validate_only: bool = False


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
    | CancelRequested
    | RequestCancelled
    | CancelMigrationRequested
    | MigrationWithdrawn
    | PolicyUpdateRequested
    | PriorityRequested
    | PriorityAnswered
    | KeyClassRequested
    | LevelRequested
    | WaiterGone
)
