"""How does the policy look on a terminal, and how is what was typed made into one?"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.policy import value_in
from orchestrator.errors import ConfigError


def names() -> list[str]:
    """The path of every parameter, in the order of the .proto."""
    found: list[str] = []
    for field in pb.Policy.DESCRIPTOR.fields:
        if field.message_type is not None:
            found += [f"{field.name}.{leaf.name}" for leaf in field.message_type.fields]
        elif field.name not in ("name", "etag"):
            found.append(field.name)
    return found


def policy_of(assignments: list[tuple[str, str]]) -> pb.Policy:
    """Raises ConfigError for a name that is none, or a value of another kind."""
    policy = pb.Policy()
    for name, text in assignments:
        if name not in names():
            raise ConfigError(f"there is no parameter {name!r}; `kvferry policy` lists them")
        value: Any
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if value is None:
            raise ConfigError(f"{name} cannot be {text!r}; --reset {name} puts it back")
        for part in reversed(name.split(".")):
            value = {part: value}
        try:
            ParseDict(value, policy)
        except (ParseError, TypeError) as error:
            raise ConfigError(f"{name} cannot be {text!r}") from error
    return policy


def as_text(policy: pb.Policy, as_json: bool) -> str:
    if as_json:
        return json.dumps(MessageToDict(policy, preserving_proto_field_name=True))
    width = max(map(len, names()))
    return "\n".join(f"{name:<{width}}  {_shown(value_in(policy, name))}" for name in names())


def change_lines(updated: pb.UpdatePolicyResponse, is_dry: bool) -> list[str]:
    verb = "would be" if is_dry else "is now"
    lines = [f"{item.field} {verb} {item.after} (was {item.before})" for item in updated.changes]
    return lines or ["nothing changes"]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else "-"
