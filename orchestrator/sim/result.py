"""What does a file of simulated days hold? Days as JSON, written and read again; nothing else is told by it. Pure.

JSON has neither NaN nor infinities: both are written as null, and null is read as NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from orchestrator.sim.day import Day
from orchestrator.sim.series import InstanceSeries

VERSION = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What was asked of which arms, and what came of it."""

    days: list[Day]
    question: dict[str, Any] = field(default_factory=dict)
    """For people to read, and to tell whether two results are of the same one: its fields by name."""
    instances: list[InstanceSeries] = field(default_factory=list)
    """Of the only day."""
    version: int = VERSION


def as_json(question: Mapping[str, Any], days: Sequence[Day], instances: Sequence[InstanceSeries] = ()) -> str:
    """One line, the same for the same days."""
    result = msgspec.to_builtins(Result(list(days), dict(question), list(instances)))
    return json.dumps(without_nan(result), allow_nan=False, separators=(",", ":")) + "\n"


def from_json(text: str | bytes) -> Result:
    """Raises ValueError for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict) or "days" not in values:
        raise ValueError("it holds no simulated days")
    if values.get("version") != VERSION:
        raise ValueError(f"it is of version {values.get('version')}, this program reads version {VERSION}")
    question = values.get("question") or {}
    result = msgspec.convert(_mapped(values, _as_nan) | {"question": question}, Result)
    if not result.days:
        raise ValueError("it holds no simulated days")
    return result


def without_nan(value: Any) -> Any:
    """The same values for JSON: what is not a finite number is null."""
    return _mapped(value, _as_null)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return change(value)


def _as_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_nan(value: Any) -> Any:
    return math.nan if value is None else value
