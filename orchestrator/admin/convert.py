"""How do the orchestrator's values look in the admin API, and how are its names read?"""

from __future__ import annotations

from typing import TypeVar

from instance.lifecycle import State
from instance.messages import RequestLoad
from migration.types import InstanceId, Outcome
from orchestrator.admin.failures import invalid
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.effects import Reprioritised
from orchestrator.events import MigrationNumber
from orchestrator.state import GatewaySnapshot, InstanceSnapshot, MigrationRecord, Snapshot

INSTANCES = "instances/"
REQUESTS = "requests/"
MIGRATIONS = "migrations/"
GATEWAYS = "gateways/"

STATES = {
    State.STARTING: pb.INSTANCE_STATE_STARTING,
    State.SERVING: pb.INSTANCE_STATE_SERVING,
    State.DRAINING: pb.INSTANCE_STATE_DRAINING,
    State.STOPPED: pb.INSTANCE_STATE_STOPPED,
}

OUTCOMES = {
    Outcome.COMMITTED: pb.MIGRATION_OUTCOME_COMMITTED,
    Outcome.REFUSED: pb.MIGRATION_OUTCOME_REFUSED,
    Outcome.FINISHED_AT_SOURCE: pb.MIGRATION_OUTCOME_FINISHED_AT_SOURCE,
    Outcome.ABORTED_BY_CLIENT: pb.MIGRATION_OUTCOME_ABORTED_BY_CLIENT,
    Outcome.PREEMPTED: pb.MIGRATION_OUTCOME_PREEMPTED,
    Outcome.SOURCE_LOST: pb.MIGRATION_OUTCOME_SOURCE_LOST,
    Outcome.DESTINATION_LOST: pb.MIGRATION_OUTCOME_DESTINATION_LOST,
    Outcome.TIMED_OUT: pb.MIGRATION_OUTCOME_TIMED_OUT,
    Outcome.FAULT: pb.MIGRATION_OUTCOME_FAULT,
}

MODES: dict[int, str] = {
    pb.MIGRATION_MODE_UNSPECIFIED: "live",
    pb.MIGRATION_MODE_LIVE: "live",
    pb.MIGRATION_MODE_BLOCKING: "blocking",
    pb.MIGRATION_MODE_REPREFILL: "reprefill",
}

STATE_OF: dict[int, State] = {int(number): state for state, number in STATES.items()}
OUTCOME_OF: dict[int, Outcome | None] = {int(number): outcome for outcome, number in OUTCOMES.items()} | {0: None}
MAX_NAME_CHARS = 256
_MAX_NUMBER_DIGITS = 18

Value = TypeVar("Value")
Resource = TypeVar("Resource", pb.Instance, pb.Migration)


def bare(name: str, collection: str, field: str = "name") -> str:
    """The part after `collection`; a bare name is taken as it is. Raises Failure when nothing fit is left."""
    rest = name.removeprefix(collection)
    if not rest or "/" in rest or len(rest) > MAX_NAME_CHARS:
        raise invalid(field, f"{name!r} is not of the form {collection}NAME")
    return rest


def instance_id(name: str, field: str = "name") -> InstanceId:
    return InstanceId(bare(name, INSTANCES, field))


def migration_number(name: str) -> MigrationNumber:
    digits = bare(name, MIGRATIONS)
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > _MAX_NUMBER_DIGITS:
        raise invalid("name", f"{name!r} is not of the form {MIGRATIONS}NUMBER")
    return MigrationNumber(int(digits))


def instance(snapshot: InstanceSnapshot) -> pb.Instance:
    message = pb.Instance(
        name=INSTANCES + snapshot.incarnation.instance,
        epoch=snapshot.incarnation.epoch,
        state=STATES[snapshot.state],
        address=snapshot.incarnation.address,
        model=snapshot.model,
        block_size=snapshot.block_size,
        total_blocks=snapshot.total_blocks,
        freeness_steps=snapshot.freeness_steps,
        report_age_s=snapshot.report_age_s,
        drained=snapshot.drained,
        reason=snapshot.reason,
        process_id=snapshot.process_id,
    )
    load = snapshot.load
    if load is not None:
        message.free_blocks = load.free_blocks
        message.reserved_blocks = load.reserved_blocks
        message.num_running = load.num_running
        message.num_waiting = load.num_waiting
        message.step_time_s = load.step_time_s
        message.num_preemptions = load.num_preemptions
        message.migrations_in = load.migrations_in
        message.migrations_out = load.migrations_out
        message.step = load.step
    return message


def gateway(snapshot: GatewaySnapshot) -> pb.Gateway:
    return pb.Gateway(
        name=GATEWAYS + snapshot.gateway, url=snapshot.url, alive=snapshot.alive, process_id=snapshot.process_id
    )


def request(load: RequestLoad, owner: InstanceSnapshot) -> pb.Request:
    return pb.Request(
        name=REQUESTS + load.request_id,
        external_id=load.external_id,
        instance=INSTANCES + owner.incarnation.instance,
        status=load.status,
        priority=load.priority,
        num_prompt_tokens=load.num_prompt_tokens,
        num_output_tokens=load.num_output_tokens,
        max_tokens=load.max_tokens,
        num_blocks=load.num_blocks,
        age_s=load.arrived_s + owner.requests_age_s,
        movable=load.movable,
    )


def migration(record: MigrationRecord, now_s: float) -> pb.Migration:
    figures = record.figures
    return pb.Migration(
        name=f"{MIGRATIONS}{record.number}",
        request=REQUESTS + record.request_id,
        source=INSTANCES + record.source.instance,
        destination=INSTANCES + record.destination.instance,
        outcome=pb.MIGRATION_OUTCOME_UNSPECIFIED if record.outcome is None else OUTCOMES[record.outcome],
        cause=record.cause,
        reason=record.reason,
        cached_tokens=figures.cached_tokens,
        moved_tokens=figures.moved_tokens,
        num_stages=figures.num_stages,
        copied_blocks=figures.copied_blocks,
        tail_blocks=figures.tail_blocks,
        num_bytes=figures.num_bytes,
        duration_s=figures.duration_s,
        stopped_s=figures.stopped_s,
        steps_during_copy=figures.steps_during_copy,
        ended_age_s=None if record.outcome is None else now_s - record.ended_s,
    )


def reprioritised(result: Reprioritised) -> pb.SetRequestPriorityResponse:
    return pb.SetRequestPriorityResponse(
        name=REQUESTS + result.request_id,
        instance=INSTANCES + result.instance,
        previous_priority=result.previous,
        priority=result.priority,
        change=result.change,
        status=result.status,
        effect=result.effect,
    )


def drain_progress(snapshot: Snapshot, name: InstanceId, done: bool) -> pb.DrainInstanceResponse:
    """How far the drain of that instance is; without the instance when it is not there any more."""
    found = find_instance(snapshot, name)
    if found is None:
        return pb.DrainInstanceResponse(done=done)
    return pb.DrainInstanceResponse(instance=instance(found), num_requests=len(found.requests), done=done)


def find_instance(snapshot: Snapshot, name: InstanceId) -> InstanceSnapshot | None:
    """The latest incarnation of that name."""
    found = [item for item in snapshot.instances if item.incarnation.instance == name]
    return max(found, key=lambda item: item.incarnation.epoch, default=None)
