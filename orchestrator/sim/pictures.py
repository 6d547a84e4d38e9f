"""Which charts tell what became of simulated days? Latencies, freeness, moves; and figures over the rate. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from orchestrator.sim.chart import Chart, Line
from orchestrator.sim.day import Day
from orchestrator.sim.measures import SHARES, Curve
from orchestrator.sim.scales import Kind, scale_of
from orchestrator.sim.score import Score
from orchestrator.sim.series import Series
from orchestrator.sim.sheets import arms_of, rates_of

Colours = Mapping[str, int]
"""Each arm's, all over a page."""

OVER_RATES: tuple[tuple[str, str, Callable[[Score], float]], ...] = (
    ("Time to first token, mean", "TTFT, s", lambda score: score.ttft_s.mean),
    ("Time to first token, P99", "TTFT, s", lambda score: score.ttft_s.p99),
    ("Time per output token, mean", "TPOT, s", lambda score: score.tpot_s.mean),
    ("Latency, mean", "latency, s", lambda score: score.latency_s.mean),
    ("Latency, P99", "latency, s", lambda score: score.latency_s.p99),
    ("Targets met", "share of requests, %", lambda score: 100 * score.attainment),
)
_WIDE = 30.0
"""Values that differ by more than this factor stand on a logarithmic axis."""


def of_latencies(days: Sequence[Day], colours: Colours) -> list[Chart]:
    """Of one rate: what share of the requests had their first token, and their answer, within which time. Failed ones
    never had: their lines end below 100 %. Several days of an arm: the mean over them at each share."""
    kinds = [kind for kind in days[0].curves if all(kind in day.curves for day in days)]
    charts = []
    for kind in kinds if len(kinds) > 2 else [""]:
        of_whom = f", {kind} requests" if kind else ""
        for what, unit, values in (
            ("Time to first token", "TTFT, s", lambda curve: curve.ttft_s),
            ("Latency of whole answers", "latency, s", lambda curve: curve.latency_s),
        ):
            lines = tuple(
                Line(arm, _cdf([day.curves[kind] for day in days if day.arm == arm], values), colours[arm])
                for arm in arms_of(days)
            )
            charts.append(Chart(f"{what}{of_whom}", unit, "requests, %", lines, x_kind=Kind.LOG))
    return charts


def _cdf(curves: Sequence[Curve], values: Callable[[Curve], list[float]]) -> list[tuple[float, float]]:
    known = [values(curve) for curve in curves if values(curve)]
    num_done, num_failed = (sum(getattr(curve, name) for curve in curves) for name in ("num_done", "num_failed"))
    if not known:
        return []
    answered = num_done / (num_done + num_failed)
    means = [statistics.fmean(each) for each in zip(*known, strict=True)]
    return [(value, 100 * share * answered) for value, share in zip(means, SHARES, strict=True)]


def of_fleets(days: Sequence[Day], colours: Colours) -> list[Chart]:
    """Of one rate: the first day of each arm, second by second."""
    first = [next(day for day in days if day.arm == arm) for arm in arms_of(days)]
    edges = [value for day in first for side in _freeness(day.series) for _, value in side]
    scale = scale_of(edges, Kind.BOTH, from_zero=True)
    charts = []
    for day in first:
        middle, low, high = _freeness(day.series)
        line = Line("median of the instances; band: least to most", middle, colours[day.arm], low, high)
        title, unit = f"Freeness, {day.arm}", "freeness, decode steps"
        charts.append(Chart(title, "time, s", unit, (line,), y_kind=Kind.BOTH, y_scale=scale))
    for title, unit, column in (
        ("Moves", "committed moves", lambda series: series.moves),
        ("Requests that wait", "requests", lambda series: series.waiting),
        ("Fragmentation", "fragmented blocks, %", lambda series: [100 * one for one in series.fragmentation]),
        ("Instances", "instances", lambda series: series.instances),
    ):
        if title == "Instances" and all(len(set(day.series.instances)) < 2 for day in first):
            continue
        lines = tuple(
            Line(day.arm, _over_time(day.series, column(day.series)), colours[day.arm], is_stepped=True)
            for day in first
        )
        charts.append(Chart(title, "time, s", unit, lines, has_counts=not unit.endswith("%")))
    return charts


def _freeness(series: Series) -> tuple[list[tuple[float, float]], ...]:
    columns = (series.freeness_median, series.freeness_min, series.freeness_max)
    return tuple(_over_time(series, column) for column in columns)


def _over_time(series: Series, column: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(series.at_s, column, strict=True))


def over_rates(days: Sequence[Day], colours: Colours) -> list[Chart]:
    """Figures of all requests against the rate; none for a single rate. Several days: their mean."""
    rates = rates_of(days)
    if len(rates) < 2:
        return []
    charts = []
    for title, unit, of in OVER_RATES:
        lines = tuple(
            Line(
                arm,
                [(rate, _mean([of(day.scores[""]) for day in days if (day.arm, day.requests_per_s) == (arm, rate)]))
                 for rate in rates],
                colours[arm],
                has_marks=True,
            )
            for arm in arms_of(days)
        )  # fmt: skip
        values = [value for line in lines for _, value in line.points if math.isfinite(value)]
        if not values:
            continue
        is_wide = min(values) > 0 and max(values) > _WIDE * min(values)
        charts.append(Chart(title, "requests a second", unit, lines, y_kind=Kind.LOG if is_wide else Kind.LINEAR))
    return charts


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan
