"""How does a change look as a line on a terminal?"""

from __future__ import annotations

import json
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict

from orchestrator import cli_status
from orchestrator.admin.convert import INSTANCES, REQUESTS
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.errors import ConfigError

TOPICS = {
    "instances": pb.WATCH_TOPIC_INSTANCES,
    "requests": pb.WATCH_TOPIC_REQUESTS,
    "migrations": pb.WATCH_TOPIC_MIGRATIONS,
}
_WORDS = {pb.Change.KIND_ADDED: "+", pb.Change.KIND_CHANGED: "~", pb.Change.KIND_ENDED: "-"}


def topics(named: list[str]) -> tuple[pb.WatchTopic.ValueType, ...]:
    """Raises ConfigError for one that does not exist."""
    unknown = sorted(set(named) - TOPICS.keys())
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: it must be one of {', '.join(TOPICS)}")
    return tuple(TOPICS[name] for name in named)


def follow(messages: Iterable[pb.WatchResponse], as_json: bool) -> None:
    """Print each change until the stream ends."""
    is_synced, num_missed = False, 0
    for message in messages:
        for change in message.changes:
            print(json.dumps(_values(change)) if as_json else line(change), flush=True)
        if message.num_missed_migrations > num_missed and not as_json:
            print(f"  {message.num_missed_migrations - num_missed} migrations were over before they could be shown")
        num_missed = message.num_missed_migrations
        if message.synced and not is_synced and not as_json:
            print("= that is the state now; what follows are changes", flush=True)
        is_synced = is_synced or message.synced


def line(change: pb.Change) -> str:
    """One change: `+` it is there, `~` it has changed, `-` it has ended."""
    word = _WORDS.get(change.kind, "?")
    match change.WhichOneof("resource"):
        case "instance":
            return f"{word} {_instance(change.instance, change.kind == pb.Change.KIND_ENDED)}"
        case "request":
            return f"{word} {_request(change.request)}"
        case "migration":
            return f"{word} migration {change.migration.name.partition('/')[2]} {_migration(change.migration)}"
        case _:
            return f"{word} something that this version does not know"


def _instance(item: pb.Instance, is_gone: bool) -> str:
    name = item.name.removeprefix(INSTANCES)
    if is_gone:
        return f"{name} (epoch {item.epoch}) is forgotten"
    used = 1 - (item.free_blocks / item.total_blocks if item.total_blocks else 0)
    load = f"{item.num_running} running, {item.num_waiting} waiting, KV used {used:.0%}"
    return f"{name} {cli_status.state_name(item)}" + (f": {load}" if item.HasField("report_age_s") else "")


def _request(item: pb.Request) -> str:
    return f"{item.name.removeprefix(REQUESTS)} {item.status} on {item.instance.removeprefix(INSTANCES)}"


def _migration(item: pb.Migration) -> str:
    return cli_status.migration_line(item)


def _values(change: pb.Change) -> object:
    return MessageToDict(change, preserving_proto_field_name=True)
