"""What does a chart look like? Lines over axes with units, as SVG that takes its colours from the page. Pure.

Colours are the classes `c0` .. `c7` of the page's style, so that one chart is right in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.sim.scales import Kind, Scale, label, scale_of

NUM_COLOURS = 8
WIDTH, HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 44
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""One after the other, so that lines differ where colours do not."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Points
    """A y of NaN breaks the line."""
    colour: int
    """Its place in the page's order of arms."""
    low: Points = ()
    """With `high`: the edges of a band behind it."""
    high: Points = ()
    is_stepped: bool = False
    """Each y holds until the next x."""
    has_marks: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    x_label: str
    """With its unit, as `y_label`."""
    y_label: str
    lines: tuple[Line, ...]
    x_kind: Kind = Kind.LINEAR
    y_kind: Kind = Kind.LINEAR
    x_scale: Scale | None = None
    """None: it follows from the points."""
    y_scale: Scale | None = None
    has_counts: bool = False
    """Between two whole numbers of y there is nothing."""


def svg(chart: Chart) -> str:
    """Well-formed by itself; scales to the width it is given."""
    x, y = _x_scale(chart), _y_scale(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(chart.title)}">',
        f"<title>{escape(chart.title)}</title>",
        *_axes(chart, x, y),
    ]
    for line in chart.lines:
        if line.low:
            parts.append(_band(line, x, y))
    for line in chart.lines:
        parts += _line(line, x, y)
    return "\n".join([*parts, "</svg>"])


def swatch(colour: int) -> str:
    """The look of a line, for a legend."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<path class="l c{colour % NUM_COLOURS}"{_dash(colour)} d="M1 4H27"/></svg>'
    )


def _x_scale(chart: Chart) -> Scale:
    points = [point for line in chart.lines for point in line.points]
    return chart.x_scale or scale_of([x for x, y in points if math.isfinite(y)], chart.x_kind)


def _y_scale(chart: Chart) -> Scale:
    edges = [point for line in chart.lines for side in (line.points, line.low, line.high) for point in side]
    return chart.y_scale or scale_of([y for _, y in edges], chart.y_kind, from_zero=True)


def _across(x: Scale, value: float) -> float:
    return _LEFT + x.share(value) * (WIDTH - _LEFT - _RIGHT)


def _down(y: Scale, value: float) -> float:
    return HEIGHT - _BOTTOM - y.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _axes(chart: Chart, x: Scale, y: Scale) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in y.ticks():
        if chart.has_counts and value != round(value):
            continue
        at = _down(y, value)
        parts.append(f'<path class="g" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="t" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in x.ticks():
        at = _across(x, value)
        parts.append(f'<path class="g" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="t" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{label(value)}</text>')
    centre, middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    return [
        *parts,
        f'<path class="a" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text class="t u" x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>',
        f'<text class="t u" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>",
    ]


def _line(line: Line, x: Scale, y: Scale) -> list[str]:
    path, is_down, last = [], False, 0.0
    marks = []
    for at_x, at_y in line.points:
        if not math.isfinite(at_y) or not math.isfinite(at_x):
            is_down = False
            continue
        across, down = _across(x, at_x), _down(y, at_y)
        if not is_down:
            path.append(f"M{across:.1f} {down:.1f}")
        elif line.is_stepped:
            path.append(f"H{across:.1f}" if down == last else f"H{across:.1f}V{down:.1f}")
        else:
            path.append(f"L{across:.1f} {down:.1f}")
        is_down, last = True, down
        if line.has_marks:
            marks.append(f'<circle class="m c{line.colour % NUM_COLOURS}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>')
    if not path:
        return []
    dash = "" if line.low else _dash(line.colour)  # with a band it stands alone
    drawn = f'<path class="l c{line.colour % NUM_COLOURS}"{dash} d="{"".join(path)}"/>'
    return [drawn, *marks]


def _band(line: Line, x: Scale, y: Scale) -> str:
    """Of each stretch in which both edges are known."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for (at_x, low), (_, high) in zip(line.low, line.high, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            stretches[-1].append((_across(x, at_x), _down(y, low), _down(y, high)))
        elif stretches[-1]:
            stretches.append([])
    paths = []
    for stretch in filter(None, stretches):
        there = [f"{at:.1f} {top:.1f}" for at, _, top in stretch]
        back = [f"{at:.1f} {bottom:.1f}" for at, bottom, _ in reversed(stretch)]
        paths.append(f"M{'L'.join(there + back)}Z")
    return f'<path class="b c{line.colour % NUM_COLOURS}" d="{"".join(paths)}"/>'


def _dash(colour: int) -> str:
    dashes = _DASHES[colour % len(_DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""
