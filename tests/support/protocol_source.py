"""What can the source's side do next? Its machine, engine, timers and shell; nothing of the peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from migration import effects as ef
from migration import events as ev
from migration import messages as msg
from migration.table import SourceState as S
from migration.types import BlockRange, CopyReceipt, NotStopped
from tests.support.protocol_scenario import (
    BLOCK_SIZE,
    Disturbance,
    Engine,
    Lapse,
    Life,
    Packet,
    with_number,
    without_numbers,
)
from tests.support.protocol_side import Did, Move, Needs, SendLost, SideRules


class SourceSide(NamedTuple):
    machine: int
    engine: Engine
    visits: tuple[int, ...] = ()
    """Effects under way."""
    timers: tuple[int, ...] = ()
    life: Life = Life.UP
    is_told: bool = False
    """The destination's epoch has ended, says the agent."""
    has_heard: bool = False
    """Of the client's leaving."""
    is_preempted: bool = False
    has_finished: bool = False
    has_withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class CopyLeft:
    """A copy that was broken off: it may have ended before."""

    copy: ef.CopyBlocks


_LAST_VISITS = (ef.StopRequest, ef.ResumeRequest, ef.ReleaseRequest)


class SourceRules(SideRules[SourceSide]):
    name = "source"

    def start(self) -> Did:
        return self._event(SourceSide(self._first_machine, Engine.RUNNING), ev.Started())

    def _receive(self, side: SourceSide, came: Packet) -> Did:
        return self._event(side, came.message) if self._is_heard(side, came) else (self._intern(side), ())

    def _is_heard(self, side: SourceSide, came: Packet) -> bool:
        """The agent's part: nothing of an epoch that has ended; and the driver's: of an epoch that was not asked
        nothing but a refusal to reserve."""
        if came.from_epoch == 1:
            return not side.is_told
        if self._scenario.lapse is Lapse.SERVES_OTHER_EPOCHS:
            return True
        return isinstance(came.message, msg.Refused) and self._machines.look(side.machine).state is S.RESERVING

    def _all_moves(self, side: SourceSide) -> Iterator[Move]:
        may = self._scenario.may
        if side.life is Life.DOWN and may(Disturbance.RESTART):
            yield Move("the source comes back, knowing nothing", self._intern(side._replace(life=Life.AGAIN)))
        if side.life in (Life.DOWN, Life.AGAIN):
            return
        yield from self._ends(side)
        if not side.is_told:
            told = self._event(side._replace(is_told=True), ev.DestinationLost())
            yield Move("the source hears that the destination's epoch has ended", *told, needs=Needs.DESTINATION_ENDED)
        if not side.has_heard:
            is_here = side.engine in (Engine.RUNNING, Engine.STOPPED)
            aborted = side._replace(has_heard=True, engine=Engine.OVER if is_here else side.engine)
            left = self._event(aborted, ev.ClientAborted())
            yield Move("the source hears that the client left", *left, needs=Needs.CLIENT_LEFT)
        yield from self._disturbances(side)

    def _disturbances(self, side: SourceSide) -> Iterator[Move]:
        may = self._scenario.may
        if not side.has_withdrawn and may(Disturbance.WITHDRAWAL):
            off = self._event(side._replace(has_withdrawn=True), ev.Withdrawn("called off"))
            yield Move("the agent calls it off", *off)
        if side.engine is Engine.RUNNING and not side.has_finished and may(Disturbance.FINISH):
            finished = side._replace(engine=Engine.OVER, has_finished=True)
            yield Move("it finishes at the source", self._intern(finished))
        if may(Disturbance.SOURCE_CRASH):
            gone = SourceSide(
                self._first_machine,
                Engine.OVER,
                life=Life.DOWN,
                is_preempted=side.is_preempted,
                has_finished=side.has_finished,
            )
            yield Move("the source crashes", self._intern(gone))
        if side.life is Life.UP and may(Disturbance.SOURCE_FENCED):
            yield Move("the source is declared dead", self._intern(side._replace(life=Life.FENCED)))

    def _answers(self, side: SourceSide, effect: Any) -> Iterator[Move]:
        is_gone = side.engine is Engine.OVER
        match effect:
            case SendLost():
                yield Move("source: a message cannot be sent", *self._event(side, ev.SendFailed("no way")))
            case ef.DescribeRequest() | ef.ReadProgress() if is_gone:
                yield Move("source: it is gone", *self._event(side, ev.RequestGone()))
            case ef.DescribeRequest():
                described = self._event(side, ev.RequestDescribed(self._scenario.description))
                yield Move("source: described", *described)
                yield Move("source: it cannot be moved", *self._event(side, ev.RequestUnmovable("no")), cost=1)
                yield Move("source: describing fails", *self._event(side, ev.EngineFailed("fault")), cost=1)
            case ef.ReadProgress():
                yield from self._looks(side)
            case ef.CopyBlocks():
                yield from self._copies(side, effect)
            case CopyLeft(copy):
                yield from self._copies(side, copy)
            case ef.StopRequest():
                yield from self._stops(side)
            case ef.ResumeRequest():
                yield from self._put_right(side, "resumed", Engine.RUNNING, ev.RequestResumed())
            case ef.ReleaseRequest():
                yield from self._put_right(side, "released", Engine.OVER, ev.RequestReleased())
            case _:
                raise AssertionError(f"the source's side does not know {effect}")

    def _looks(self, side: SourceSide) -> Iterator[Move]:
        looks = self._scenario.looks
        look = looks[min(len(self._machines.look(side.machine).stages), len(looks) - 1)]
        yield Move("source: looked", *self._event(side, ev.ProgressRead(look)))
        preempted = replace(look, num_preemptions=look.num_preemptions + 1)
        after = self._event(side._replace(is_preempted=True), ev.ProgressRead(preempted))
        yield Move("source: looked, it was preempted", *after, cost=1)
        yield Move("source: the look fails", *self._event(side, ev.EngineFailed("fault")), cost=1)

    def _copies(self, side: SourceSide, effect: ef.CopyBlocks) -> Iterator[Move]:
        blocks: BlockRange = effect.blocks
        copy = (effect.endpoints[0], blocks.first, blocks.end)
        copied = self._event(side, ev.BlocksCopied(CopyReceipt(len(blocks), 8 * len(blocks))))
        yield Move("source: copied", *copied, needs=Needs.LANDS, copy=copy)
        broken = self._event(side, ev.CopyBroken("cut"))
        yield Move("source: the copy breaks", *broken, needs=Needs.CANNOT_LAND, copy=copy)
        yield Move("source: the copy breaks", *broken, cost=1)

    def _stops(self, side: SourceSide) -> Iterator[Move]:
        if side.engine is Engine.OVER:
            why = NotStopped.ABORTED if side.has_heard else NotStopped.FINISHED
            yield Move(f"source: {why.value} before the stop", *self._event(side, ev.StopDeclined(why)))
            return
        stopped = side._replace(engine=Engine.STOPPED)
        yield Move("source: stopped", *self._event(stopped, ev.StopGranted(self._scenario.stopped)))
        preempted = replace(self._scenario.stopped, num_preemptions=self._scenario.stopped.num_preemptions + 1)
        late = self._event(stopped._replace(is_preempted=True), ev.StopGranted(preempted))
        yield Move("source: stopped, it had been preempted", *late, cost=1)
        declined = self._event(side, ev.StopDeclined(NotStopped.UNMOVABLE))
        yield Move("source: it cannot be stopped", *declined, cost=1)
        yield Move("source: the stop fails", *self._event(side, ev.EngineFailed("fault")), cost=1)
        yield Move("source: stopped, but the stop fails", *self._event(stopped, ev.EngineFailed("fault")), cost=1)

    def _put_right(self, side: SourceSide, name: str, engine: Engine, event: Any) -> Iterator[Move]:
        after = side._replace(engine=engine) if side.engine is Engine.STOPPED else side
        yield Move(f"source: {name}", *self._event(after, event))
        yield Move(f"source: {name}, but the visit fails", *self._event(after, ev.EngineFailed("fault")), cost=1)
        if side.engine is Engine.STOPPED:
            stuck = side._replace(engine=Engine.STUCK)
            yield Move(f"source: not {name}, the visit fails", *self._event(stuck, ev.EngineFailed("fault")), cost=1)

    def _event(self, side: SourceSide, event: Any) -> Did:
        """The shell applies an event: nothing reaches a machine that is done or gone."""
        if side.life in (Life.DOWN, Life.AGAIN) or self._machines.look(side.machine).is_done:
            return self._intern(side), ()
        number, effects = self._machines.step(side.machine, event)
        side, posts = side._replace(machine=number), []
        for effect in effects:
            match effect:
                case ef.Send(message):
                    posts.append(self._intern(Packet(True, 1, message)))
                case ef.SetTimer(timer):
                    side = side._replace(timers=with_number(side.timers, self._intern(timer)))
                case ef.ClearTimer(timer):
                    side = side._replace(timers=without_numbers(side.timers, self._intern(timer)))
                case ef.ForgetCopy():
                    side = self._break_off(side)
                case _:
                    self._check_copy(number, side, effect)
                    side = side._replace(visits=with_number(side.visits, self._intern(effect)))
        if self._machines.look(number).is_done:
            visits = [self._intern.values[visit] for visit in side.visits]
            assert not any(isinstance(visit, _LAST_VISITS) for visit in visits), "done while its engine is being asked"
            side = side._replace(visits=(), timers=())
        return self._intern(side), tuple(posts)

    def _break_off(self, side: SourceSide) -> SourceSide:
        for number in side.visits:
            effect = self._intern.values[number]
            if isinstance(effect, ef.CopyBlocks):
                left = self._intern(CopyLeft(effect))
                return side._replace(visits=with_number(without_numbers(side.visits, number), left))
        return side

    def _check_copy(self, number: int, side: SourceSide, effect: Any) -> None:
        if isinstance(effect, ef.CopyBlocks) and not effect.urgent:
            progress = self._machines.look(number).progress
            is_full = effect.blocks.end * BLOCK_SIZE <= progress.settled_tokens
            assert is_full, "a block is copied that can still change"
