"""How is a request ended, or a migration called off, across processes? Each call's failure is part of the event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from instance.messages import Abort
from instance.ports import Inbox
from orchestrator.effects import EndRequest, WithdrawMigration
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.events import MigrationWithdrawn, RequestCancelled
from orchestrator.runtime.ports import Fleet


async def end_request(
    fleet: Fleet,
    mailbox: Inbox,
    effect: EndRequest,
    gateways: Iterable[str],
    inboxes: Iterable[str],
    timeout_s: float,
) -> RequestCancelled:
    """Ask every gateway: the one that holds the stream ends it and aborts the request at the instances. Where none does
    (its gateway has died, say), the instances are told from here. `gateways` are actors, `inboxes` the instances'."""
    found = await asyncio.gather(*(_end_at(fleet, name, effect, timeout_s) for name in gateways))
    if True in found:
        return RequestCancelled(effect.token)
    errors = [item for item in found if isinstance(item, str)]
    if errors:
        return RequestCancelled(effect.token, errors[0])
    for address in inboxes:
        mailbox.send(address, Abort((effect.request_id,)))
    return RequestCancelled(effect.token)


async def _end_at(fleet: Fleet, gateway: str, effect: EndRequest, timeout_s: float) -> bool | str:
    """Whether that gateway held it, or what went wrong."""
    try:
        return await fleet.cancel_request(gateway, effect.request_id, timeout_s)
    except ActorGone:
        return False  # its streams have ended with it
    except CallFailed as error:
        return str(error)


async def withdraw(fleet: Fleet, effect: WithdrawMigration, source: str, timeout_s: float) -> MigrationWithdrawn:
    """Tell the source's actor."""
    try:
        await fleet.cancel_migration(source, effect.request_id, effect.reason, timeout_s)
    except ActorGone:
        return MigrationWithdrawn(effect.token)  # the migration ends by its own event
    except CallFailed as error:
        return MigrationWithdrawn(effect.token, str(error))
    return MigrationWithdrawn(effect.token)
