"""Which requests come from a table of lengths? Rows drawn with the seed, at generated times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from orchestrator.sim.asked import Asked, Drawn, Half, Wanted, timed
from orchestrator.sim.published import reading, rows, tokens
from orchestrator.sim.workload import gamma_times


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """Tokens of prompt and answer, row by row. Raises ConfigError."""
    with reading(path, "table of lengths"):
        table = [(tokens(row, "input_tokens"), tokens(row, "output_tokens")) for row in rows(path)]
        if len(table) < 2:
            raise ValueError("it has fewer than two rows")
    return table


def half_of_rows(table: list[tuple[int, int]], half: Half) -> list[tuple[int, int]]:
    """The first or the second half of the rows. Not every other row: ShareGPT's neighbours are turns of one
    conversation, which would be on both sides."""
    middle = len(table) // 2
    match half:
        case Half.WHOLE:
            return table
        case Half.TRAIN:
            return table[:middle]
        case Half.TEST:
            return table[middle:]


def table_day(path: Path, half: Half, rng: Random, wanted: Wanted) -> Drawn:
    """Rows drawn independently, with replacement. Raises ConfigError."""
    table = half_of_rows(read_lengths(path), half)
    times = gamma_times(rng, wanted.requests_per_s, wanted.coefficient_of_variation)
    return timed(_drawn_from(table, rng), times, wanted)


def _drawn_from(table: list[tuple[int, int]], rng: Random) -> Iterator[Asked]:
    while True:
        yield Asked(0.0, *rng.choice(table))
