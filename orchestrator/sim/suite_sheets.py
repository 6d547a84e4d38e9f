"""What does a suite of days print? A table for each of its parts, winning and losing rows alike. Pure."""

from __future__ import annotations

import math

from orchestrator.sim.day import Day
from orchestrator.sim.sheets import NOTHING, Sheet
from orchestrator.sim.suite import INFAAS, OURS, PLAIN, SERVING, THEIRS, Told


def suite_sheets(told: Told) -> list[Sheet]:
    return [_serving(told), _priority(told), _scaling(told), _sweep(told)]


def _serving(told: Told) -> Sheet:
    rows = []
    for row in told.rows("serving"):
        (theirs,), (ours,) = (told.days("serving", row, arm) for arm in (THEIRS, OURS))
        gain, mean = told.serving(row)
        rows.append(
            (
                row,
                f"{SERVING[row]:g}",
                *(_text(day.scores[""].ttft_s.mean) for day in (theirs, ours)),
                *(_text(day.scores[""].ttft_s.p99) for day in (theirs, ours)),
                f"{gain:.2f}x",
                *(_text(day.scores[""].latency_s.mean) for day in (theirs, ours)),
                f"{mean:.3f}",
                *(str(day.counts.preemptions) for day in (theirs, ours)),
                *(_moves(day) for day in (theirs, ours)),
            )
        )
    columns = (
        "trace", "req/s", "TTFT s, llumnix", "ours", "P99, llumnix", "ours", "gain",
        "latency s, llumnix", "ours", "ratio", "preempted, llumnix", "ours", "moved, llumnix", "ours",
    )  # fmt: skip
    return Sheet("Serving: ours and Llumnix as its paper states it", columns, tuple(rows), 1)


def _priority(told: Told) -> Sheet:
    rows = []
    for row in told.rows("priority"):
        (ignored,), (heeded,) = (told.days("priority", row, arm) for arm in ("nobody urgent", OURS))
        gain, latency, ttft = told.priority(row)
        urgent, normal = ([day.scores[kind] for day in (ignored, heeded)] for kind in ("urgent", "normal"))
        rows.append(
            (
                row,
                *(_text(one.latency_s.mean) for one in urgent),
                f"{gain:.2f}x",
                *(_text(one.ttft_s.p99) for one in urgent),
                *(_text(one.latency_s.p99) for one in normal),
                f"{100 * latency:+.1f} %",
                *(_text(one.ttft_s.p99) for one in normal),
                f"{100 * ttft:+.1f} %",
            )
        )
    columns = (
        "S-S", "urgent, latency s", "heeded", "gain", "P99 TTFT s", "heeded",
        "normal, P99 latency s", "heeded", "cost", "P99 TTFT s", "heeded", "cost",
    )  # fmt: skip
    return Sheet("Priority: one request in ten urgent, and nobody", columns, tuple(rows), 1)


def _scaling(told: Told) -> Sheet:
    rows = []
    for row in told.rows("scaling"):
        (theirs,), (ours,) = (told.days("scaling", row, arm) for arm in (INFAAS, OURS))
        rows.append(
            (
                row,
                *(_text(day.scores[""].ttft_s.p99) for day in (theirs, ours)),
                *(_text(day.fleet.mean_instances) for day in (theirs, ours)),
                *(_text(day.scores[""].latency_s.mean) for day in (theirs, ours)),
            )
        )
    columns = (
        "band, steps", "P99 TTFT s, infaas++", "ours", "instances, infaas++", "ours", "latency s, infaas++", "ours",
    )  # fmt: skip
    saving = told.saving()
    at_equal = "their tails lie apart" if math.isnan(saving) else f"{100 * saving:.1f} % fewer instance-hours"
    return Sheet(
        "Scaling: as many as the band asks for", columns, tuple(rows), 1, f"At the same P99 of TTFT: {at_equal}."
    )


def _sweep(told: Told) -> Sheet:
    rows = []
    for row in told.rows("sweep"):
        found = zip(("P99 TTFT", "latency"), told.sweep(row), strict=True)
        cells = []
        for _, one in found:
            cells += [f"{one.mean:.3f}", f"{one.low:.3f} .. {one.high:.3f}"]
        days = told.days("sweep", row, PLAIN)
        rows.append((row, _text(sum(day.scores[""].ttft_s.p99 for day in days) / len(days)), *cells))
    columns = ("load", "P99 TTFT s without", "with, ratio", "95 %", "latency, ratio", "95 %")
    return Sheet("Never worse: ours over ours without moves", columns, tuple(rows), 1)


def _moves(day: Day) -> str:
    return f"{day.counts.migrations} (+{day.counts.broken_off} broken off)" if day.counts.migrations else NOTHING


def _text(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"
