"""How are requests ended and migrations called off by command? Who waits for the answer of a gateway or a source.

Pure. A migration is called off at its source, which alone knows whether its commit was sent: the command is
answered when the migration has ended, by how it ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from migration.types import InstanceId, Outcome, RequestId
from orchestrator import view
from orchestrator.effects import Answer, Effect, EndRequest, MigrationFinished, Refused, RequestEnded, WithdrawMigration
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    CancelMigrationRequested,
    CancelRequested,
    MigrationNumber,
    MigrationWithdrawn,
    RequestCancelled,
    Token,
)
from orchestrator.state import InstanceRecord, MigrationRecord

ASKED_FOR = "asked for"
Cancelling = CancelRequested | RequestCancelled | CancelMigrationRequested | MigrationWithdrawn


class Cancellations:
    """At most `max_waiters` callers wait for each kind; each is answered exactly once, or forgotten when it goes."""

    def __init__(self, max_waiters: int) -> None:
        self._max_waiters = max_waiters
        self._requests: dict[Token, RequestEnded] = {}
        """What each caller is told once the request has ended."""
        self._migrations: dict[Token, MigrationNumber] = {}

    def on(
        self,
        event: Cancelling,
        instances: Mapping[InstanceId, InstanceRecord],
        in_flight: Mapping[MigrationNumber, MigrationRecord],
        history: Iterable[MigrationRecord],
    ) -> list[Effect]:
        match event:
            case CancelRequested():
                return self._cancel_request(event, instances)
            case RequestCancelled():
                return self._request_cancelled(event)
            case CancelMigrationRequested():
                return self._cancel_migration(event, in_flight, history)
            case MigrationWithdrawn():
                return self._migration_withdrawn(event)

    def on_migration_ended(self, record: MigrationRecord) -> list[Effect]:
        """Answer those who called it off: it was, or it was too late."""
        tokens = [token for token, number in self._migrations.items() if number == record.number]
        effects: list[Effect] = []
        for token in tokens:
            del self._migrations[token]
            effects.append(Answer(token, _how_it_ended(record)))
        return effects

    def forget(self, token: Token) -> None:
        """The caller has gone; what it asked for goes on."""
        self._requests.pop(token, None)
        self._migrations.pop(token, None)

    def _cancel_request(self, event: CancelRequested, instances: Mapping[InstanceId, InstanceRecord]) -> list[Effect]:
        found = view.find_request(event.reference, instances)
        if isinstance(found, Refused):
            return [Answer(event.token, found)]
        owner, request = found
        ended = RequestEnded(owner.instance, request)
        if event.validate_only:
            return [Answer(event.token, ended)]
        if len(self._requests) >= self._max_waiters:
            return [Answer(event.token, self._too_many())]
        self._requests[event.token] = ended
        return [EndRequest(event.token, RequestId(request.request_id), ASKED_FOR)]

    def _request_cancelled(self, event: RequestCancelled) -> list[Effect]:
        ended = self._requests.pop(event.token, None)
        if ended is None:
            return []
        if event.error is None:
            return [Answer(event.token, ended)]
        reason = f"whether {ended.request.request_id} has ended is unknown, trying again is safe: {event.error}"
        return [Answer(event.token, Refused(RefusalKind.UNAVAILABLE, reason))]

    def _cancel_migration(
        self,
        event: CancelMigrationRequested,
        in_flight: Mapping[MigrationNumber, MigrationRecord],
        history: Iterable[MigrationRecord],
    ) -> list[Effect]:
        record = in_flight.get(event.number)
        if record is None:
            ended = next((item for item in history if item.number == event.number), None)
            refusal = Refused(RefusalKind.NOT_FOUND, f"no migration has the number {event.number}")
            if ended is not None and ended.outcome is not None:
                reason = f"migration {event.number} has ended already: {ended.outcome.value}"
                refusal = Refused(RefusalKind.PRECONDITION, reason)
            return [Answer(event.token, refusal)]
        if len(self._migrations) >= self._max_waiters:
            return [Answer(event.token, self._too_many())]
        self._migrations[event.token] = event.number
        return [WithdrawMigration(event.token, event.number, record.request_id, record.source, ASKED_FOR)]

    def _migration_withdrawn(self, event: MigrationWithdrawn) -> list[Effect]:
        """The source was told; what came of it says the migration's own end."""
        if event.error is None or event.token not in self._migrations:
            return []
        number = self._migrations.pop(event.token)
        reason = f"whether the source of migration {number} was told is unknown, trying again is safe: {event.error}"
        return [Answer(event.token, Refused(RefusalKind.UNAVAILABLE, reason))]

    def _too_many(self) -> Refused:
        return Refused(RefusalKind.EXHAUSTED, f"{self._max_waiters} callers are waiting already")

    def check_integrity(self, in_flight: Mapping[MigrationNumber, MigrationRecord]) -> None:
        """Raise AssertionError when a bound is passed, or somebody waits for a migration that has ended."""
        assert max(len(self._requests), len(self._migrations)) <= self._max_waiters
        assert set(self._migrations.values()) <= in_flight.keys(), "a caller waits for a migration that has ended"


def _how_it_ended(record: MigrationRecord) -> MigrationFinished | Refused:
    if record.outcome is not Outcome.COMMITTED:
        return MigrationFinished(replace(record, token=None))
    reason = f"too late: migration {record.number} committed, the request is on {record.destination.instance}"
    return Refused(RefusalKind.PRECONDITION, reason)
