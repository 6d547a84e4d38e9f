"""What can the orchestrator's core ask of its shell? Every effect, as an imperative; failures come back as events."""

from __future__ import annotations

from dataclasses import dataclass

from instance.lifecycle import State
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.errors import RefusalKind
from orchestrator.events import MigrationNumber, Token
from orchestrator.state import MigrationRecord, ScalingSnapshot


@dataclass(frozen=True, slots=True)
class StartMigration:
    """Have the source move one request; the shell answers with one `MigrationEnded`, whatever happens."""

    number: MigrationNumber
    request_id: RequestId
    source: Incarnation
    destination: Incarnation
    mode: str
    reason: str
    signal_age_s: float
    """Age of the oldest report the decision rests on."""


@dataclass(frozen=True, slots=True)
class SetDraining:
    """Tell the instance to refuse (or to take) new work; the shell answers with one `DrainingSet`."""

    instance: InstanceId
    epoch: Epoch
    draining: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Member:
    """One live instance, as gateways must know it."""

    incarnation: Incarnation
    actor_name: str
    state: State


@dataclass(frozen=True, slots=True)
class UpdateMembers:
    """Tell every gateway who is there; whoever is missing is gone."""

    members: tuple[Member, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class FenceInstance:
    """Tell the peers that this incarnation is over: migrations with it end, its late messages count for nothing."""

    instance: InstanceId
    epoch: Epoch
    peers: tuple[InstanceId, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StartInstance:
    """Start an instance; the shell answers with one `InstanceStarted` or one `InstanceStartFailed`, in bounded time."""

    instance: InstanceId
    epoch: Epoch
    reason: str
    signal_age_s: float
    """Age of the oldest report the decision rests on; 0 when it was somebody's word."""


@dataclass(frozen=True, slots=True)
class StopInstance:
    """End the process of this incarnation, whether it is there or not; its end comes back as `InstanceLost`."""

    instance: InstanceId
    epoch: Epoch
    reason: str
    signal_age_s: float


@dataclass(frozen=True, slots=True)
class AnnounceScaling:
    """Log a decision on the number of instances; nothing else is to be done for it."""

    target: int
    instance: InstanceId | None
    """The one it is about; None: the target itself."""
    reason: str
    signal_age_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    kind: RefusalKind
    reason: str


@dataclass(frozen=True, slots=True)
class DrainAccepted:
    instance: InstanceId
    num_requests: int


@dataclass(frozen=True, slots=True)
class Drained:
    """The instance is empty."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Undrained:
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class MigrationFinished:
    record: MigrationRecord


@dataclass(frozen=True, slots=True)
class ScalingSet:
    """What holds from now on."""

    scaling: ScalingSnapshot


Result = Refused | DrainAccepted | Drained | Undrained | MigrationFinished | ScalingSet


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the caller that waits under this token."""

    token: Token
    result: Result


Effect = (
    StartMigration
    | SetDraining
    | UpdateMembers
    | FenceInstance
    | StartInstance
    | StopInstance
    | AnnounceScaling
    | Answer
)
