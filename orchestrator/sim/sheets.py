"""Which figures of simulated days stand side by side? Tables of text, for terminals and pages alike. Pure.

Every arm has its rows, in the order in which the arms were asked for, and none is marked. Where an arm has several days
a figure is the mean over them, its `+-` the half width of the 95 % interval of that mean; for one day it is that of
batch means within the day (`score.py`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from orchestrator.sim.day import Day
from orchestrator.sim.paired import Ratio, half_width, ratio
from orchestrator.sim.score import Figure, Score

NOTHING = "-"
"""Where there is no such figure."""
_ALL = "all"

Measure = Callable[[Day], float]


@dataclass(frozen=True, slots=True)
class Sheet:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int
    """So many columns, the first ones, are names; the others are figures."""
    note: str = ""


def sheets_of(days: Sequence[Day], against: str = "") -> list[Sheet]:
    """All tables of these days; with the ratios to the arm `against`, if that is named."""
    found = [answers(days), tokens(days), fleets(days)]
    return [*found, ratios(days, against)] if against else found


# ---------------------------------------------------------------------- the tables
def answers(days: Sequence[Day]) -> Sheet:
    columns = ("n", "TTFT s", "+-", "P50", "P99", "latency s", "+-", "P50", "P99", "targets met %", "failed")

    def cells(own: Sequence[Day], kind: str) -> list[str]:
        scores = [day.scores[kind] for day in own]
        return [
            str(sum(one.latency_s.n for one in scores)),
            *_with_interval([one.ttft_s for one in scores], "{:.3f}", "{:.2f}"),
            *_with_interval([one.latency_s for one in scores], "{:.2f}", "{:.1f}"),
            _text(100 * _mean(one.attainment for one in scores), "{:.1f}"),
            str(sum(one.num_failed for one in scores)),
        ]

    return _of_requests("Answers", columns, days, cells)


def tokens(days: Sequence[Day]) -> Sheet:
    times = ("TPOT ms", "P50", "P99", "ITL ms", "P50", "P99", "longest gap s", "P50", "P99")
    columns = (*times, "preempted", "lost s", "lost tokens")

    def cells(own: Sequence[Day], kind: str) -> list[str]:
        scores = [day.scores[kind] for day in own]
        return [
            *_spread([one.tpot_s for one in scores], 1e3, "{:.1f}"),
            *_spread([one.itl_s for one in scores], 1e3, "{:.1f}"),
            *_spread([one.longest_gap_s for one in scores], 1, "{:.2f}"),
            str(sum(one.num_preemptions for one in scores)),
            f"{sum(one.lost_s for one in scores):.1f}",
            str(sum(one.lost_tokens for one in scores)),
        ]

    note = (
        "ITL: gaps between tokens, all of them; longest gap: of each request. Lost: from a preemption until all was"
        " computed again. Without the first tenth of the requests."
    )
    return _of_requests("Tokens and interruptions", columns, days, cells, note)


def fleets(days: Sequence[Day]) -> Sheet:
    has_rates = _has_rates(days)
    moves = ("moved", "broken off", "copied GB", "stopped ms", "P99", "downtime ms", "P99")
    columns = (*moves, "fragmented %", "P99", "preempted", "cached %", "instances", "instance h")
    rows, outcomes = [], dict[str, Counter[str]]()
    for names, own in _groups(days):
        measures, counts = [day.fleet for day in own], [day.counts for day in own]
        for one in measures:
            outcomes.setdefault(names[1], Counter()).update(one.outcomes)
        cells = [
            str(sum(one.migrations for one in counts)),
            str(sum(one.broken_off for one in counts)),
            f"{sum(one.moved_bytes for one in measures) / 1e9:.1f}",
            *_mean_and_tail([one.stopped_s for one in measures], 1e3, "{:.1f}"),
            *_mean_and_tail([one.downtime_s for one in measures], 1e3, "{:.1f}"),
            *_mean_and_tail([one.fragmentation for one in measures], 100, "{:.2f}"),
            str(sum(one.preemptions for one in counts)),
            _text(100 * _mean(one.found_share for one in counts), "{:.1f}"),
            _text(_mean(one.mean_instances for one in measures), "{:.1f}"),
            f"{sum(one.instance_s for one in measures) / 3600:.2f}",
        ]
        rows.append((*(names if has_rates else names[1:]), *cells))
    note = "Whole days, the first requests included. Cached: share of the prompts' tokens that an instance had already."
    for arm, counts_of in outcomes.items():
        if counts_of:
            told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts_of.items()))
            note += f" Migrations of {arm}: {told}."
    head = ("requests/s", "arm") if has_rates else ("arm",)
    return Sheet("Fleets", (*head, *columns), tuple(rows), len(head), note)


COMPARED: tuple[tuple[str, Callable[[Score], float]], ...] = (
    ("TTFT, mean", lambda score: score.ttft_s.mean),
    ("TTFT, P99", lambda score: score.ttft_s.p99),
    ("TPOT, mean", lambda score: score.tpot_s.mean),
    ("TPOT, P99", lambda score: score.tpot_s.p99),
    ("longest gap, P99", lambda score: score.longest_gap_s.p99),
    ("latency, mean", lambda score: score.latency_s.mean),
    ("latency, P99", lambda score: score.latency_s.p99),
)
"""In all of these less is better."""


def ratios(days: Sequence[Day], against: str) -> Sheet:
    """Of each arm over that one, over the days that both have lived. Raises ValueError when it is not among them."""
    if not any(day.arm == against for day in days):
        raise ValueError(f"there is no day of {against!r} to compare with")
    has_rates, rows = _has_rates(days), []
    of_reference = {(day.requests_per_s, day.seed): day for day in days if day.arm == against}
    for names, own in _groups(days):
        both = [(of_reference[key], day) for day in own if (key := (day.requests_per_s, day.seed)) in of_reference]
        if names[1] == against or not both:
            continue
        for kind in _kinds(own):
            for what, of in COMPARED:
                theirs, ours = ([of(day.scores[kind]) for day in side] for side in zip(*both, strict=True))
                head = (*(names if has_rates else names[1:]), kind or _ALL, what)
                rows.append((*head, *_ratio_cells(ratio(theirs, ours), len(both))))
    head = (*(("requests/s",) if has_rates else ()), "arm", "requests", "measure")
    note = (
        f"Of the arm over {against}, day by day over the same requests: geometric mean, and its 95 % interval"
        " (Student's t; from two days on). better, worse: the interval lies wholly below, above 1."
    )
    return Sheet(f"Ratios to {against}", (*head, "ratio", "95 % interval", "is", "days"), tuple(rows), len(head), note)


def _ratio_cells(found: Ratio, num_days: int) -> tuple[str, ...]:
    interval = f"{found.low:.3f} .. {found.high:.3f}" if math.isfinite(found.low) else NOTHING
    is_what = found.verdict if math.isfinite(found.low) else NOTHING
    return (_text(found.mean, "{:.3f}"), interval, is_what, str(num_days))


# ---------------------------------------------------------------------- rows
def arms_of(days: Iterable[Day]) -> list[str]:
    """In the order of their first days."""
    return list(dict.fromkeys(day.arm for day in days))


def rates_of(days: Iterable[Day]) -> list[float]:
    """From the lowest to the highest."""
    return sorted({day.requests_per_s for day in days})


def _has_rates(days: Sequence[Day]) -> bool:
    return len(rates_of(days)) > 1


def _groups(days: Sequence[Day]) -> list[tuple[tuple[str, str], list[Day]]]:
    """Days of one rate and arm, under both."""
    found = []
    for rate in rates_of(days):
        for arm in arms_of(days):
            own = [day for day in days if day.arm == arm and day.requests_per_s == rate]
            if own:
                found.append(((f"{rate:g}", arm), own))
    return found


def _kinds(own: Sequence[Day]) -> list[str]:
    """All requests, and each kind where there are several."""
    kinds = [kind for kind in own[0].scores if all(kind in day.scores for day in own)]
    return kinds if len(kinds) > 2 else [""]


def _of_requests(
    title: str,
    columns: tuple[str, ...],
    days: Sequence[Day],
    cells: Callable[[Sequence[Day], str], list[str]],
    note: str = "",
) -> Sheet:
    has_rates, rows = _has_rates(days), []
    for names, own in _groups(days):
        for kind in _kinds(own):
            rows.append((*(names if has_rates else names[1:]), kind or _ALL, *cells(own, kind)))
    head = (*(("requests/s",) if has_rates else ()), "arm", "requests")
    return Sheet(title, (*head, *columns), tuple(rows), len(head), note)


# ---------------------------------------------------------------------- cells
def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _text(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else NOTHING


def _with_interval(figures: Sequence[Figure], form: str, coarse: str) -> list[str]:
    means = [one.mean for one in figures if math.isfinite(one.mean)]
    half = figures[0].half_width if len(figures) == 1 else half_width(means)
    mean, *tail = _spread(figures, 1, form)
    return [mean, _text(half, form), tail[0], _text(_mean(one.p99 for one in figures), coarse)]


def _spread(figures: Sequence[Figure], factor: float, form: str) -> list[str]:
    each = ([one.mean for one in figures], [one.p50 for one in figures], [one.p99 for one in figures])
    return [_text(factor * _mean(values), form) for values in each]


def _mean_and_tail(figures: Sequence[Figure], factor: float, form: str) -> list[str]:
    mean, _, p99 = _spread(figures, factor, form)
    return [mean, p99]
