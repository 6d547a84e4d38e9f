"""Which requests do ServeGen's clients send? Each its own gaps and lengths, as was measured of it.

Gaps are of the family, mean and coefficient of variation published for its ten minutes; lengths are drawn from its
percentiles. Rates of all clients are scaled together; gaps keep their coefficient of variation, so that a client's
bursts have as many requests as they had. Clients whose lengths were not published send nothing.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from random import Random

from orchestrator.errors import ConfigError
from orchestrator.sim.asked import Asked, Drawn, Half, Wanted, half_of, paced
from orchestrator.sim.published import number, reading, rows

WINDOW_S = 600
LENGTHS_WINDOW_S = 6 * 3600
NUM_NAMED = 4
"""Clients of a day that are a kind of their own; the others, who send less, are one together."""
SHARES = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.80, 0.90, 0.95, 0.99)
_COLUMNS = ("p1", "p5", "p10", "p25", "p50", "p75", "p80", "p90", "p95", "p99")
_WEIBULL_SHAPES = (0.05, 1_000.0)
_BENDS = (1.0, 100.0)
"""Of the longest hundredth: from a straight line to one request of thousands that is as long as the longest."""


# ---------------------------------------------------------------------- lengths
@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens by share of the requests that have fewer: straight lines between the percentiles, and above the last one a
    power of the share, bent as far as it may so that the mean is the published one (a straight line up to the longest
    of thousands would be far too long)."""

    percentiles: tuple[float, ...]
    """At SHARES."""
    longest: float
    bend: float

    @classmethod
    def of(cls, percentiles: tuple[float, ...], longest: float, mean: float) -> Lengths:
        """Raises ValueError unless they ascend."""
        if list(percentiles) != sorted(percentiles) or longest < percentiles[-1]:
            raise ValueError(f"percentiles do not ascend: {percentiles}, {longest}")
        below = SHARES[0] * percentiles[0] + sum(
            (SHARES[i + 1] - SHARES[i]) * (percentiles[i] + percentiles[i + 1]) / 2 for i in range(len(SHARES) - 1)
        )
        last, left = percentiles[-1], 1 - SHARES[-1]
        above = (mean - below) / left - last  # what the longest hundredth is longer, in the mean
        least, most = _BENDS
        bend = (longest - last) / above - 1 if above > 0 else most
        return cls(percentiles, longest, min(max(bend, least), most))

    def at(self, share: float) -> float:
        values = self.percentiles
        if share <= SHARES[0]:
            return values[0]
        if share >= SHARES[-1]:
            within = (share - SHARES[-1]) / (1 - SHARES[-1])
            return values[-1] + (self.longest - values[-1]) * math.pow(within, self.bend)
        after = bisect.bisect_left(SHARES, share)
        low, high = SHARES[after - 1], SHARES[after]
        return values[after - 1] + (values[after] - values[after - 1]) * (share - low) / (high - low)

    def draw(self, rng: Random) -> int:
        return max(1, round(self.at(rng.random())))


# ---------------------------------------------------------------------- gaps
class Family(Enum):
    GAMMA = "Gamma"
    WEIBULL = "Weibull"


@dataclass(frozen=True, slots=True)
class Gaps:
    """Between requests of one client."""

    family: Family
    shape: float
    scale_s: float

    @classmethod
    def of(cls, family: Family, requests_per_s: float, coefficient_of_variation: float) -> Gaps:
        """Of that mean rate and variation. The shapes published beside them are not used: they were fitted to most of
        the gaps, and have other means and variations."""
        if family is Family.WEIBULL:
            shape = weibull_shape(coefficient_of_variation)
            return cls(family, shape, 1 / (requests_per_s * math.gamma(1 + 1 / shape)))
        shape = coefficient_of_variation**-2
        return cls(family, shape, 1 / (shape * requests_per_s))

    def draw_s(self, rng: Random) -> float:
        if self.family is Family.WEIBULL:
            return rng.weibullvariate(self.scale_s, self.shape)
        return rng.gammavariate(self.shape, self.scale_s)

    def first_s(self, rng: Random) -> float:
        """From any moment to the next request: a uniform share of a gap, drawn as a moment meets it (by its length). A
        whole gap instead would put (CV^2 - 1) / 2 requests too many into each window."""
        if self.family is Family.WEIBULL:
            met_s = self.scale_s * math.pow(rng.gammavariate(1 + 1 / self.shape, 1.0), 1 / self.shape)
        else:
            met_s = rng.gammavariate(self.shape + 1, self.scale_s)
        return rng.random() * met_s

    def times_s(self, rng: Random, until_s: float) -> Iterator[float]:
        """From 0 on."""
        at_s = self.first_s(rng)
        while at_s < until_s:
            yield at_s
            at_s += self.draw_s(rng)


def weibull_shape(coefficient_of_variation: float) -> float:
    """Whose CV^2 = gamma(1 + 2/k) / gamma(1 + 1/k)^2 - 1 it is, by bisection."""
    wanted = math.log1p(coefficient_of_variation**2)
    low, high = map(math.log, _WEIBULL_SHAPES)
    for _ in range(60):
        middle = (low + high) / 2
        shape = math.exp(middle)
        if math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape) > wanted:
            low = middle
        else:
            high = middle
    return math.exp(low)


# ---------------------------------------------------------------------- clients
@dataclass(frozen=True, slots=True)
class Client:
    """In one window."""

    name: str
    requests_per_s: float
    coefficient_of_variation: float
    family: Family
    prompts: Lengths
    answers: Lengths


@dataclass(frozen=True, slots=True)
class Window:
    """WINDOW_S long."""

    at_s: int
    clients: tuple[Client, ...]

    @property
    def requests_per_s(self) -> float:
        return sum(client.requests_per_s for client in self.clients)


def read_windows(clients: Sequence[Path], lengths: Sequence[Path]) -> list[Window]:
    """In order of time, of the clients whose lengths are there. Raises ConfigError."""
    known = _read_lengths(lengths)
    by_window: dict[int, list[Client]] = {}
    for path in clients:
        with reading(path, "table of ServeGen's clients"):
            for row in rows(path):
                at_s, name = int(number(row, "ts_s")), str(row["client"])
                present = by_window.setdefault(at_s, [])
                found = known.get((name, at_s // LENGTHS_WINDOW_S))
                rate, variation = number(row, "rate_rps"), number(row, "iat_cv")
                if found is not None and rate and variation:
                    present.append(Client(name, rate, variation, Family(row["pattern"]), *found))
    windows = [Window(at_s, tuple(present)) for at_s, present in sorted(by_window.items()) if present]
    if not windows:
        raise ConfigError(f"no client of {clients[0]} has lengths in {lengths[0]}")
    return windows


def _read_lengths(paths: Sequence[Path]) -> dict[tuple[str, int], tuple[Lengths, Lengths]]:
    """Of prompts and answers, by client and window."""
    found = {}
    for path in paths:
        with reading(path, "table of lengths of ServeGen's clients"):
            for row in rows(path):
                of_prompts, of_answers = (
                    Lengths.of(
                        tuple(number(row, f"{which}_{column}") for column in _COLUMNS),
                        number(row, f"{which}_max"),
                        number(row, f"{which}_mean"),
                    )
                    for which in ("input", "output")
                )
                key = (str(row["client"]), int(number(row, "ts_s")) // LENGTHS_WINDOW_S)
                found[key] = (of_prompts, of_answers)
    return found


# ---------------------------------------------------------------------- days
def servegen_day(clients: list[Path], lengths: list[Path], half: Half, rng: Random, wanted: Wanted) -> Drawn:
    """Begins at a window that the seed picks, and goes on with the next ones, ten minutes each; after the last comes
    the first. Raises ConfigError."""
    windows = read_windows(clients, lengths)
    windows = windows[half_of([window.at_s for window in windows], half)]
    start = rng.randrange(len(windows))
    windows = windows[start:] + windows[:start]
    todays = windows[: math.ceil(wanted.count / wanted.requests_per_s / WINDOW_S)]
    mean_rate = sum(window.requests_per_s for window in todays) / len(todays)
    return paced(stream(windows, rng, wanted.requests_per_s / mean_rate, _most_active(todays)), wanted)


def _most_active(windows: Sequence[Window]) -> set[str]:
    rates: dict[str, float] = {}
    for window in windows:
        for client in window.clients:
            rates[client.name] = rates.get(client.name, 0.0) + client.requests_per_s
    return set(sorted(rates, key=lambda name: (-rates[name], name))[:NUM_NAMED])


def stream(windows: Sequence[Window], rng: Random, factor: float, named: set[str]) -> Iterator[Asked]:
    """All clients' requests, in order of arrival, without end; rates times `factor`. Who is not `named` is one of the
    others."""
    for index in count():
        window = windows[index % len(windows)]
        began_s = float(index * WINDOW_S)
        arrivals: list[tuple[float, int]] = []
        for place, client in enumerate(window.clients):
            gaps = Gaps.of(client.family, client.requests_per_s * factor, client.coefficient_of_variation)
            arrivals += [(began_s + at_s, place) for at_s in gaps.times_s(rng, WINDOW_S)]
        for at_s, place in sorted(arrivals):
            client = window.clients[place]
            kind = f"client {client.name}" if client.name in named else "other clients"
            yield Asked(at_s, client.prompts.draw(rng), client.answers.draw(rng), kind)
