"""How is a migration carried out across processes? One call, which ends as one event whatever happens to it."""

from __future__ import annotations

from instance.spec import MigrationSummary
from migration.types import Outcome
from orchestrator.effects import StartMigration
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.events import MigrationEnded, MigrationFigures
from orchestrator.runtime.ports import Fleet


async def migrate(fleet: Fleet, effect: StartMigration, source: str, timeout_s: float) -> MigrationEnded:
    """Have the source's actor move the request, and wait for its summary."""
    try:
        summary = await fleet.migrate(source, effect.request_id, effect.destination, effect.mode, timeout_s)
    except ActorGone as error:
        return MigrationEnded(effect.number, Outcome.SOURCE_LOST, str(error), MigrationFigures())
    except CallFailed as error:
        return MigrationEnded(effect.number, Outcome.FAULT, str(error), MigrationFigures())
    return ended(effect, summary)


def ended(effect: StartMigration, summary: MigrationSummary) -> MigrationEnded:
    """The event that a source's summary stands for."""
    figures = MigrationFigures(
        cached_tokens=summary.cached_tokens,
        moved_tokens=summary.moved_tokens,
        num_stages=summary.num_stages,
        copied_blocks=summary.copied_blocks,
        tail_blocks=summary.tail_blocks,
        num_bytes=summary.num_bytes,
        duration_s=summary.duration_s,
        stopped_s=summary.stopped_s,
        steps_during_copy=summary.steps_during_copy,
    )
    return MigrationEnded(effect.number, Outcome(summary.outcome), summary.reason, figures)
