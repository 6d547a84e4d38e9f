"""How does one migration go, event by event? Two real machines on a made-up clock, told as text: who, event, effects,
state.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from migration import effects as ef
from migration import events as ev
from migration.destination import DestinationMachine
from migration.effects import DestinationEffect, SourceEffect
from migration.params import MigrationParams, Mode
from migration.source import SourceMachine
from migration.types import (
    CopyReceipt,
    Description,
    NotStopped,
    Progress,
    RequestId,
    Reservation,
    StoppedRequest,
)
from tests.support.protocol_scenario import MIGRATION, MIGRATION_ID
from tests.support.protocol_words import effects_in_words, event_in_words

BLOCK_SIZE = 4
STEP_S = 0.01
VISIT_S = 0.001
WIRE_S = 0.0005
COPY_S_PER_BLOCK = 0.002
TOLD_AFTER_S = 1.0
LIMIT_S = 300.0


class What(Enum):
    CLIENT_LEAVES = "the client leaves"
    CALLED_OFF = "an operator calls it off"
    PREEMPTED = "the source preempts the request"
    FINISHES = "the request finishes"
    SOURCE_DIES = "the source dies"
    DESTINATION_DIES = "the destination dies"


@dataclass(frozen=True, slots=True)
class Happening:
    """It happens once, so long after a machine has come into a state."""

    what: What
    state: Any
    after_s: float = 0.0002


@dataclass(frozen=True, slots=True)
class Plot:
    """A request, two engines, and what goes wrong."""

    params: MigrationParams = field(default_factory=MigrationParams)
    prompt_tokens: int = 22
    num_free_blocks: int = 100
    held_slack_blocks: int = 4
    ready_after_s: float = VISIT_S
    refuses: tuple[tuple[type[DestinationEffect], str], ...] = ()
    loses: tuple[tuple[str, int], ...] = ()
    """(message, how many of the first ones)."""
    happenings: tuple[Happening, ...] = ()


@dataclass(slots=True)
class _Side:
    """One machine, its shell and its engine's part of the request."""

    name: str
    machine: Any
    apply: Callable[[Any], None]
    owns: str
    timers: dict[ev.Timer, int] = field(default_factory=dict)
    """The alarm that counts; an older one was cleared or moved."""
    visits: dict[type, int] = field(default_factory=dict)
    is_alive: bool = True

    @property
    def is_over(self) -> bool:
        return bool(getattr(self.machine, "is_done", False) or getattr(self.machine, "is_over", False))


class Story:
    """`tell` once."""

    def __init__(self, plot: Plot) -> None:
        self._plot = plot
        self._now_s = 0.0
        self._lines: list[str] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._sent: Counter[str] = Counter()
        self._to_happen = list(plot.happenings)
        self._num_preemptions = 0
        self._num_free = plot.num_free_blocks
        self._num_held = 0
        source = SourceMachine(MIGRATION, plot.params)
        self._source = _Side("source", source, self._source_applies, "running")
        destination = DestinationMachine(MIGRATION_ID, plot.params.lease_s)
        self._destination = _Side("destination", destination, self._destination_applies, "nothing")
        self._sides = (self._source, self._destination)

    def tell(self) -> str:
        """The whole story; deterministic. Raises AssertionError when it does not come to an end."""
        self._source.apply(ev.Started())
        while self._due:
            self._now_s, _, happen = heapq.heappop(self._due)
            assert self._now_s < LIMIT_S, "it does not end"
            happen()
        source, destination = self._sides
        ending = source.machine.ending
        self._lines += ["", f"source: {self._end(source, ending.outcome if ending else None)}"]
        if ending is not None and ending.reason:
            self._lines.append(f"  because: {ending.reason}")
        self._lines.append(f"destination: {self._end(destination, destination.machine.outcome)}")
        self._lines.append(f"  blocks held: {self._num_held}")
        return "\n".join(self._lines) + "\n"

    def _end(self, side: _Side, outcome: Any) -> str:
        if not side.is_alive:
            return "dead"
        said = outcome.name if outcome is not None else "no outcome"
        return f"{side.machine.state.value}, {said}; its engine has of the request: {side.owns}"

    # ---- events

    def _after(self, delay_s: float, happen: Callable[[], None]) -> int:
        self._number += 1
        heapq.heappush(self._due, (self._now_s + delay_s, self._number, happen))
        return self._number

    def _write(self, who: str, what: str, effects: list[Any] | None = None, state: str = "") -> None:
        line = f"{self._now_s * 1000:9.1f}  {who:<11}  {what}"
        if effects is not None:
            line += f"  ->  {effects_in_words(effects)}  [{state}]"
        self._lines.append(line)

    def _step(self, side: _Side, event: Any) -> list[Any]:
        before = side.machine.state
        effects: list[Any] = side.machine.on(event, self._now_s)
        side.machine.check_integrity()
        self._write(side.name, event_in_words(event), effects, side.machine.state.value)
        if side.machine.state is not before:
            for happening in [h for h in self._to_happen if h.state is side.machine.state]:
                self._to_happen.remove(happening)
                self._after(happening.after_s, partial(self._happens, happening.what))
        return effects

    def _applies(self, side: _Side, event: Any, start: Callable[[Any], None]) -> None:
        if not side.is_alive or (side.is_over and side is self._source):
            return
        for effect in self._step(side, event):
            match effect:
                case ef.Send(message):
                    self._send(side, message)
                case ef.SetTimer(timer, after_s):
                    self._sets(side, timer, after_s)
                case ef.ClearTimer(timer):
                    side.timers.pop(timer, None)
                case _:
                    start(effect)
        if side.is_over:
            side.timers.clear()

    def _sets(self, side: _Side, timer: ev.Timer, after_s: float) -> None:
        number = self._number + 1

        def fire() -> None:
            if side.timers.get(timer) == number:
                del side.timers[timer]
                side.apply(ev.TimerFired(timer))

        side.timers[timer] = self._after(after_s, fire)

    def _send(self, side: _Side, message: Any) -> None:
        kind = type(message).__name__
        self._sent[kind] += 1
        peer = self._destination if side is self._source else self._source
        if self._sent[kind] <= dict(self._plot.loses).get(kind, 0):
            self._after(WIRE_S, lambda: self._write("network", f"{kind} is lost"))
        else:
            self._after(WIRE_S, lambda: peer.apply(message))

    def _answers(self, side: _Side, effect: Any, delay_s: float, answer: Callable[[], Any]) -> None:
        """The answer of a visit, unless it is called off or the side dies."""
        number = self._number + 1

        def happen() -> None:
            if side.visits.get(type(effect)) == number and side.is_alive:
                del side.visits[type(effect)]
                side.apply(answer())

        side.visits[type(effect)] = self._after(delay_s, happen)

    def _happens(self, what: What) -> None:
        self._write("world", what.value)
        match what:
            case What.CLIENT_LEAVES:
                for side in self._sides:
                    side.owns = "nothing" if side.owns in ("running", "stopped") else side.owns
                    if side is self._source or not side.is_over:
                        side.apply(ev.ClientAborted())
            case What.CALLED_OFF:
                self._source.apply(ev.Withdrawn("the drain was called off"))
            case What.PREEMPTED:
                self._num_preemptions += 1
            case What.FINISHES:
                self._source.owns = "nothing"
            case What.SOURCE_DIES:
                self._source.is_alive = False
                if not self._destination.is_over:
                    self._after(TOLD_AFTER_S, lambda: self._told(self._destination, ev.SourceLost()))
            case What.DESTINATION_DIES:
                self._destination.is_alive, self._num_held = False, 0
                self._after(TOLD_AFTER_S, lambda: self._told(self._source, ev.DestinationLost()))

    def _told(self, side: _Side, event: Any) -> None:
        if not side.is_over:
            side.apply(event)

    # ---- the source's engine

    @property
    def _num_tokens(self) -> int:
        return self._plot.prompt_tokens + int(self._now_s / STEP_S)

    def _source_applies(self, event: Any) -> None:
        self._applies(self._source, event, self._source_starts)

    def _source_starts(self, effect: SourceEffect) -> None:
        side = self._source
        match effect:
            case ef.CopyBlocks(blocks=blocks):
                self._answers(side, effect, COPY_S_PER_BLOCK * len(blocks), lambda: self._copied(len(blocks)))
            case ef.ForgetCopy():
                side.visits.pop(ef.CopyBlocks, None)
            case _:
                self._answers(side, effect, VISIT_S, lambda: self._visit_source(effect))

    def _copied(self, num_blocks: int) -> Any:
        if not self._destination.is_alive:
            return ev.CopyBroken("the connection ended")
        return ev.BlocksCopied(CopyReceipt(num_blocks, 64 * num_blocks))

    def _visit_source(self, effect: SourceEffect) -> Any:
        side, settled = self._source, self._num_tokens
        table = (tuple(range(-(-settled // BLOCK_SIZE))),)
        is_there = side.owns in ("running", "stopped")
        match effect:
            case ef.DescribeRequest():
                description = Description(RequestId("r"), b"payload", settled, "print", BLOCK_SIZE, 0)
                return ev.RequestDescribed(description) if is_there else ev.RequestGone()
            case ef.ReadProgress():
                progress = Progress(settled, settled + 1, self._num_preemptions, table)
                return ev.ProgressRead(progress) if is_there else ev.RequestGone()
            case ef.StopRequest(without_kv):
                if not is_there:
                    return ev.StopDeclined(NotStopped.FINISHED)
                side.owns = "stopped"
                kept, blocks = (0, ((),)) if without_kv else (settled, table)
                return ev.StopGranted(StoppedRequest(b"state", kept, 3, self._num_preemptions, blocks))
            case ef.ResumeRequest():
                side.owns = "running" if side.owns == "stopped" else side.owns
                return ev.RequestResumed()
            case _:
                side.owns = "nothing"
                return ev.RequestReleased()

    # ---- the destination's engine

    def _destination_applies(self, event: Any) -> None:
        self._applies(self._destination, event, self._destination_starts)

    def _destination_starts(self, effect: DestinationEffect) -> None:
        if isinstance(effect, ef.AbortRequest):
            self._destination.owns = "nothing"
            return
        if isinstance(effect, ef.GiveBack):
            self._destination.visits.pop(ef.AwaitReady, None)
        delay_s = self._plot.ready_after_s if isinstance(effect, ef.AwaitReady) else VISIT_S
        self._answers(self._destination, effect, delay_s, lambda: self._visit_destination(effect))

    def _visit_destination(self, effect: DestinationEffect) -> Any:
        refusal = dict(self._plot.refuses).get(type(effect))
        if refusal is not None:
            return ev.EngineRefused(refusal)
        match effect:
            case ef.HoldBlocks(description):
                slack = self._plot.held_slack_blocks if description.settled_tokens else 0
                return self._hold(-(-description.settled_tokens // BLOCK_SIZE) + slack, ev.EngineRefused)
            case ef.GrowBlocks(num_tokens):
                return self._hold(-(-num_tokens // BLOCK_SIZE), ev.EngineRefused)
            case ef.AwaitReady():
                return ev.RequestReady()
            case ef.CommitRequest():
                self._destination.owns, self._num_held = "running", 0
                return ev.RequestCommitted()
            case _:
                self._num_free, self._num_held = self._num_free + self._num_held, 0
                return ev.BlocksGivenBack()

    def _hold(self, num_blocks: int, refuse: Callable[[str], Any]) -> Any:
        more = num_blocks - self._num_held
        if more > self._num_free:
            return refuse(f"{more} blocks wanted, {self._num_free} are free")
        is_first = self._destination.machine.reservation is None
        self._num_held, self._num_free = num_blocks, self._num_free - more
        reservation = Reservation(0, num_blocks, (tuple(range(num_blocks)),))
        return ev.BlocksHeld(reservation, ("memory://b",)) if is_first else ev.BlocksGrown(reservation)


def tell(plot: Plot) -> str:
    return Story(plot).tell()


def mode(chosen: Mode) -> Plot:
    return Plot(MigrationParams(mode=chosen))
