"""Does the simulator's engine of lengths schedule, step by step, as the fake engine does that is held against vLLM?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instance.engine import Engine
from instance.fake_model import FakeRequest, encode_fake
from instance.fake_scheduler import FakeConfig
from instance.types import NO_WORK, CachedChanges, EngineLoad, RequestView, StepResult, StepWork, Submission
from migration.types import MigrationId, Refusal, RequestId, Reservation, StoppedRequest
from orchestrator.sim.copying import LinkParams, Links, SimMover
from orchestrator.sim.engine import Ask, LengthEngine, encode
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.runs import Made
from orchestrator.sim.steptime import Attention, StepTimes
from tests.support.fake import FakeKit

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, MAX_SEQS, MAX_STEP_TOKENS, SLACK = 4, 12, 64, 4, 10, 1
ID_TOKENS = 6
"""Of a prefix id: it ends in the middle of a block."""
LENGTHS = LengthConfig(
    NUM_BLOCKS, BLOCK_SIZE, MAX_LEN, MAX_SEQS, MAX_STEP_TOKENS, prefix_cache=False, prefix_id_tokens=ID_TOKENS
)
FAKES = FakeConfig(NUM_BLOCKS, BLOCK_SIZE, MAX_LEN, MAX_SEQS, MAX_STEP_TOKENS, prefix_cache=False)
TIMES = StepTimes(0.01, 0.001, 4, 0.0005, 0.0003, Attention(0.001, 0.0002, 0.00001, 0.002, 0.0001, 1e-6, 2e-6, 3e-6))


@dataclass(frozen=True)
class Add:
    num_prompt: int
    num_answer: int
    priority: int
    ids: tuple[int, ...] = ()
    """Of its prefix, ID_TOKENS tokens each; others may begin with the same."""
    at: int = 0
    """Which engine."""

    def prompt(self, number: int) -> tuple[int, ...]:
        """The tokens that its ids say, in whole blocks, and then some that no other request has."""
        num_known = min(self.num_prompt, len(self.ids) * ID_TOKENS) // BLOCK_SIZE * BLOCK_SIZE
        known = (1 + 100 * self.ids[position // ID_TOKENS] + position for position in range(num_known))
        return (*known, *(1_000 + 100 * number + position for position in range(num_known, self.num_prompt)))


@dataclass(frozen=True)
class Do:
    """Something done at the engine `at`, to the request of that number if it takes one."""

    verb: str
    at: int = 0
    which: int = 0
    value: int = 0


prefixes = st.lists(st.sampled_from([0, 0, 0, 1]), max_size=4).map(tuple)
adds = st.builds(Add, st.integers(1, 20), st.integers(1, 28), st.integers(0, 2), prefixes)
adds_there = st.builds(Add, st.integers(1, 20), st.integers(1, 28), st.integers(0, 2), prefixes, st.just(1))
verbs = st.sampled_from(["abort", "set priority", "stop and resume", "move", "move"])
deeds = st.builds(Do, verbs, st.integers(0, 1), st.integers(0, 9), st.integers(0, 2))
headrooms = st.builds(Do, st.just("headroom"), st.just(0), st.just(0), st.integers(0, 6))
busy = st.builds(Do, st.just("step"), st.just(0), st.just(0), st.integers(1, 12))
there = st.builds(Do, st.just("step"), st.just(1), st.just(0), st.integers(1, 12))
beginnings = st.lists(st.one_of(adds, adds, adds, adds_there, busy, headrooms), min_size=6, max_size=16)
goings_on = st.lists(st.one_of(busy, busy, adds, deeds, there), min_size=6, max_size=30)
stories = st.tuples(beginnings, goings_on).map(lambda parts: [*parts[0], *parts[1]])
"""Many at once, so that blocks run out; a step is that many steps."""
ALIKE = (0, 0, 0)
MOVES: list[Add | Do] = [
    *(Add(16, 20, 0, ALIKE), Add(16, 20, 0, ALIKE, at=1)),
    *(Do("step", at=0, value=2), Do("step", at=1, value=3)),
    Do("move", at=0, which=0),  # all that it has computed is full blocks, which the other one holds
    *(Do("step", at=1, value=9), Do("move", at=1, which=0)),  # back to where its own are free, but for the last
    *(Do("step", at=1, value=9), Do("step", at=0, value=9)),
]
"""To where the beginning is cached."""


class Pair:
    """Two engines of one kind, to which the same is done as to two of the other."""

    def __init__(self, engines: tuple[Engine, Engine], is_fake: bool) -> None:
        self.engines = engines
        self.is_fake = is_fake
        self.num_added = self.num_moves = 0

    def do(self, deed: Add | Do) -> object:
        """What can be compared of what came of it."""
        if isinstance(deed, Add):
            return self._add(deed)
        engine, request_id = self.engines[deed.at], RequestId(f"r{deed.which}")
        match deed.verb:
            case "step":
                return [_seen(engine.step()) for _ in range(deed.value)]
            case "headroom":
                engine.set_headroom(((0, deed.value), (1, 1)))
            case "abort":
                engine.abort((request_id,))
            case "set priority":
                return engine.set_priority(request_id, deed.value)
            case "stop and resume":
                stopped = engine.try_stop(request_id)
                engine.resume(request_id)
                return _of_stop(stopped)
            case "move":
                return self._move(request_id, engine, self.engines[1 - deed.at])
        return None

    def _add(self, add: Add) -> object:
        request_id = RequestId(f"r{self.num_added}")
        self.num_added += 1
        payload = (
            encode_fake(FakeRequest(add.prompt(self.num_added), add.num_answer, seed=self.num_added))
            if self.is_fake
            else encode(Ask(add.num_prompt, add.num_answer, add.num_answer, prefix_ids=add.ids))
        )
        submission = Submission(request_id, "client", add.priority, add.num_prompt, add.num_answer, payload)
        return self.engines[add.at].add(submission)

    def _move(self, request_id: RequestId, source: Engine, destination: Engine) -> object:
        described = source.describe(request_id)
        if described is None or isinstance(described, Refusal):
            return "not described"
        self.num_moves += 1
        migration_id = MigrationId(f"m{self.num_moves}")
        reserved = destination.reserve(migration_id, described, SLACK)
        if isinstance(reserved, Refusal):
            return "refused"
        stopped = source.try_stop(request_id)
        assert isinstance(stopped, StoppedRequest)
        grown = destination.grow(migration_id, stopped.settled_tokens)
        if isinstance(grown, Refusal):
            destination.cancel(migration_id)
            source.resume(request_id)
            return "not grown"
        committed = destination.commit(migration_id, stopped.state)
        return committed, source.release(request_id), _of_reservation(reserved), _of_stop(stopped)

    def standing(self) -> list[tuple[EngineLoad, list[RequestView], bool]]:
        return [
            (one.load(), sorted(one.requests(), key=lambda view: view.request_id), one.has_work())
            for one in self.engines
        ]


def _of_stop(stopped: object) -> object:
    if isinstance(stopped, StoppedRequest):
        return stopped.settled_tokens, stopped.num_output_tokens, stopped.num_preemptions, len(stopped.block_table[0])
    return stopped


def _of_reservation(reserved: Reservation) -> tuple[int, int]:
    return reserved.num_blocks, reserved.num_cached_tokens


def _seen(result: StepResult) -> object:
    outputs = [(one.request_id, len(one.token_ids), one.finish_reason) for one in result.outputs]
    return outputs, result.executed, result.num_scheduled_tokens, result.num_decoding, result.work


def length_engine(prefix_cache: bool = False) -> LengthEngine:
    return LengthEngine(replace(LENGTHS, prefix_cache=prefix_cache), TIMES, SimMover("one", Links(LinkParams()), 1))


@dataclass
class SameBlocks:
    """What one kind of engine calls by a hash the other does by another, and each hash has just one other."""

    other_of: dict[bytes, bytes] = field(default_factory=dict)
    one_of: dict[bytes, bytes] = field(default_factory=dict)

    def check(self, told: CachedChanges | None, other: CachedChanges | None) -> None:
        if told is None or other is None:
            assert told is other
            return
        assert told.is_anew == other.is_anew
        assert [is_cached for _, is_cached in told.changes] == [is_cached for _, is_cached in other.changes]
        for (one, _), (another, _) in zip(told.changes, other.changes, strict=True):
            assert self.other_of.setdefault(one, another) == another
            assert self.one_of.setdefault(another, one) == one


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["without a prefix cache", "with one"])
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(story=stories)
@example(story=MOVES)
def test_it_schedules_as_the_fake_engine_does(prefix_cache: bool, story: list[Add | Do]) -> None:
    async def play() -> None:
        kit = FakeKit(replace(FAKES, prefix_cache=prefix_cache))
        try:
            fakes = Pair((kit.first, kit.second), is_fake=True)
            lengths = Pair((length_engine(prefix_cache), length_engine(prefix_cache)), is_fake=False)
            blocks = SameBlocks()
            for deed in story:
                assert lengths.do(deed) == fakes.do(deed), deed
                assert lengths.standing() == fakes.standing(), deed
                for one, other in zip(lengths.engines, fakes.engines, strict=True):
                    blocks.check(one.take_cached_changes(), other.take_cached_changes())
                for engine in lengths.engines:
                    engine.check_integrity()
        finally:
            kit.close()

    run_jumping(play())


@dataclass(frozen=True)
class Look:
    """Somebody looks, or cuts the run, after so much of the time that a run may take."""

    share: float
    is_cut: bool


looks = st.builds(Look, st.floats(0.0, 1.2), st.booleans())


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["without a prefix cache", "with one"])
@settings(max_examples=200)
@given(
    asked=st.lists(adds, min_size=1, max_size=8),
    later=st.lists(adds, max_size=6),
    watched=st.lists(looks, max_size=40),
    limit_s=st.floats(0.0, 0.5),
)
def test_a_run_of_steps_ends_where_single_steps_do(
    prefix_cache: bool, asked: list[Add], later: list[Add], watched: list[Look], limit_s: float
) -> None:
    """Of those asked for later one comes after each run."""

    async def play() -> None:
        runs, single = length_engine(prefix_cache), length_engine(prefix_cache)
        pairs = (Pair((runs, runs), is_fake=False), Pair((single, single), is_fake=False))
        for pair in pairs:
            for add in asked:
                pair.do(add)
        now_s, looking, coming = 0.0, iter(watched), iter(later)
        while runs.has_work():
            made = _run_once(runs, now_s, limit_s, looking)
            given, work, at_s = _given([]), NO_WORK, made.start_s
            for _ in range(made.result.work.num_steps):
                ended_s = single.runs.begin(at_s, 0.0)
                assert ended_s is not None
                step, at_s = single.runs.end(), ended_s
                work = _both(work, step.result.work)
                _add_given(given, step.result)
            assert abs(at_s - made.end_s) < 1e-9
            assert made.result.work == work
            assert _given([made.result]) == given
            assert runs.load() == single.load() and runs.requests() == single.requests()
            assert _gained_and_lost(runs) == _gained_and_lost(single)
            runs.check_integrity()
            if (add_now := next(coming, None)) is not None:
                for pair in pairs:
                    pair.do(add_now)
            now_s = made.end_s

    run_jumping(play())


@settings(max_examples=200)
@given(st.lists(adds, min_size=1, max_size=8), st.floats(0.01, 0.5), st.floats(0.0, 0.5))
def test_what_is_told_later_is_told_once_and_in_time(asked: list[Add], limit_s: float, every_s: float) -> None:
    async def play() -> None:
        engine = length_engine()
        pair = Pair((engine, engine), is_fake=False)
        for add in asked:
            pair.do(add)
        now_s, told, untold_since_s = 0.0, dict[RequestId, int](), dict[RequestId, float]()
        while engine.has_work():
            assert engine.runs.begin(now_s, limit_s) is not None
            made = engine.runs.end(every_s)
            now_s = made.end_s
            for one in made.result.outputs:
                assert one.token_ids
                told[one.request_id] = told.get(one.request_id, 0) + len(one.token_ids)
                untold_since_s.pop(one.request_id, None)
            for view in engine.requests():
                if view.num_output_tokens > told.get(view.request_id, 0):
                    assert told.get(view.request_id), "a first token is told at once"
                    since_s = untold_since_s.setdefault(view.request_id, made.start_s)
                    assert made.start_s - since_s <= every_s, "it waits for the next time all is told"
        assert told == {RequestId(f"r{index}"): add.num_answer for index, add in enumerate(asked)}

    run_jumping(play())


def _gained_and_lost(engine: LengthEngine) -> object:
    """What its cache has, of all that it tells of."""
    told = engine.take_cached_changes()
    return None if told is None else (dict(told.changes), told.is_anew)


def _both(one: StepWork, other: StepWork) -> StepWork:
    if one is NO_WORK:
        return other
    return StepWork(*(getattr(one, name) + getattr(other, name) for name in StepWork.__struct_fields__))


def _run_once(engine: LengthEngine, now_s: float, limit_s: float, looking: object) -> Made:
    ends_s = engine.runs.begin(now_s, limit_s)
    assert ends_s is not None
    look = next(looking, None)  # type: ignore[call-overload]
    if look is not None:
        at_s = min(ends_s, now_s + look.share * (ends_s - now_s))
        engine.runs.settle(at_s)
        if look.is_cut and at_s < ends_s:
            boundary_s = engine.runs.boundary_after(at_s)
            assert at_s <= boundary_s <= ends_s
            engine.runs.cut(boundary_s)
            ends_s = boundary_s
    made = engine.runs.end()
    assert abs(made.end_s - ends_s) < 1e-9
    return made


Given = dict[RequestId, tuple[int, int | None]]
"""Tokens of each request, and how it ended."""


def _given(results: list[StepResult]) -> Given:
    given: Given = {}
    for result in results:
        _add_given(given, result)
    return given


def _add_given(given: Given, result: StepResult) -> None:
    for one in result.outputs:
        given[one.request_id] = (given.get(one.request_id, (0, None))[0] + len(one.token_ids), one.finish_reason)
