"""What does downtime against length look like? One picture: medians with p10 .. p90, log-log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from bench.report import spread_of

COLOURS = {"live": "#1b7f5c", "blocking copy": "#d98324", "re-prefill": "#a4303f"}


def draw(points: Mapping[tuple[str, int], Sequence[float]], path: Path) -> None:
    """`points` maps (arm, tokens) to downtimes in ms; writes a PNG, folders are made."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=150)
    for arm, colour in COLOURS.items():
        lengths = sorted(length for name, length in points if name == arm)
        spreads = [spread_of(points[arm, length]) for length in lengths]
        axes.plot(lengths, [row["median"] for row in spreads], marker="o", color=colour, label=arm)
        axes.fill_between(
            lengths, [row["p10"] for row in spreads], [row["p90"] for row in spreads], color=colour, alpha=0.18, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({length for _, length in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("tokens in the request when it moves")
    axes.set_ylabel("downtime, ms")
    axes.set_title("A running request moves: how long it stands still")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
