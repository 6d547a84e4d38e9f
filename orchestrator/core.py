"""What should happen now? The orchestrator's pure core: events in, effects out; no clock, no I/O, everything bounded.

Its picture of the cluster is made of reports, so it may be wrong: instances refuse what does not fit the truth, and
that comes back as an ordinary event. Commands are answered exactly once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import assert_never

from instance.lifecycle import State
from migration.types import Epoch, InstanceId, Outcome, RequestId
from orchestrator import integrity, priority_classes, view
from orchestrator.attaining import Attaining
from orchestrator.cancelling import Cancellations
from orchestrator.effects import (
    Answer,
    DrainAccepted,
    Drained,
    Effect,
    FenceInstance,
    MigrationFinished,
    Refused,
    SetDraining,
    StartMigration,
    Undrained,
    UpdateMembers,
)
from orchestrator.errors import LimitExceeded, RefusalKind
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    DrainingSet,
    DrainRequested,
    Event,
    GatewayLost,
    GatewayStarted,
    InstanceLost,
    InstanceStarted,
    InstanceStartFailed,
    KeyClassRequested,
    LevelRequested,
    MigrateRequested,
    MigrationEnded,
    MigrationNumber,
    MigrationWithdrawn,
    PolicyUpdateRequested,
    PriorityAnswered,
    PriorityRequested,
    ReportReceived,
    RequestCancelled,
    RequestsReceived,
    ScaleRequested,
    Ticked,
    Token,
    UndrainRequested,
    WaiterGone,
)
from orchestrator.policy.drain import plan_drain
from orchestrator.policy.moves import InstanceView, Move
from orchestrator.policy.rebalance import Plan, Resting, plan_rebalance
from orchestrator.policy.requeue import plan_requeue
from orchestrator.reprioritising import Reprioritising
from orchestrator.resting import RestingPlace
from orchestrator.retiring import Drains
from orchestrator.scaling import Scaling
from orchestrator.state import CoreParams, GatewayRecord, InstanceRecord, MigrationRecord, Snapshot
from orchestrator.tuning import Policy, Tuning


class Orchestrator:
    """The core. One per cluster; `on` is its only way in, `snapshot` its only way out besides effects."""

    plans: tuple[Plan, ...] = (plan_requeue, plan_rebalance)  # what copies nothing comes first

    def __init__(self, params: CoreParams) -> None:
        self._params = params
        self._instances: dict[InstanceId, InstanceRecord] = {}
        self._stopped: deque[InstanceRecord] = deque(maxlen=params.max_stopped)
        self._gateways: dict[str, GatewayRecord] = {}
        self._in_flight: dict[MigrationNumber, MigrationRecord] = {}
        self._history: deque[MigrationRecord] = deque(maxlen=params.max_history)
        self._drain_waiters: dict[Token, InstanceId] = {}
        self._cancellations = Cancellations(params.max_waiters)
        self._tuning = Tuning(params)
        self._num_migrations = MigrationNumber(0)
        self._reprioritising = Reprioritising(params)
        self._request_rests: RestingPlace[RequestId] = RestingPlace(params.max_resting)
        self._drain_rests: RestingPlace[RequestId] = RestingPlace(params.max_resting)
        self._pair_rests: RestingPlace[tuple[InstanceId, InstanceId]] = RestingPlace(params.max_resting)
        self._scaling = Scaling(params.scaling, params.max_instances)
        self._attaining = Attaining()

    def on(self, event: Event, now_s: float) -> list[Effect]:  # noqa: PLR0911, PLR0912 - one case an event
        """Take one event in. Raises LimitExceeded, and changes nothing, when there are too many processes."""
        match event:
            case ReportReceived():
                return self._on_report(event, now_s)
            case RequestsReceived():
                return self._on_requests(event, now_s)
            case InstanceStarted():
                return self._on_instance_started(event, now_s)
            case InstanceLost():
                return self._on_instance_lost(event, now_s)
            case GatewayStarted():
                return self._on_gateway_started(event)
            case GatewayLost():
                return self._on_gateway_lost(event)
            case MigrationEnded():
                return self._on_migration_ended(event, now_s)
            case DrainingSet():
                return self._on_draining_set(event, now_s)
            case Ticked():
                return self._on_tick(now_s)
            case DrainRequested():
                return self._on_drain_requested(event)
            case UndrainRequested():
                return self._on_undrain_requested(event, now_s)
            case MigrateRequested():
                return self._on_migrate_requested(event, now_s)
            case InstanceStartFailed():
                return self._scaling.on_start_failed(event, now_s)
            case ScaleRequested():
                return self._scaling.on_requested(event, self._instances, now_s)
            case CancelRequested() | RequestCancelled() | CancelMigrationRequested() | MigrationWithdrawn():
                return self._cancellations.on(event, self._instances, self._in_flight, self._history)
            case PolicyUpdateRequested():
                before, (answer, self._params) = self._params, self._tuning.on(event, self._params)
                is_known = self._params.dispatch == before.dispatch
                return [answer] if is_known else [answer, self._update_members("the policy has changed")]
            case PriorityRequested():
                return self._reprioritising.on_requested(event, self._instances)
            case PriorityAnswered():
                known = [*self._history, *self._in_flight.values()]
                return self._reprioritising.on_answered(event, self._instances, known)
            case KeyClassRequested() | LevelRequested():
                return self._on_priorities_requested(event)
            case WaiterGone():
                return self._on_waiter_gone(event)
            case _:
                assert_never(event)

    def snapshot(self, now_s: float) -> Snapshot:
        """What is known now, frozen."""
        instances = [*self._stopped, *self._instances.values()]
        migrations = [*self._history, *self._in_flight.values()]
        params, scaling = self._params.rebalance.load, self._scaling.snapshot(self._instances, now_s)
        return view.snapshot(instances, list(self._gateways.values()), migrations, now_s, params, scaling)

    def policy(self) -> Policy:
        """The parameters by which it decides now."""
        return self._tuning.policy(self._params)

    def priorities(self) -> priority_classes.Priorities:
        """The levels, and the classes of API keys."""
        return priority_classes.priorities(self._params)

    # ------------------------------------------------------------------ who is there
    def _on_instance_started(self, event: InstanceStarted, now_s: float) -> list[Effect]:
        incarnation = event.incarnation
        if unwelcome := self._scaling.why_not_taken_in(incarnation):
            return [*unwelcome]
        known = self._instances.get(incarnation.instance)
        if known is not None and known.epoch >= incarnation.epoch:
            return []
        if known is None and len(self._instances) >= self._params.max_instances:
            raise LimitExceeded(f"{self._params.max_instances} instances are there already (max_instances)")
        effects: list[Effect] = []
        if known is not None:
            replaced = InstanceLost(known.instance, known.epoch, f"replaced by epoch {incarnation.epoch}")
            self._scaling.on_lost(replaced, now_s)
            effects += self._end_instance(known, replaced)
        self._instances[incarnation.instance] = InstanceRecord(
            incarnation, event.actor_name, event.model, event.block_size, event.total_blocks, event.process_id
        )
        self._scaling.on_started(incarnation, now_s)
        return [*effects, self._update_members(f"{incarnation.instance} started")]

    def _on_instance_lost(self, event: InstanceLost, now_s: float) -> list[Effect]:
        known = self._instances.get(event.instance)
        if known is None or known.epoch != event.epoch:
            return []
        self._scaling.on_lost(event, now_s)
        return [*self._end_instance(known, event), self._update_members(f"{event.instance} was lost: {event.reason}")]

    def _end_instance(self, record: InstanceRecord, event: InstanceLost) -> list[Effect]:
        """Forget it and fence it. Its migrations end by their own events: the shell reports each of them."""
        del self._instances[record.instance]
        record.state, record.reason = State.STOPPED, event.reason
        record.load, record.requests = None, ()
        self._stopped.append(record)
        lost = Refused(RefusalKind.OVERTAKEN, f"{record.instance} was lost: {event.reason}")
        fence = FenceInstance(record.instance, record.epoch, tuple(sorted(self._instances)), event.reason)
        return [fence, *self._answer_drain_waiters(record.instance, lost)]

    def _on_gateway_started(self, event: GatewayStarted) -> list[Effect]:
        if event.gateway not in self._gateways and len(self._gateways) >= self._params.max_gateways:
            raise LimitExceeded(f"{self._params.max_gateways} gateways are there already (max_gateways)")
        record = GatewayRecord(event.gateway, event.actor_name, event.url, event.process_id)
        self._gateways[event.gateway] = record
        reason = f"{event.gateway} started"
        return [priority_classes.told(self._params, reason), self._update_members(reason)]

    def _on_gateway_lost(self, event: GatewayLost) -> list[Effect]:
        record = self._gateways.get(event.gateway)
        if record is None or not record.alive:
            return []
        record.alive, record.reason = False, event.reason
        return [self._update_members(f"{event.gateway} was lost")]

    def _update_members(self, reason: str) -> UpdateMembers:
        instances, gateways = list(self._instances.values()), list(self._gateways.values())
        self._attaining.set_members(instances)
        return view.members(instances, gateways, self._params, reason)

    def _on_priorities_requested(self, event: KeyClassRequested | LevelRequested) -> list[Effect]:
        before = self._params
        effects, self._params = priority_classes.change_priorities(event, before)
        if self._params.levels == before.levels:
            return effects
        self._reprioritising.levels = self._params.levels
        self._scaling.set_load(self._params.levels.load_params)
        return [*effects[:-1], self._update_members("the levels have changed"), effects[-1]]

    # ------------------------------------------------------------------ what they say
    def _on_report(self, event: ReportReceived, now_s: float) -> list[Effect]:
        report = event.report
        record = self._current(InstanceId(report.instance), Epoch(report.epoch))
        if record is None or (record.load is not None and report.step < record.load.step):
            return []
        record.load, record.load_at_s = report, now_s
        self._attaining.on_report(report)
        return self._check_drained(record)

    def _on_requests(self, event: RequestsReceived, now_s: float) -> list[Effect]:
        record = self._current(InstanceId(event.report.instance), Epoch(event.report.epoch))
        if record is None:
            return []
        record.take_requests(event.report.requests, now_s)
        return self._check_drained(record)

    def _current(self, instance: InstanceId, epoch: Epoch) -> InstanceRecord | None:
        record = self._instances.get(instance)
        return record if record is not None and record.epoch == epoch else None

    def _check_drained(self, record: InstanceRecord) -> list[Effect]:
        """Answer the waiters once the instance has confirmed, and both reports say, that nothing is left."""
        if record.drained or not view.is_empty(record) or view.is_moving(record.instance, self._in_flight.values()):
            return []
        record.drained = True
        return self._answer_drain_waiters(record.instance, Drained(record.instance))

    # ------------------------------------------------------------------ drain
    def _on_drain_requested(self, event: DrainRequested) -> list[Effect]:
        record = self._instances.get(event.instance)
        refusal = view.why_not_drain(event, self._instances, len(self._drain_waiters), self._params)
        if refusal is not None or record is None:
            return [Answer(event.token, refusal or view.no_such_instance(event.instance, self._instances))]
        effects = self._begin_drain(record, "asked for") if record.state is not State.DRAINING else []
        if not event.wait:
            return [*effects, Answer(event.token, DrainAccepted(record.instance, len(record.requests)))]
        if record.drained:
            return [*effects, Answer(event.token, Drained(record.instance))]
        self._drain_waiters[event.token] = record.instance
        return effects

    def _begin_drain(self, record: InstanceRecord, reason: str) -> list[Effect]:
        record.state, record.drained, record.draining_set_at_s = State.DRAINING, False, None
        return [
            SetDraining(record.instance, record.epoch, True, reason),
            self._update_members(f"{record.instance} is draining"),
        ]

    def _end_drain(self, record: InstanceRecord, reason: str) -> list[Effect]:
        record.state, record.drained, record.draining_set_at_s = State.SERVING, False, None
        overtaken = Refused(RefusalKind.OVERTAKEN, f"{record.instance} was put back into service")
        return [
            SetDraining(record.instance, record.epoch, False, reason),
            self._update_members(f"{record.instance} serves again"),
            *self._answer_drain_waiters(record.instance, overtaken),
        ]

    def _on_undrain_requested(self, event: UndrainRequested, now_s: float) -> list[Effect]:
        record = self._instances.get(event.instance)
        if record is None:
            return [Answer(event.token, view.no_such_instance(event.instance, self._instances))]
        still_refuses = record.load is not None and record.load.state == State.DRAINING.value
        if record.state is not State.DRAINING and not still_refuses:
            refusal = Refused(RefusalKind.PRECONDITION, f"{event.instance} is not draining, it is {record.state.value}")
            return [Answer(event.token, refusal)]
        if self._scaling.is_stopping(record.instance):
            refusal = Refused(RefusalKind.PRECONDITION, f"{event.instance} is empty and being stopped")
            return [Answer(event.token, refusal)]
        self._scaling.on_undrained(record.instance, now_s)
        return [*self._end_drain(record, "asked for"), Answer(event.token, Undrained(record.instance))]

    def _on_draining_set(self, event: DrainingSet, now_s: float) -> list[Effect]:
        record = self._current(event.instance, event.epoch)
        if record is None or (record.state is State.DRAINING) is not event.draining:
            return []  # overtaken by another command, whose own confirmation will come
        if event.error is None:
            record.draining_set_at_s = now_s if event.draining else None
            return []
        if not event.draining:
            return []  # it goes on refusing; a later undrain tries again
        record.state, record.reason = State.SERVING, event.error
        refusal = Refused(RefusalKind.UNAVAILABLE, f"{event.instance} did not start draining: {event.error}")
        return [
            self._update_members(f"{event.instance} did not start draining"),
            *self._answer_drain_waiters(event.instance, refusal),
        ]

    def _answer_drain_waiters(self, instance: InstanceId, result: Drained | Refused) -> list[Effect]:
        tokens = [token for token, waited_for in self._drain_waiters.items() if waited_for == instance]
        for token in tokens:
            del self._drain_waiters[token]
        return [Answer(token, result) for token in tokens]

    def _on_waiter_gone(self, event: WaiterGone) -> list[Effect]:
        self._drain_waiters.pop(event.token, None)
        self._cancellations.forget(event.token)
        self._reprioritising.on_waiter_gone(event.token)
        for number, record in self._in_flight.items():
            if record.token == event.token:
                self._in_flight[number] = view.without_caller(record)
        return []

    # ------------------------------------------------------------------ moves
    def _on_tick(self, now_s: float) -> list[Effect]:
        for place in (self._request_rests, self._drain_rests, self._pair_rests):
            place.forget_rested(now_s)
        views = self._views(now_s)
        moves = plan_drain(views, self._drain_rests.names(), self._params.drain)
        effects = self._start_all(moves, now_s)
        if self._params.is_rebalancing:
            resting, params = Resting(self._request_rests.names(), self._pair_rests.names()), self._params.rebalance
            for plan in (*self.plans, self._attaining.moves):
                views = self._views(now_s, (views, moves))  # what was begun counts as made
                moves = plan(views, resting, params)
                effects += self._start_all(moves, now_s)
        if self._scaling.is_active:
            drains = Drains(self._instances, self._begin_drain, self._end_drain)
            effects += self._scaling.tick(self._views(now_s, (views, moves)), drains, now_s)
        return effects

    def _views(self, now_s: float, since: view.Since = ((), ())) -> tuple[InstanceView, ...]:
        return view.instance_views(self._instances, self._in_flight, self._params, now_s, since)

    def _on_migrate_requested(self, event: MigrateRequested, now_s: float) -> list[Effect]:
        found = view.find_move(event, self._instances, list(self._in_flight.values()), self._params, now_s)
        if isinstance(found, Refused):
            return [Answer(event.token, found)]
        return [self._start(found, event.token, event.mode, now_s)]

    def _start_all(self, moves: tuple[Move, ...], now_s: float) -> list[Effect]:
        return [self._start(move, None, "live", now_s) for move in moves]

    def _start(self, move: Move, token: Token | None, mode: str, now_s: float) -> StartMigration:
        number = self._num_migrations = MigrationNumber(self._num_migrations + 1)
        source, destination = self._instances[move.source], self._instances[move.destination]
        record = view.begun(number, move, source.incarnation, destination.incarnation, now_s)
        self._in_flight[number] = replace(record, mode=mode, token=token)
        where, why = (record.source, record.destination), (move.reason, move.signal_age_s)
        return StartMigration(number, move.request_id, *where, mode, *why)

    def _on_migration_ended(self, event: MigrationEnded, now_s: float) -> list[Effect]:
        record = self._in_flight.pop(event.number, None)
        if record is None:
            return []
        ended = view.ended(record, event, now_s)
        self._history.append(ended)
        if event.outcome is Outcome.COMMITTED and record.source.instance in self._instances:
            self._instances[record.source.instance].learn_copy_time(event.figures)
        self._drain_rests.rest(record.request_id, now_s + self._params.drain.retry_s)
        self._request_rests.rest(record.request_id, now_s + self._params.rebalance.rest_s)
        if event.outcome not in view.NOT_OF_THE_PAIR:
            pair = (record.source.instance, record.destination.instance)
            self._pair_rests.rest(pair, now_s + self._params.rebalance.pair_rest_s)
        effects: list[Effect] = [Answer(record.token, MigrationFinished(ended))] if record.token is not None else []
        effects += self._cancellations.on_migration_ended(ended)
        effects += self._reprioritising.on_migration_ended(ended, self._instances)
        for instance in (record.source.instance, record.destination.instance):
            if instance in self._instances:
                effects += self._check_drained(self._instances[instance])
        return effects

    # ------------------------------------------------------------------ tests
    def check_integrity(self) -> None:
        """Raise AssertionError when two of its records contradict each other or a bound is passed."""
        params = self._tuning.started_with  # what was begun under a higher bound than today's goes on
        integrity.check_records(self._instances, self._gateways, self._in_flight, self._history, params)
        integrity.check_waiters(self._drain_waiters, self._instances, params)
        self._cancellations.check_integrity(self._in_flight)
        self._reprioritising.check_integrity(self._in_flight.values())
        self._scaling.check_integrity(self._instances)
        priority_classes.check_integrity(self._params)
        self._attaining.check_integrity(self._instances.values())
