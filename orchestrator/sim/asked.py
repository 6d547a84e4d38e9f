"""Which of a workload's requests does an engine take, and when? As vLLM takes them, at the rate wanted; pure.

Of what is too long vLLM refuses the one whose prompt leaves no room for a token (400), and ends the other's answer
where the model's length is reached. So here: the first are left out, the second cut short, and both are counted.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.errors import ConfigError
from orchestrator.sim.arrivals import Arrival

MAX_LEFT_OUT = 1_000
"""For each request that is taken, before a workload is given up as too long for the engine."""


class Half(Enum):
    """Of a trace, in time: a policy is tuned on one and judged on the other."""

    WHOLE = ""
    TRAIN = "train"
    """The first."""
    TEST = "test"
    """The second."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of one day's requests."""

    requests_per_s: float
    count: int
    longest: int
    """Tokens of prompt and answer that an engine holds."""
    coefficient_of_variation: float = 1.0
    """Of the gaps between them, where they are generated; 1 is Poisson."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as its source has it."""

    at_s: float
    """By the source's clock."""
    num_prompt: int
    num_answer: int
    kind: str = ""
    prefix_ids: tuple[int, ...] = ()
    """See `Arrival`."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One day's requests."""

    arrivals: list[Arrival]
    num_left_out: int = 0
    """So many more came meanwhile whose prompt alone was too long (of a trace: until the request after the last)."""
    num_cut_short: int = 0
    """Of the arrivals: the answer ends where the engine's length is reached."""


@dataclass(slots=True)
class Intake:
    """Takes what fits into `longest` tokens, and counts the rest."""

    longest: int
    num_taken: int = 0
    num_left_out: int = 0
    cut_short: set[int] = field(default_factory=set)
    """Of those taken, by number."""

    def take(self, stream: Iterable[Asked], count: int) -> Iterator[Asked]:
        """The first `count` of a stream that fit. Raises ConfigError when hardly any does."""
        for one in stream:
            if self.num_taken == count:
                return
            if one.num_prompt >= self.longest:
                self.num_left_out += 1
                if self.num_left_out > MAX_LEFT_OUT * (self.num_taken + 1):
                    raise ConfigError(f"hardly any prompt of this workload is shorter than {self.longest} tokens")
                continue
            if one.num_prompt + one.num_answer > self.longest:
                self.cut_short.add(self.num_taken)
            self.num_taken += 1
            yield one


def timed(asked: Iterable[Asked], times: Iterable[float], wanted: Wanted) -> Drawn:
    """The first of these that fit, at these times."""
    intake = Intake(wanted.longest)
    taken = intake.take(asked, wanted.count)
    arrivals = [_arrival(index, at_s, one, wanted.longest) for index, (one, at_s) in enumerate(zip(taken, times))]  # noqa: B905
    return Drawn(arrivals, intake.num_left_out, len(intake.cut_short))


def paced(asked: Iterable[Asked], wanted: Wanted) -> Drawn:
    """The first of these that fit, their own times shrunk or stretched so that they come at the wanted rate: `count` of
    them from the first one's arrival to that of the next one after the last. `asked` must not end before. All gaps keep
    their proportions. Raises ConfigError when all come at one instant."""
    intake = Intake(wanted.longest)
    taken = list(intake.take(asked, wanted.count + 1))
    began_s, span_s = taken[0].at_s, taken[-1].at_s - taken[0].at_s
    if span_s <= 0:
        raise ConfigError(f"{wanted.count} requests of this workload come at one instant: ask for more of them")
    factor = wanted.count / wanted.requests_per_s / span_s
    del taken[wanted.count :]
    arrivals = [_arrival(index, (one.at_s - began_s) * factor, one, wanted.longest) for index, one in enumerate(taken)]
    return Drawn(arrivals, intake.num_left_out, len(intake.cut_short - {wanted.count}))


def half_of(times_s: Sequence[float], half: Half) -> slice:
    """Where it lies in these times, which ascend. Raises ConfigError when all are one instant."""
    if half is Half.WHOLE:
        return slice(None)
    first_of_test = bisect.bisect_left(times_s, (times_s[0] + times_s[-1]) / 2)
    if not first_of_test:
        raise ConfigError("this workload is too short to have halves")
    return slice(first_of_test) if half is Half.TRAIN else slice(first_of_test, None)


def _arrival(index: int, at_s: float, one: Asked, longest: int) -> Arrival:
    """No source says what its clients asked for at most, so they ask for all there is: the answer's length is not
    given away."""
    most = longest - one.num_prompt
    answer = min(one.num_answer, most)
    return Arrival(index, at_s, one.num_prompt, answer, most, kind=one.kind, prefix_ids=one.prefix_ids)
