"""Who wants which request to be how urgent, and what has become of it? Changes of priority, each answered once. Pure.

The instance that owns the request makes the change. One that has just stopped it for a migration cannot: the change
then waits for the end of that migration and goes to the owner it leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import Incarnation, InstanceId, Outcome, RequestId
from orchestrator import view
from orchestrator.effects import Answer, Effect, Refused, Reprioritised, SetPriority
from orchestrator.errors import RefusalKind
from orchestrator.events import ChangeNumber, PriorityAnswered, PriorityRequested, Token
from orchestrator.policy.levels import BadLevel, Levels
from orchestrator.policy.moves import spare_blocks
from orchestrator.state import CoreParams, InstanceRecord, MigrationRecord

MAX_TRIES = 4
"""Instances asked for one change: a request that keeps changing hands meanwhile is given up."""

_UNKNOWN_OWNER = (Outcome.FAULT, Outcome.TIMED_OUT, Outcome.SOURCE_LOST, Outcome.DESTINATION_LOST)
"""After a migration with such an end either side may own the request, until a report shows it."""


@dataclass(slots=True)
class _Change:
    """One change on its way."""

    number: ChangeNumber
    token: Token | None
    """The caller who waits; None: gone."""
    request_id: RequestId
    priority: int
    asked_by: str
    owner: Incarnation
    """Who is asked, or was asked last."""
    num_tries: int = 1
    waits_for: MigrationRecord | None = None
    """The migration whose end it waits for."""


class Reprioritising:
    """The changes under way. Its look at instances and migrations is the core's, handed in with each event."""

    def __init__(self, params: CoreParams) -> None:
        self.levels: Levels = params.levels
        self._max_changes = params.max_waiters
        self._changes: dict[ChangeNumber, _Change] = {}
        self._num_changes = 0

    def on_requested(self, event: PriorityRequested, instances: Mapping[InstanceId, InstanceRecord]) -> list[Effect]:
        try:
            priority = self.levels.priority(event.level)
        except BadLevel as error:
            return [Answer(event.token, Refused(RefusalKind.INVALID, str(error)))]
        found = view.find_request(event.reference, instances)
        if isinstance(found, Refused):
            return [Answer(event.token, found)]
        if len(self._changes) >= self._max_changes:
            return [Answer(event.token, Refused(RefusalKind.EXHAUSTED, f"{self._max_changes} changes are under way"))]
        owner, request = found
        self._num_changes += 1
        number = ChangeNumber(self._num_changes)
        request_id = RequestId(request.request_id)
        change = _Change(number, event.token, request_id, priority, event.asked_by, owner.incarnation)
        self._changes[number] = change
        before, after = self.levels.shown(request.priority), self.levels.shown(priority)
        return [self._ask(change, f"asked for by {event.asked_by}: {before} -> {after}")]

    def on_answered(
        self,
        event: PriorityAnswered,
        instances: Mapping[InstanceId, InstanceRecord],
        migrations: Iterable[MigrationRecord],
    ) -> list[Effect]:
        """`migrations`: in flight and ended, the latest last."""
        change = self._changes.get(event.number)
        if change is None:
            return []
        if event.answer is None:
            return self._end(change, Refused(event.failure, f"{change.owner.instance}: {event.reason}"))
        match event.answer.outcome:
            case PriorityOutcome.SET:
                return self._end(change, self._done(change, event.answer, instances.get(change.owner.instance)))
            case PriorityOutcome.UNSUPPORTED:
                return self._end(change, Refused(RefusalKind.PRECONDITION, event.answer.reason))
            case PriorityOutcome.NOT_HERE | PriorityOutcome.ON_THE_MOVE:
                return self._follow(change, event.answer, instances, migrations)

    def on_migration_ended(
        self, record: MigrationRecord, instances: Mapping[InstanceId, InstanceRecord]
    ) -> list[Effect]:
        """Those that waited for it go on to whoever owns the request now."""
        effects: list[Effect] = []
        for change in list(self._changes.values()):
            if change.waits_for is not None and change.waits_for.number == record.number:
                change.waits_for = None
                effects += self._ask_owner_after(change, record, instances)
        return effects

    def on_waiter_gone(self, token: Token) -> None:
        """The change goes on; nobody is answered."""
        for change in self._changes.values():
            if change.token == token:
                change.token = None

    # ------------------------------------------------------------------ parts
    def _follow(
        self,
        change: _Change,
        answer: PriorityAnswer,
        instances: Mapping[InstanceId, InstanceRecord],
        migrations: Iterable[MigrationRecord],
    ) -> list[Effect]:
        """It is not to be had there: where has it gone, or when will it have?"""
        moves = [item for item in migrations if item.request_id == change.request_id]
        in_flight = [item for item in moves if item.outcome is None]
        if in_flight:
            change.waits_for = in_flight[-1]
            return []
        if answer.outcome is PriorityOutcome.ON_THE_MOVE:
            reason = f"{change.request_id} is changing hands at {change.owner.instance}; try again"
            return self._end(change, Refused(RefusalKind.UNAVAILABLE, reason))
        committed = [item for item in moves if item.outcome is Outcome.COMMITTED]
        if committed and committed[-1].destination != change.owner:
            return self._ask_owner_after(change, committed[-1], instances)
        if moves and moves[-1].outcome in _UNKNOWN_OWNER:
            reason = f"where {change.request_id} is now is not known; try again"
            return self._end(change, Refused(RefusalKind.UNAVAILABLE, reason))
        return self._end(change, Refused(RefusalKind.NOT_FOUND, f"{change.request_id} has ended"))

    def _ask_owner_after(
        self, change: _Change, record: MigrationRecord, instances: Mapping[InstanceId, InstanceRecord]
    ) -> list[Effect]:
        owner = record.destination if record.outcome is Outcome.COMMITTED else record.source
        known = instances.get(owner.instance)
        if known is None or known.incarnation != owner:
            reason = f"{owner.instance} was lost, and {change.request_id} with it or elsewhere"
            return self._end(change, Refused(RefusalKind.OVERTAKEN, reason))
        if change.num_tries >= MAX_TRIES:
            reason = f"{change.request_id} has changed hands {change.num_tries} times meanwhile; try again"
            return self._end(change, Refused(RefusalKind.UNAVAILABLE, reason))
        change.num_tries += 1
        change.owner = owner
        ended = "" if record.outcome is None else record.outcome.value
        return [self._ask(change, f"asked for by {change.asked_by}, after migration {record.number} ({ended})")]

    def _ask(self, change: _Change, reason: str) -> SetPriority:
        return SetPriority(change.number, change.request_id, change.owner, change.priority, reason)

    def _end(self, change: _Change, result: Refused | Reprioritised) -> list[Effect]:
        del self._changes[change.number]
        return [] if change.token is None else [Answer(change.token, result)]

    def _done(self, change: _Change, answer: PriorityAnswer, owner: InstanceRecord | None) -> Reprioritised:
        """What was done, and what it will do; the records say the new priority from here on."""
        effect = ""
        if owner is not None and owner.incarnation == change.owner:
            owner.requests = tuple(
                msgspec.structs.replace(item, priority=change.priority)
                if item.request_id == change.request_id
                else item
                for item in owner.requests
            )
            effect = self._effect(change, answer.status, owner)
        return Reprioritised(
            request_id=change.request_id,
            instance=change.owner.instance,
            previous=answer.previous,
            priority=change.priority,
            change=f"{self.levels.shown(answer.previous)} -> {self.levels.shown(change.priority)}",
            status="" if answer.status is None else answer.status.value,
            effect=effect,
        )

    def _effect(self, change: _Change, status: RequestStatus | None, owner: InstanceRecord) -> str:
        others = [item for item in owner.requests if item.request_id != change.request_id]
        if status is not RequestStatus.RUNNING:
            waiting = [item for item in others if item.status != RequestStatus.RUNNING.value]
            before = sum(item.priority < change.priority for item in waiting)
            return f"it waits: {before} of {len(waiting)} others that wait here are more urgent now"
        running = [item for item in others if item.status == RequestStatus.RUNNING.value]
        behind = sum(item.priority > change.priority for item in running)
        text = f"it runs: {behind} of {len(running)} others that run here give up their blocks before it"
        return text + self._effect_on_headroom(change.priority, owner)

    def _effect_on_headroom(self, priority: int, owner: InstanceRecord) -> str:
        """As the last report has it, with this request counted at its new priority."""
        params = self.levels.load_params
        headroom = params.headroom(priority)
        if not headroom or owner.load is None:
            return ""
        running = (*owner.load.running_by_priority, (priority, 1))
        load = msgspec.structs.replace(owner.load, running_by_priority=running)
        spare = spare_blocks(load, params)
        if spare >= 0:
            return f"; {headroom} blocks are kept free beside it, and they are there"
        return f"; of {headroom} blocks to be kept free beside it {-spare:.0f} are missing: less urgent ones shall move"

    def check_integrity(self, in_flight: Iterable[MigrationRecord]) -> None:
        """Raise AssertionError when a change waits for what will not come, or a bound is passed."""
        numbers = {record.number for record in in_flight}
        assert len(self._changes) <= self._max_changes
        for number, change in self._changes.items():
            assert change.number == number and 1 <= change.num_tries <= MAX_TRIES
            assert change.waits_for is None or change.waits_for.number in numbers, "it waits for no migration in flight"
