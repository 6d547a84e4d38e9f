"""What does a run look like? KV use of the instances over time, with every committed move drawn in."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from orchestrator.demo.watch import Drain, History, Sample

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

UPPER, LOWER = "#2a6f97", "#d1495b"
INK, FAINT = "#22303c", "#8d99a6"
BAND = 0.17
"""Half the height of the strip between the two instances, where the arrows run, in units of full KV use."""
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw(history: History, title: str, path: Path) -> None:
    """Write a PNG: the first instance above, growing upward; the second below, growing downward; moves between them."""
    names = sorted({sample.instance for sample in history.samples})[:2]
    figure, axes = plt.subplots(figsize=(13, 6.6), dpi=130, layout="constrained")
    end_s = max((sample.at_s for sample in history.samples), default=1.0)
    for name, sign, colour in zip(names, (1, -1), (UPPER, LOWER), strict=False):
        _draw_use(axes, [sample for sample in history.samples if sample.instance == name], sign, colour)
        axes.text(
            end_s * 1.008,
            sign * (BAND + 0.5),
            name,
            color=colour,
            rotation=-90,
            va="center",
            fontsize=12,
            weight="bold",
        )
        for drain in history.drains:
            if drain.instance == name:
                _draw_drain(axes, drain, sign)
    _draw_moves(axes, history, names)
    _dress(axes, end_s, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _draw_use(axes: Axes, samples: list[Sample], sign: int, colour: str) -> None:
    at_s = [sample.at_s for sample in samples]
    base = sign * BAND
    level = [base + sign * sample.use for sample in samples]
    axes.fill_between(at_s, base, level, color=colour, alpha=0.28, linewidth=0, zorder=2)
    axes.plot(at_s, level, color=colour, linewidth=1.6, zorder=3)
    axes.axhline(base, color=colour, linewidth=1.0, zorder=3)


def _draw_drain(axes: Axes, drain: Drain, sign: int) -> None:
    low, high = sorted((sign * BAND, sign * (BAND + 1.0)))
    axes.fill_between(
        [drain.called_s, drain.undrained_s], low, high, color=FAINT, alpha=0.16, linewidth=0, hatch="///", zorder=1
    )
    took = "not empty" if drain.drain_s is None else f"empty in {drain.drain_s:.1f} s"
    axes.annotate(
        f"drain: {drain.num_owned} requests,\n{took}",
        (drain.called_s, sign * (BAND + 0.99)),
        xytext=(3, -3 * sign),
        textcoords="offset points",
        va="top" if sign > 0 else "bottom",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1.5},
        zorder=6,
    )


def _draw_moves(axes: Axes, history: History, names: list[str]) -> None:
    committed = [move for move in history.moves.values() if move.outcome == "committed"]
    for move in committed:
        is_down = bool(names) and move.source == names[0]
        at_s = move.ended_s - history.started_s
        start, end = (BAND, -BAND) if is_down else (-BAND, BAND)
        axes.annotate(
            "",
            (at_s, end),
            xytext=(at_s, start),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.45,head_width=0.2",
                "color": UPPER if is_down else LOWER,
                "linewidth": 1.1,
                "alpha": 0.8,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=5,
        )


def _dress(axes: Axes, end_s: float, title: str) -> None:
    axes.set_title(title, fontsize=13, color=INK, loc="left", pad=12)
    axes.set_xlim(0, end_s)
    axes.set_ylim(-1.02 - BAND, 1.02 + BAND)
    axes.set_yticks([sign * (BAND + tick) for sign in (1, -1) for tick in TICKS])
    axes.set_yticklabels([f"{tick:.0%}" for _ in (1, -1) for tick in TICKS], color=INK)
    axes.set_xlabel("time (s)", color=INK)
    axes.set_ylabel("KV blocks in use", color=INK)
    axes.axhspan(-BAND, BAND, color="#f4f6f8", zorder=0)
    axes.grid(axis="x", color="#dde3e8", linewidth=0.7, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [
        Line2D([], [], color=UPPER, marker="v", linewidth=1.1, label="move from the upper instance"),
        Line2D([], [], color=LOWER, marker="^", linewidth=1.1, label="move from the lower instance"),
        Patch(facecolor=FAINT, alpha=0.3, hatch="///", label="draining, then empty"),
    ]
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
