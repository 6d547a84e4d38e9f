"""Which parameters of the policies may change while the cluster runs, and to what? Checked, all or none. Pure.

Each parameter has a path (as in the admin API's field masks), a range and a place in `CoreParams`. No change passes
what the cluster was started with where the instances hold to that themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from orchestrator.effects import Answer, PolicyRefused, PolicyUpdated, Refused, Violation
from orchestrator.errors import RefusalKind
from orchestrator.events import PolicyUpdateRequested, PolicyValue
from orchestrator.policy.dispatch import DispatchParams
from orchestrator.policy.drain import DrainParams
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.state import CoreParams

MAX_STEPS = 1e6
MAX_REST_S = 3600.0
MAX_MOVES = 1000
MIN_STALE_S = 0.3
"""Idle instances report every 100 ms."""
MAX_STALE_S = 60.0
MIN_RETRY_S = 0.05
MAX_MARGIN = 1.0
"""A target must be met by all of itself: no move is made for one."""
MAX_PREFIX_WEIGHT = 100.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One value that may be changed; the ends of its range belong to it."""

    path: str
    kind: type[bool] | type[int] | type[float]
    low: float
    high: float
    read: Callable[[CoreParams], PolicyValue]
    write: Callable[[CoreParams, PolicyValue], CoreParams]


@dataclass(frozen=True, slots=True)
class Policy:
    """What is in force; `etag` is a digest of the values."""

    values: tuple[tuple[str, PolicyValue], ...]
    etag: str


def _of_dispatch(name: str, low: float, high: float) -> Parameter:
    """A change reaches the gateways with the members."""

    def write(params: CoreParams, value: PolicyValue) -> CoreParams:
        return replace(params, dispatch=_with(params.dispatch, name, value))

    return Parameter(f"dispatch.{name}", float, low, high, lambda params: _read(params.dispatch, name), write)


def _of_rebalance(name: str, kind: type[int] | type[float], low: float, high: float) -> Parameter:
    def write(params: CoreParams, value: PolicyValue) -> CoreParams:
        return replace(params, rebalance=_with(params.rebalance, name, value))

    return Parameter(f"rebalance.{name}", kind, low, high, lambda params: _read(params.rebalance, name), write)


def _of_drain(name: str, kind: type[int] | type[float], low: float, high: float) -> Parameter:
    def write(params: CoreParams, value: PolicyValue) -> CoreParams:
        return replace(params, drain=_with(params.drain, name, value))

    return Parameter(f"drain.{name}", kind, low, high, lambda params: _read(params.drain, name), write)


def _of_core(
    name: str, kind: type[bool] | type[int] | type[float], low: float, high: float, path: str = ""
) -> Parameter:
    return Parameter(
        path or name,
        kind,
        low,
        high,
        lambda params: _read(params, name),
        lambda params, value: _with(params, name, value),
    )


Params = TypeVar("Params", CoreParams, DispatchParams, RebalanceParams, DrainParams)


def _read(params: CoreParams | DispatchParams | RebalanceParams | DrainParams, name: str) -> PolicyValue:
    value: PolicyValue = getattr(params, name)
    return value


def _with(params: Params, name: str, value: PolicyValue) -> Params:
    change: dict[str, Any] = {name: value}
    return replace(params, **change)


def parameters(started_with: CoreParams) -> dict[str, Parameter]:
    """All that may be changed in a cluster that was started with these, by path."""
    rows = (
        _of_core("is_rebalancing", bool, 0, 1, path="rebalance.enabled"),
        _of_rebalance("threshold_steps", float, 0.0, MAX_STEPS),
        _of_rebalance("margin_steps", float, 0.0, MAX_STEPS),
        _of_rebalance("rest_s", float, 0.0, MAX_REST_S),
        _of_rebalance("pair_rest_s", float, 0.0, MAX_REST_S),
        _of_rebalance("max_moves", int, 1, MAX_MOVES),
        _of_rebalance("max_destinations", int, 1, started_with.max_instances),
        _of_rebalance("attain_margin", float, 0.0, MAX_MARGIN),
        _of_rebalance("attain_sources", int, 1, started_with.max_instances),
        _of_rebalance("attain_requests", int, 1, MAX_MOVES),
        _of_drain("retry_s", float, MIN_RETRY_S, MAX_REST_S),
        _of_drain("max_moves", int, 1, MAX_MOVES),
        _of_core("stale_after_s", float, MIN_STALE_S, MAX_STALE_S),
        _of_core("max_migrations_out", int, 1, started_with.max_migrations_out),
        _of_core("max_migrations_in", int, 1, started_with.max_migrations_in),
        _of_dispatch("prefix_weight", 0.0, MAX_PREFIX_WEIGHT),
        _of_dispatch("max_report_age_s", MIN_STALE_S, MAX_STALE_S),
        _of_dispatch("slow_start_s", 0.0, MAX_REST_S),
        _of_dispatch("slow_start_share", 0.0, 1.0),
    )
    return {row.path: row for row in rows}


class Tuning:
    """The parameters of one core."""

    def __init__(self, started_with: CoreParams) -> None:
        self.started_with = started_with

    @property
    def _parameters(self) -> dict[str, Parameter]:
        """Made anew each time: the core's state is values only, so that a journal can hold it."""
        return parameters(self.started_with)

    def policy(self, params: CoreParams) -> Policy:
        values = tuple((path, parameter.read(params)) for path, parameter in self._parameters.items())
        return Policy(values, hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest())

    def on(self, event: PolicyUpdateRequested, params: CoreParams) -> tuple[Answer, CoreParams]:
        """The answer, and the parameters from now on: the same ones when anything is wrong, or nothing shall change."""
        etag = self.policy(params).etag
        if event.etag and event.etag != etag:
            reason = f"the policy has changed since: its etag is {etag}, not {event.etag!r}"
            return Answer(event.token, Refused(RefusalKind.OVERTAKEN, reason)), params
        changed, violations = params, []
        for path, value in event.changes:
            parameter = self._parameters.get(path)
            reason = "there is no such parameter" if parameter is None else _why_not(parameter, value)
            if parameter is None or reason:
                violations.append(Violation(path, reason))
                continue
            wanted = parameter.read(self.started_with) if value is None else parameter.kind(value)
            changed = parameter.write(changed, wanted)
        if violations:
            return Answer(event.token, PolicyRefused(tuple(violations))), params
        changes = tuple(
            (path, parameter.read(params), parameter.read(changed))
            for path, parameter in self._parameters.items()
            if parameter.read(params) != parameter.read(changed)
        )
        updated = PolicyUpdated(changed, self.policy(changed).etag, changes, event.validate_only)
        return Answer(event.token, updated), params if event.validate_only else changed


def _why_not(parameter: Parameter, value: PolicyValue | None) -> str:
    """Empty: it may be that."""
    if value is None:
        return ""
    if parameter.kind is bool:
        return "" if isinstance(value, bool) else "it must be true or false"
    meaning = "a whole number" if parameter.kind is int else "a number"
    span = f"it must be {meaning} from {parameter.low:g} to {parameter.high:g}"
    is_of_kind = not isinstance(value, bool) and (isinstance(value, int) or parameter.kind is float)
    if not is_of_kind or not parameter.low <= value <= parameter.high:
        return f"it is {value}, {span}"
    return ""
