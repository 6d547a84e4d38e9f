"""Which simulated days belong together? Those of the same question but for its rate, from whichever files. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.sim.day import Day
from orchestrator.sim.result import Result
from orchestrator.sim.series import InstanceSeries

_RATE = "requests_per_s"


@dataclass(frozen=True, slots=True)
class Study:
    question: dict[str, Any]
    """Without its rate."""
    days: list[Day]
    instances: list[InstanceSeries]
    """Of the only day, where there is one alone."""

    @property
    def title(self) -> str:
        """What was asked, in a line."""
        rates = sorted({day.requests_per_s for day in self.days})
        shown = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
        asked = self.question
        parts = [
            str(asked.get("workload", "")),
            f"{shown} requests/s",
            *(f"{asked[name]} {what}" for name, what in _COUNTED.items() if name in asked),
        ]
        return ", ".join(part for part in parts if part)


_COUNTED = {"num_requests": "requests", "num_instances": "instances"}


def studies_of(results: Sequence[Result]) -> list[Study]:
    """In the order of their first results. Raises ValueError when two of the same question hold the same day."""
    found: list[Study] = []
    for result in results:
        question = {name: value for name, value in result.question.items() if name != _RATE}
        same = next((study for study in found if study.question == question), None)
        if same is None:
            found.append(Study(question, list(result.days), list(result.instances)))
            continue
        known = {_key(day) for day in same.days}
        for day in result.days:
            if _key(day) in known:
                raise ValueError(
                    f"the day of {day.arm} with seed {day.seed} at {day.requests_per_s:g} requests/s is there twice:"
                    " name each result once"
                )
        same.days.extend(result.days)
        same.instances.clear()
    return found


def _key(day: Day) -> tuple[str, int, float]:
    return (day.arm, day.seed, day.requests_per_s)


def told_of(question: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Its fields by name, those of parts as `part.name`; what is not set is left out."""
    rows: list[tuple[str, str]] = []
    for name, value in question.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{part}", text) for part, text in told_of(value)]
        elif value is not None and value != "":
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value}"))
    return rows
