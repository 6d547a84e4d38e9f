"""What goes wrong on a simulated day, and when? Faults as values, and schedules of them drawn from a seed; pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

EVERYBODY = ""
"""As the other end of a partition, or of a loss."""


class Kind(Enum):
    CRASH = "crash"
    """The process of an instance is gone; `for_s` later another one of that name begins, 0: none does."""
    HANG = "hang"
    """The process of an instance stands still: no step, nothing sent, nothing taken in, no call answered."""
    STALL = "stall"
    """Its engine stands still, in the middle of a step; the agent goes on."""
    SLOW = "slow"
    """Steps take `amount` times as long."""
    PARTITION = "partition"
    """Nothing passes between `who` and `other` (empty: anybody), in either direction."""
    LOSS = "loss"
    """The network loses `amount` of the messages."""
    DRAIN = "drain"
    """An operator drains an instance, and puts it back."""
    SCALE = "scale"
    """An operator wants `amount` instances."""
    MOVE = "move"
    """An operator moves a request to the instance `who`, in the mode `how`."""
    PRIORITY = "priority"
    """An operator gives a request the level `how`."""
    LEAVE = "leave"
    """The client of a request leaves."""
    END = "end"
    """An operator ends a request."""
    CALL_OFF = "call off"
    """An operator calls a migration off that is under way, if there is one."""


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    """After the first request may come."""
    kind: Kind
    who: str = ""
    """A process: `instance-1`, `gateway-0`, `orchestrator`."""
    other: str = EVERYBODY
    for_s: float = 0.0
    """Then all is as before."""
    amount: float = 0.0
    """Where it is about a request: which of those that are open then, as a share of their number."""
    how: str = ""

    @property
    def ends_s(self) -> float:
        return self.at_s + self.for_s

    def __str__(self) -> str:
        between = f" | {self.other or 'everybody'}" if self.kind is Kind.PARTITION else ""
        rest = [f"for {self.for_s:.2f} s"] if self.for_s else []
        rest += [f"amount {self.amount:.4g}"] if self.amount else []
        rest += [self.how] if self.how else []
        what = f"{self.kind.value} {self.who}".strip()
        return f"{self.at_s:7.2f} s  {', '.join([what + between, *rest])}"


class Dice(Protocol):
    """What is needed of a `random.Random`."""

    def random(self) -> float: ...

    def randrange(self, stop: int, /) -> int: ...

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to break."""

    num_instances: int
    num_gateways: int
    span_s: float
    """Faults begin within it."""
    scales: bool
    """The orchestrator starts and stops instances; what crashes it replaces itself."""
    max_faults: int = 16


_ABOUT_REQUESTS = (Kind.MOVE, Kind.PRIORITY, Kind.LEAVE, Kind.END, Kind.CALL_OFF)
_MODES = ("live", "live", "live", "blocking", "recompute")
_LEVELS = ("high", "normal", "low")


def chaos(dice: Dice, scene: Scene) -> tuple[Fault, ...]:
    """A schedule, in order of time. Each day has some kinds only: what is rare among all of them meets its like more
    often among few (swarm testing, Groce et al., ISSTA'12)."""
    able = [kind for kind in Kind if scene.scales or kind is not Kind.SCALE]
    kinds = [kind for kind in able if dice.random() < 0.5] or able
    count = 3 + dice.randrange(scene.max_faults - 2)
    faults = [_fault(dice, kinds[dice.randrange(len(kinds))], scene) for _ in range(count)]
    faults += [move for fault in faults if fault.kind not in _ABOUT_REQUESTS for move in _moves_before(dice, fault)]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _moves_before(dice: Dice, fault: Fault) -> list[Fault]:
    """Requests are often on their way to somebody when something befalls him."""
    count = dice.randrange(4) if fault.who else 0
    how_s = [dice.random() ** 2 * 0.6 for _ in range(count)]
    modes = [_MODES[dice.randrange(len(_MODES))] for _ in range(count)]
    return [
        Fault(max(0.0, round(fault.at_s - before_s, 3)), Kind.MOVE, fault.who, amount=round(dice.random(), 4), how=mode)
        for before_s, mode in zip(how_s, modes, strict=True)
    ]


def _fault(dice: Dice, kind: Kind, scene: Scene) -> Fault:
    at_s = round(dice.uniform(0.0, scene.span_s), 3)
    instance = f"instance-{dice.randrange(scene.num_instances)}"
    how_long_s = _how_long_s(dice)
    if kind is Kind.CRASH:
        returns = not scene.scales and dice.random() < 0.7
        return Fault(at_s, kind, instance, for_s=round(dice.uniform(0.1, 5.0), 3) if returns else 0.0)
    if kind is Kind.SLOW:
        return Fault(at_s, kind, instance, for_s=how_long_s, amount=round(dice.uniform(1.5, 20.0), 1))
    if kind is Kind.PARTITION:
        ends = [f"instance-{number}" for number in range(scene.num_instances)]
        if dice.random() < 0.1:
            return Fault(at_s, kind, f"gateway-{dice.randrange(scene.num_gateways)}", "orchestrator", for_s=how_long_s)
        ends += [f"gateway-{number}" for number in range(scene.num_gateways)] + ["orchestrator", EVERYBODY]
        other = ends[dice.randrange(len(ends))]
        return Fault(at_s, kind, instance, other if other != instance else EVERYBODY, for_s=how_long_s)
    if kind is Kind.LOSS:
        # Of few messages, or of many for a moment: each token that is lost costs its request.
        share = dice.random() ** 3 * 0.3
        return Fault(at_s, kind, for_s=round(min(how_long_s, 0.1 / (share + 0.01)), 3), amount=round(share + 1e-4, 4))
    if kind is Kind.SCALE:
        return Fault(at_s, kind, amount=float(1 + dice.randrange(scene.num_instances + 2)))
    if kind in _ABOUT_REQUESTS:
        how = _MODES[dice.randrange(len(_MODES))] if kind is Kind.MOVE else ""
        how = _LEVELS[dice.randrange(len(_LEVELS))] if kind is Kind.PRIORITY else how
        return Fault(at_s, kind, instance if kind is Kind.MOVE else "", amount=round(dice.random(), 4), how=how)
    return Fault(at_s, kind, instance, for_s=how_long_s)


def _how_long_s(dice: Dice) -> float:
    """Mostly short; sometimes past every time-out of a gateway."""
    if dice.random() < 0.15:
        return round(dice.uniform(8.0, 16.0), 3)
    return round(dice.uniform(0.05, 4.0), 3)
