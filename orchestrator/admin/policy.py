"""How are the policies' parameters read and changed through the admin API? Field masks to paths, values to messages."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from orchestrator.admin.commands import Brain
from orchestrator.admin.failures import asked_etag, declined, invalid
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.effects import PolicyUpdated
from orchestrator.events import PolicyUpdateRequested, PolicyValue
from orchestrator.tuning import Policy, Tuning

NAME = "policy"
MAX_PATHS = 64
"""Of one field mask."""
_UNTOUCHABLE = frozenset({"name", "etag"})


class PolicyKeeper:
    """GetPolicy and UpdatePolicy. Both raise Failure."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    def get(self, _asked: pb.GetPolicyRequest) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=message_of(self._brain.policy()))

    async def update(self, asked: pb.UpdatePolicyRequest) -> pb.UpdatePolicyResponse:
        if asked.policy.name not in ("", NAME):
            raise invalid("policy.name", f"there is only one, named {NAME!r}")
        paths = [path for path, _ in self._brain.policy().values]
        named = tuple(asked.update_mask.paths)
        changes = tuple((path, value_in(asked.policy, path)) for path in chosen(asked.policy, named, paths))
        etag, is_dry = asked_etag(asked.policy.etag), asked.validate_only
        result = await self._brain.ask(lambda token: PolicyUpdateRequested(token, changes, etag, is_dry))
        if not isinstance(result, PolicyUpdated):
            raise declined(result)
        rows = [
            pb.PolicyChange(field=path, before=shown(before), after=shown(after))
            for path, before, after in result.changes
        ]
        policy = message_of(Tuning(result.params).policy(result.params))
        return pb.UpdatePolicyResponse(policy=policy, changes=rows)


def chosen(policy: pb.Policy, mask: tuple[str, ...], paths: list[str]) -> list[str]:
    """The paths that a mask names; without one, those that have a value. Raises Failure for a path that is none."""
    if not mask:
        return [path for path in paths if value_in(policy, path) is not None]
    if len(mask) > MAX_PATHS:
        raise invalid("update_mask", f"it has {len(mask)} paths, at most {MAX_PATHS} are read")
    wanted: set[str] = set()
    for named in mask:
        fits = {path for path in paths if named in ("*", path) or path.startswith(f"{named}.")}
        if not fits and named not in _UNTOUCHABLE:
            raise invalid("update_mask", f"{named!r} is no field of a policy")
        wanted |= fits
    return [path for path in paths if path in wanted]


def value_in(policy: pb.Policy, path: str) -> PolicyValue | None:
    """None: it has no value."""
    message, leaf = _holder(policy, path, lambda holder, name: holder.HasField(name))
    if message is None or not message.HasField(leaf):
        return None
    value: PolicyValue = getattr(message, leaf)
    return value


def message_of(policy: Policy) -> pb.Policy:
    message = pb.Policy(name=NAME, etag=policy.etag)
    for path, value in policy.values:
        holder, leaf = _holder(message, path, lambda _holder, _name: True)
        assert holder is not None
        setattr(holder, leaf, value)
    return message


def _holder(policy: pb.Policy, path: str, may_enter: Callable[[Message, str], bool]) -> tuple[Message | None, str]:
    """The message a path's last field is in; None: not to be entered."""
    *parents, leaf = path.split(".")
    message: Message = policy
    for name in parents:
        if not may_enter(message, name):
            return None, leaf
        message = getattr(message, name)
    return message, leaf


def shown(value: PolicyValue) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
