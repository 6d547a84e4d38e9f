"""How does the state of a cluster look on a terminal? Tables and lines from the admin API's messages."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from orchestrator import cli_scaling
from orchestrator.admin.client import AdminClient
from orchestrator.admin.convert import GATEWAYS, INSTANCES, MIGRATIONS, REQUESTS
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb

REFRESH_S = 0.5
WIDTH_OF_A_FILE = 200
"""Columns when the output is no terminal."""
MAX_REQUEST_ROWS = 40
MAX_MIGRATION_ROWS = 5
STALE_S = 1.5
_LONG = ("request", "client's id", "url")
_TEXTS = (*_LONG, "instance", "state", "gateway", "status", "on", "outcome", "cause")


def show(connected: AdminClient, as_json: bool, watch: bool) -> None:
    """Once, or every REFRESH_S until interrupted. Raises what the client raises."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE)
    with connected as client:
        if as_json:
            while True:
                print(json.dumps(as_values(client)), flush=True)
                if not watch:
                    return
                time.sleep(REFRESH_S)
        if not watch:
            console.print(picture(client))
            return
        with Live(picture(client), console=console, auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(picture(client), refresh=True)


def as_values(client: AdminClient) -> dict[str, list[object]]:
    """What `--json` prints: the messages of the admin API by their field names."""
    listed = client.instances()
    return {
        "instances": [_values(item) for item in listed.instances],
        "gateways": [_values(item) for item in listed.gateways],
        "requests": [_values(item) for item in client.requests()],
        "migrations": [_values(item) for item in client.migrations()],
        "scaling": [_values(client.scaling())],
    }


def _values(message: Message) -> object:
    values = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_INT64 and field.name in values:
            values[field.name] = int(values[field.name])  # JSON of protobuf writes 64 bits as text
    return values


def picture(client: AdminClient) -> Group:
    listed = client.instances()
    parts: list[Table | str] = [_instances(listed.instances), cli_scaling.line(client.scaling())]
    if listed.gateways:
        parts.append(_gateways(listed.gateways))
    requests = client.requests()
    parts.append(_requests(requests))
    migrations = client.migrations(MAX_MIGRATION_ROWS)
    if migrations:
        parts.append(_migrations(migrations))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Names give way first, at their end: a prefix of one is all that `kvferry migrate` needs.
        table.add_column(
            column,
            justify="left" if column in _TEXTS else "right",
            no_wrap=column not in _LONG,
            overflow="ellipsis",
        )
    return table


def _instances(instances: Iterable[pb.Instance]) -> Table:
    table = _table(
        "instances",
        "instance",
        "state",
        "running",
        "waiting",
        "KV used",
        "steps left",
        "step ms",
        "in/out",
        "pid",
        "seen",
    )
    for item in instances:
        used = 1 - (item.free_blocks / item.total_blocks if item.total_blocks else 0)
        has_report = item.HasField("report_age_s")
        table.add_row(
            item.name.removeprefix(INSTANCES),
            state_name(item),
            str(item.num_running) if has_report else "",
            str(item.num_waiting) if has_report else "",
            f"{used:.0%}" if has_report else "",
            f"{item.freeness_steps:.0f}" if item.HasField("freeness_steps") else "",
            f"{item.step_time_s * 1e3:.1f}" if item.step_time_s else "",
            f"{item.migrations_in}/{item.migrations_out}" if has_report else "",
            str(item.process_id or ""),
            _seen(item),
        )
    return table


def state_name(item: pb.Instance) -> str:
    """Serving, draining, ..., and why."""
    name = pb.InstanceState.Name(item.state).removeprefix("INSTANCE_STATE_").lower()
    if item.drained:
        return f"{name} (empty)"
    return f"{name}: {item.reason}" if item.reason else name


def _seen(item: pb.Instance) -> str:
    if not item.HasField("report_age_s"):
        return ""
    return f"{item.report_age_s:.1f} s" + (" (late)" if item.report_age_s > STALE_S else "")


def _gateways(gateways: Iterable[pb.Gateway]) -> Table:
    table = _table("gateways", "gateway", "state", "url", "pid")
    for item in gateways:
        state = "serving" if item.alive else "stopped"
        table.add_row(item.name.removeprefix(GATEWAYS), state, item.url, str(item.process_id or ""))
    return table


def _requests(requests: list[pb.Request]) -> Table:
    title = f"requests: {len(requests)}"
    if len(requests) > MAX_REQUEST_ROWS:
        title += f" (the first {MAX_REQUEST_ROWS})"
    table = _table(title, "request", "client's id", "on", "status", "prio", "prompt", "output", "max", "blocks", "age")
    for item in requests[:MAX_REQUEST_ROWS]:
        table.add_row(
            item.name.removeprefix(REQUESTS),
            item.external_id,
            item.instance.removeprefix(INSTANCES),
            item.status + ("" if item.movable else " (fixed)"),
            str(item.priority),
            str(item.num_prompt_tokens),
            str(item.num_output_tokens),
            str(item.max_tokens),
            str(item.num_blocks),
            f"{item.age_s:.1f} s",
        )
    return table


def _migrations(migrations: Iterable[pb.Migration]) -> Table:
    table = _table(
        "latest migrations", "no", "request", "on", "outcome", "stages", "blocks", "stopped ms", "age", "cause"
    )
    for item in migrations:
        table.add_row(
            item.name.removeprefix(MIGRATIONS),
            item.request.removeprefix(REQUESTS),
            f"{item.source.removeprefix(INSTANCES)} -> {item.destination.removeprefix(INSTANCES)}",
            outcome_name(item),
            str(item.num_stages),
            str(item.copied_blocks + item.tail_blocks),
            f"{item.stopped_s * 1e3:.1f}" if item.stopped_s else "",
            f"{item.ended_age_s:.1f} s" if item.HasField("ended_age_s") else "",
            item.cause.partition(":")[0],
        )
    return table


# ---------------------------------------------------------------------- one migration, one drain
def is_committed(migration: pb.Migration) -> bool:
    return migration.outcome == pb.MIGRATION_OUTCOME_COMMITTED


def outcome_name(migration: pb.Migration) -> str:
    if migration.outcome == pb.MIGRATION_OUTCOME_UNSPECIFIED:
        return "in flight"
    return pb.MigrationOutcome.Name(migration.outcome).removeprefix("MIGRATION_OUTCOME_").lower()


def migration_line(migration: pb.Migration) -> str:
    """One migration in one line."""
    route = f"{migration.source.removeprefix(INSTANCES)} -> {migration.destination.removeprefix(INSTANCES)}"
    start = f"{migration.request.removeprefix(REQUESTS)}: {outcome_name(migration)}, {route}"
    if not is_committed(migration):
        return f"{start}" + (f" ({migration.reason})" if migration.reason else "")
    return (
        f"{start}, {migration.copied_blocks + migration.tail_blocks} blocks in {migration.num_stages} stages,"
        f" {migration.num_bytes / 1e6:.2f} MB, stopped {migration.stopped_s * 1e3:.1f} ms"
    )


def priority_line(answer: pb.SetRequestPriorityResponse) -> str:
    """A change of priority in one line."""
    where = answer.instance.removeprefix(INSTANCES)
    effect = f"; {answer.effect}" if answer.effect else ""
    return f"{answer.name.removeprefix(REQUESTS)}: {answer.change} on {where}{effect}"


def follow_drain(instance: str, progress: Iterable[pb.DrainInstanceResponse]) -> None:
    """Print each change of what is left."""
    last = -1
    for message in progress:
        if message.done:
            print(f"{instance} is empty")
        elif message.num_requests != last:
            print(f"{instance} is draining: {message.num_requests} requests left", flush=True)
        last = message.num_requests
