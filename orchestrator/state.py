"""What does the orchestrator remember? Records of instances, gateways and migrations, and a frozen snapshot of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from instance.lifecycle import State
from instance.messages import LoadReport, RequestLoad
from migration.types import Epoch, Incarnation, InstanceId, Outcome, RequestId
from orchestrator.events import MigrationFigures, MigrationNumber, Token
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.drain import DrainParams
from orchestrator.policy.levels import DEFAULT_LEVELS, Levels, parse_levels
from orchestrator.policy.moves import smooth_copy_time
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.policy.targets import NOTHING_WANTED, Tightest, tightest_of


@dataclass(frozen=True, slots=True)
class ScalingParams:
    """Every bound of starting and stopping instances; their number is `autoscale`'s or an operator's to say."""

    can_start: bool = False
    """False: the shell has nothing to start instances from, and scaling is refused."""
    fewest: int = 1
    most: int = 64
    """No target is outside; an operator may change both."""
    capacity: int = 64
    """Bound of `most`: instances there are places for."""
    is_automatic: bool = False
    autoscale: AutoscaleParams = field(default_factory=AutoscaleParams)
    first_epoch: int = 1
    """No incarnation started here has a lower one. Who replaces an orchestrator gives one that was never given yet."""
    max_starting: int = 2
    """Instances started at once."""
    start_timeout_s: float = 330.0
    """A start that was not answered for so long has failed; longer than the shell's own time-out."""
    backoff_s: float = 10.0
    """Pause after a start that failed; it doubles with each further one."""
    max_backoff_s: float = 300.0
    max_start_failures: int = 6
    """After so many in a row there is a try every `give_up_rest_s` only, until somebody scales by hand."""
    give_up_rest_s: float = 3600.0
    stable_after_s: float = 30.0
    """An instance lost sooner after its start counts as a start that failed."""
    max_abandoned: int = 256
    """Starts given up that are remembered, should they come after all."""
    max_retiring: int = 1
    """Instances emptied at once, to be stopped."""
    retire_timeout_s: float = 600.0
    """An instance that is not empty by then is put back into service: what runs there is not killed."""
    victim_rest_s: float = 120.0
    """Then it is left alone for so long."""
    linger_s: float = 2.0
    """An empty instance is stopped so long after it was empty: what was on its way to it is refused, not lost."""
    stop_retry_s: float = 15.0
    """An instance that has not ended so long after it was told to is told again."""


@dataclass(frozen=True, slots=True)
class CoreParams:
    """Every bound and threshold of the core."""

    rebalance: RebalanceParams = field(default_factory=RebalanceParams)
    drain: DrainParams = field(default_factory=DrainParams)
    dispatch: DispatchParams = field(default_factory=DispatchParams)
    """Gateways are told with their members."""
    levels: Levels = field(default_factory=lambda: parse_levels(DEFAULT_LEVELS))
    """Of priority; `rebalance.load` and `drain.load` are `levels.load_params`."""
    key_classes: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """Of API keys: (SHA-256 in hexadecimal, priority), by digest; gateways are told."""
    is_rebalancing: bool = True
    """False: requests move by command and by drain only."""
    max_migrations_out: int = 2
    """Migrations one instance sends at a time; no more than the instance itself allows."""
    max_migrations_in: int = 2
    stale_after_s: float = 1.5
    """A report older than this says nothing about where to move what."""
    max_instances: int = 256
    max_stopped: int = 64
    """Ended instances that `status` still shows."""
    max_gateways: int = 64
    max_history: int = 1000
    """Ended migrations remembered."""
    max_waiters: int = 256
    """Callers waiting for a drain or a migration."""
    max_resting: int = 16384
    """Requests and pairs remembered as resting."""
    scaling: ScalingParams = field(default_factory=ScalingParams)


@dataclass(slots=True)
class InstanceRecord:
    """One incarnation of an instance."""

    incarnation: Incarnation
    actor_name: str
    model: str
    block_size: int
    total_blocks: int
    process_id: int
    state: State = State.SERVING
    reason: str = ""
    load: LoadReport | None = None
    load_at_s: float = 0.0
    requests: tuple[RequestLoad, ...] = ()
    requests_at_s: float = 0.0
    tightest: Tightest = NOTHING_WANTED
    """Targets of its requests."""
    copy_s_per_block: float = 0.0
    """What a block takes that one of its migrations copies, smoothed; 0: it has sent nothing yet."""
    draining_set_at_s: float | None = None
    """When the instance confirmed that it takes nothing new; None: it has not (yet)."""
    drained: bool = False

    @property
    def instance(self) -> InstanceId:
        return self.incarnation.instance

    @property
    def epoch(self) -> Epoch:
        return self.incarnation.epoch

    def take_requests(self, requests: tuple[RequestLoad, ...], now_s: float) -> None:
        """Of a report."""
        self.requests, self.requests_at_s, self.tightest = requests, now_s, tightest_of(requests)

    def learn_copy_time(self, figures: MigrationFigures) -> None:
        """From a migration that left it and was committed."""
        num_blocks = figures.copied_blocks + figures.tail_blocks
        self.copy_s_per_block = smooth_copy_time(self.copy_s_per_block, num_blocks, figures.duration_s)


@dataclass(slots=True)
class GatewayRecord:
    gateway: str
    actor_name: str
    url: str
    process_id: int
    alive: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """One migration the orchestrator started; `outcome` is None while it is in flight."""

    number: MigrationNumber
    request_id: RequestId
    source: Incarnation
    destination: Incarnation
    mode: str
    cause: str
    priority: int
    num_blocks: int
    """Blocks the request held when the move was decided."""
    started_s: float
    token: Token | None = None
    """The caller who waits for its end."""
    outcome: Outcome | None = None
    reason: str = ""
    ended_s: float = 0.0
    figures: MigrationFigures = field(default_factory=MigrationFigures)


@dataclass(frozen=True, slots=True)
class InstanceSnapshot:
    incarnation: Incarnation
    model: str
    block_size: int
    total_blocks: int
    process_id: int
    state: State
    reason: str
    load: LoadReport | None
    report_age_s: float | None
    freeness_steps: float | None
    requests: tuple[RequestLoad, ...]
    requests_age_s: float
    drained: bool


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    gateway: str
    url: str
    process_id: int
    alive: bool


@dataclass(frozen=True, slots=True)
class ScalingSnapshot:
    """How many instances there should be, and what is being done about it."""

    target: int | None
    """None: nobody has said yet; what is there stays, and what is lost is not replaced."""
    fewest: int
    most: int
    is_automatic: bool
    num_present: int
    """Instances that count: serving, or drained by somebody's word."""
    starting: tuple[InstanceId, ...]
    retiring: tuple[InstanceId, ...]
    """Being emptied, or empty and being stopped."""
    mean_freeness_steps: float | None
    """The signal at the last look of autoscaling."""
    reason: str
    """Of the latest decision."""
    num_start_failures: int
    """In a row."""
    retry_in_s: float
    """Until the next start may be tried; 0: at once."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the orchestrator knows at `now_s`; instances and gateways by name, migrations the latest first."""

    now_s: float
    instances: tuple[InstanceSnapshot, ...]
    gateways: tuple[GatewaySnapshot, ...]
    migrations: tuple[MigrationRecord, ...]
    scaling: ScalingSnapshot | None = None
