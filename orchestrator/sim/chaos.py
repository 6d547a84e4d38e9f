"""What becomes of a fleet on a day of faults? A seed is a fleet, its requests, its faults; the verdict tells a story.

verdict = play_seed(17); print(verdict.story())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from migration.types import Outcome
from orchestrator.errors import JournalError
from orchestrator.journal.lines import LineReader
from orchestrator.journal.story import Story
from orchestrator.policy.columns import Rule
from orchestrator.policy.levels import parse_levels
from orchestrator.sim.arms import ARMS, Arm
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.copying import LinkParams
from orchestrator.sim.faults import Fault, Scene, chaos
from orchestrator.sim.invariants import Broken, Checks, replay_differs
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.steptime import StepTimes
from orchestrator.sim.workload import Zipf, gamma_times, generated
from orchestrator.sim.world import World, WorldParams
from orchestrator.state import CoreParams, ScalingParams

SKEWED = Arm("skewed", "each in turn, evened by moves", rule=Rule.ROUND_ROBIN)
MAX_TOKENS = 400
_GIVE_UP_S = 300.0
_LIMIT_S = 2_000.0
_MAX_ROWS = 60
"""Of the journal, in the life of a request."""


@dataclass(frozen=True, slots=True)
class Day:
    """What a seed stands for."""

    seed: int
    params: WorldParams
    arrivals: tuple[Arrival, ...]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.params.faults


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a day."""

    day: Day
    broken: tuple[Broken, ...]
    lived: tuple[Lived, ...]
    began: dict[str, int]
    """Faults that found somebody to befall, by kind."""
    outcomes: dict[str, int]
    """Of migrations."""
    failures: dict[str, int]
    """Of requests, by kind."""
    num_lost: int
    """Messages."""
    log: tuple[tuple[float, str], ...]
    """What was done to the fleet, and when."""
    made: dict[str, tuple[str, ...]]
    """Which instance made which tokens of each attempt at a request."""
    journal: tuple[bytes, ...]

    @property
    def num_committed(self) -> int:
        return self.outcomes.get(Outcome.COMMITTED.value, 0)

    def story(self) -> str:
        """What happened, for whoever wants to know why."""
        return "\n".join(_story(self))


def day_of(seed: int) -> Day:
    """A small fleet, so that memory runs out and a day takes a moment."""
    rng = Random(f"chaos/{seed}")
    num_instances, num_gateways, scales = 3 + rng.randrange(3), 1 + rng.randrange(2), rng.random() < 0.35
    count = 40 + rng.randrange(41)
    per_s = rng.uniform(4.0, 10.0)
    arrivals = generated(rng, Zipf(64, 1.5, 300), Zipf(96, 1.5, 300), gamma_times(rng, per_s, 2.0), count)
    arrivals = [replace(one, max_tokens=MAX_TOKENS, priority=rng.choice((0, 0, 0, -10, 10))) for one in arrivals]
    levels = parse_levels("high:-10:12,normal:0:0,low:10:0" if rng.random() < 0.3 else "high:-10:0,normal:0:0,low:10:0")
    scaling = ScalingParams(can_start=scales, capacity=8, most=8, backoff_s=2.0, stable_after_s=5.0)
    core = CoreParams(scaling=scaling, levels=levels)
    span_s = arrivals[-1].at_s + 2.0
    params = WorldParams(
        num_instances=num_instances,
        num_gateways=num_gateways,
        engine=LengthConfig(
            num_blocks=rng.choice((64, 96, 160)),
            max_model_len=1_024,
            max_num_seqs=rng.choice((8, 16, 32)),
            max_num_batched_tokens=rng.choice((128, 512)),
        ),
        times=StepTimes(base_s=0.01, token_s=0.0001, request_s=0.001),
        link=LinkParams(bytes_per_s=10 ** rng.uniform(7.7, 9.9)),  # of a stage: seconds, or next to nothing
        core=core,
        arm=SKEWED if rng.random() < 0.5 else ARMS["ours"],
        seed=seed,
        latency_s=rng.choice((0.0003, 0.0003, 0.005)),
        start_s=rng.uniform(0.5, 6.0),
        keeps_journal=True,
        give_up_s=_GIVE_UP_S,
        faults=chaos(rng, Scene(num_instances, num_gateways, span_s, scales)),
        notice_s=rng.choice((0.0, 0.05, 1.0)),
    )
    return Day(seed, params, tuple(arrivals))


def play_seed(seed: int, *, replays: bool = True) -> Verdict:
    return play(day_of(seed), replays=replays)


def play(day: Day, *, replays: bool = True, sabotage: Callable[[World], None] = lambda _: None) -> Verdict:
    """One day. `replays`: the journal's events are given to the core again. `sabotage` is what a test breaks in the
    fleet before it starts, to see that it is found."""

    async def live() -> tuple[World, Checks]:
        world = World(day.params)
        checks = Checks(world)
        sabotage(world)
        try:
            await world.play(day.arrivals)
        except Exception as error:  # noqa: BLE001 - whatever a part raises is what we are here for
            checks.note(f"a part of the fleet broke: {type(error).__name__}: {error}")
        return world, checks

    world, checks = run_jumping(live(), _LIMIT_S)
    journal = () if world.journal is None else tuple(world.journal.lines)
    if replays and (differs := replay_differs(list(journal))) is not None:
        checks.note_at(0.0, f"the journal does not replay: {differs}")
    lived = tuple(world.clients.lived.values())
    failures: dict[str, int] = {}
    for one in lived:
        if one.error:
            kind = one.error.partition(":")[0]
            failures[kind] = failures.get(kind, 0) + 1
    breaker = world.breaker
    return Verdict(
        day=day,
        broken=tuple(checks.broken),
        lived=lived,
        began={} if breaker is None else {kind.value: count for kind, count in breaker.began.items()},
        outcomes=dict(world.fleet.outcomes),
        failures=failures,
        num_lost=0 if breaker is None else breaker.num_lost,
        log=() if breaker is None else tuple(breaker.log),
        made={request_id: tuple(map(str, made)) for request_id, made in checks.made.items()},
        journal=journal,
    )


def played_again(day: Day, verdict: Verdict) -> Verdict:
    """The same verdict, and whether the day leaves the same journal when it is lived a second time."""
    again = play(day, replays=False)
    if again.journal == verdict.journal:
        return verdict
    pairs = zip(verdict.journal, again.journal, strict=False)
    number = next((at for at, (one, other) in enumerate(pairs, start=1) if one != other), "the last")
    broken = Broken(0.0, f"lived again, the day leaves another journal: line {number}")
    return replace(verdict, broken=(*verdict.broken, broken))


def without_faults(day: Day) -> Day:
    """The same fleet and requests on a day on which nothing goes wrong."""
    return replace(day, params=replace(day.params, faults=()))


def _story(verdict: Verdict) -> Iterator[str]:
    day, params = verdict.day, verdict.day.params
    yield f"seed {day.seed}: {len(verdict.broken)} invariants do not hold"
    yield from (f"  {one}" for one in verdict.broken)
    yield (
        f"the fleet: {params.num_instances} instances of {params.engine.num_blocks} blocks, {params.num_gateways}"
        f" gateways, {params.arm.name}, {len(day.arrivals)} requests; times are {params.settle_s:g} s less below"
    )
    yield "the faults:"
    yield from (f"  {fault}" for fault in day.faults)
    yield "what was done:"
    yield from (f"  {at_s:8.3f} s  {what}" for at_s, what in verdict.log)
    named = {name.partition("~")[0] for one in verdict.broken for name in one.requests}
    for name in sorted(named)[:3]:
        yield from _life(verdict, name)


def _life(verdict: Verdict, name: str) -> Iterator[str]:
    lived = next(one for one in verdict.lived if one.arrival.name == name)
    yield f"the life of {name}: {lived}"
    for request_id, made in verdict.made.items():
        if request_id.partition("~")[0] == name:
            yield from (f"  {request_id} was stepped: {part}" for part in made)
    for at_s, what, why in islice(_rows(verdict.journal, name), _MAX_ROWS):
        yield f"  {at_s:8.3f} s  {what}  [{why}]"


def _rows(journal: tuple[bytes, ...], name: str) -> Iterator[tuple[float, str, str]]:
    """What the orchestrator's journal tells of a request."""
    story, reader = Story(), LineReader()
    try:
        for line in journal:
            story.take(reader.read(line))
    except JournalError as error:
        yield 0.0, "the journal cannot be read further", str(error)
    for row in story.rows:
        if any(known.partition("~")[0] == name for known in row.requests):
            yield row.now_s, f"{row.what}: {row.came_of_it}" if row.came_of_it else row.what, row.why
