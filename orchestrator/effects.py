"""What can the orchestrator's core ask of its shell? Every effect, as an imperative; failures come back as events."""

from __future__ import annotations

from dataclasses import dataclass

from instance.lifecycle import State
from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.errors import RefusalKind
from orchestrator.events import ChangeNumber, MigrationNumber, PolicyValue, Token
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.levels import Level, Levels
from orchestrator.state import CoreParams, MigrationRecord, ScalingSnapshot


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
class SetPriority:
    """Have the owner of a request change its priority; the shell answers with one `PriorityAnswered`."""

    number: ChangeNumber
    request_id: RequestId
    owner: Incarnation
    priority: int
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
    num_gateways: int
    """That dispatch to them: each reckons with what the others send between two reports."""
    dispatch: DispatchParams
    reason: str


@dataclass(frozen=True, slots=True)
class UpdatePriorities:
    """Tell every gateway the levels, and the classes of API keys; before it hears who is there."""

    levels: Levels
    key_classes: tuple[tuple[str, int], ...]
    """(SHA-256 of an API key in hexadecimal, priority of its class)"""
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
class EndRequest:
    """Have the gateway that holds its stream end this request, or, when none does, the instances; the shell answers
    with one `RequestCancelled`."""

    token: Token
    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class WithdrawMigration:
    """Tell the source to give this migration up unless its commit was sent; the shell answers with one
    `MigrationWithdrawn`, the migration itself with its `MigrationEnded`."""

    token: Token
    number: MigrationNumber
    request_id: RequestId
    source: Incarnation
    reason: str


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


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The request was ended by command; both as they were last reported."""

    instance: InstanceId
    request: RequestLoad


@dataclass(frozen=True, slots=True)
class Violation:
    """Why one value of a policy cannot be."""

    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyRefused:
    """Nothing was changed."""

    violations: tuple[Violation, ...]


@dataclass(frozen=True, slots=True)
class PolicyUpdated:
    """The policy as it is now (or would be), and what of it is new: (path, before, after)."""

    params: CoreParams
    etag: str
    changes: tuple[tuple[str, PolicyValue, PolicyValue], ...]
    validate_only: bool


@dataclass(frozen=True, slots=True)
class Reprioritised:
    """A request has another priority now."""

    request_id: RequestId
    instance: InstanceId
    previous: int
    priority: int
    change: str
    """Both by name, such as `normal (0) -> high (-10)`."""
    status: str
    """Where it stood at that moment: running, waiting or preempted."""
    effect: str
    """What follows from it, in words."""


@dataclass(frozen=True, slots=True)
class KeyClassSet:
    """The class an API key had and has now (or would); None: none."""

    key_sha256: str
    previous: int | None
    priority: int | None
    change: str
    """Both by level, such as `key sha256:0a1b... normal (0) -> high (-10)`."""
    etag: str
    validate_only: bool


@dataclass(frozen=True, slots=True)
class LevelSet:
    """A level as it was, and as it is now (or would be)."""

    previous: Level
    level: Level
    change: str
    etag: str
    validate_only: bool


Result = (
    Refused
    | DrainAccepted
    | Drained
    | Undrained
    | MigrationFinished
    | RequestEnded
    | PolicyRefused
    | PolicyUpdated
    | Reprioritised
    | KeyClassSet
    | LevelSet
    | ScalingSet
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the caller that waits under this token."""

    token: Token
    result: Result


Effect = (
    StartMigration
    | SetDraining
    | SetPriority
    | UpdateMembers
    | UpdatePriorities
    | FenceInstance
    | StartInstance
    | StopInstance
    | AnnounceScaling
    | EndRequest
    | WithdrawMigration
    | Answer
)
