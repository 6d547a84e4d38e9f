"""Do ServeGen's gaps and lengths have the moments that were published of them?"""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import pytest

from orchestrator.sim.servegen import Family, Gaps, Lengths, read_windows, weibull_shape


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("variation", [0.5, 1.0, 6.0])
def test_gaps_have_their_mean_and_variation_and_a_window_its_requests(family: Family, variation: float) -> None:
    gaps, rng = Gaps.of(family, 0.05, variation), Random(1)
    drawn = np.array([gaps.draw_s(rng) for _ in range(100_000)])
    assert drawn.mean() == pytest.approx(20.0, rel=0.06)
    assert drawn.std() / drawn.mean() == pytest.approx(variation, rel=0.06)
    in_a_window = [sum(1 for _ in gaps.times_s(rng, 600.0)) for _ in range(2_000)]
    assert fmean(in_a_window) == pytest.approx(30.0, rel=0.12)  # a whole gap first would make 47 of CV 6


def test_a_weibull_of_variation_one_is_exponential() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)


def test_lengths_are_those_of_their_percentiles_longest_and_mean() -> None:
    percentiles = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
    lengths = Lengths.of(percentiles, 10_000.0, 60.0)
    for share, value in zip((0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.80, 0.90, 0.95, 0.99), percentiles, strict=True):
        assert lengths.at(share) == pytest.approx(value)
    assert lengths.at(1.0) == 10_000 and lengths.at(0.0) == 10 and lengths.at(0.625) == pytest.approx(55)
    rng = Random(1)
    drawn = [lengths.draw(rng) for _ in range(200_000)]
    assert fmean(drawn) == pytest.approx(60.0, rel=0.03)
    assert all(10 <= one <= 10_000 for one in drawn)
    with pytest.raises(ValueError, match="do not ascend"):
        Lengths.of(percentiles, 99.0, 60.0)


def test_the_real_clients_lengths_have_about_their_means(data_dir: Path) -> None:
    folder = data_dir / "forecast"
    [path] = folder.glob("servegen_deepseek-r1_lengths_*.csv.gz")
    [clients] = folder.glob("servegen_deepseek-r1_clients_*.csv.gz")
    with gzip.open(path, "rt") as file:
        header, *rows = (line.strip().split(",") for line in file)
    means = {(row[1], int(row[0])): float(row[header.index("output_mean")]) for row in rows}
    shares = (np.arange(2_000) + 0.5) / 2_000
    errors = [
        fmean(client.answers.at(share) for share in shares) / means[client.name, window.at_s] - 1
        for window in read_windows([clients], [path])
        if window.at_s % 21_600 == 0
        for client in window.clients
    ]
    assert len(errors) > 50
    assert np.percentile(np.abs(errors), [50, 90]) == pytest.approx([0, 0.02], abs=0.02)
