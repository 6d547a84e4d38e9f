"""Is the fake engine an engine? The shared suite, and what only the fake can be asked."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import msgspec
import pytest

from instance.fake import FakeEngineBroke
from instance.fake_model import FakeRequest, FakeState, encode_fake, expected_output
from instance.fake_scheduler import FakeConfig
from instance.types import Submission
from migration.types import NotStopped, RequestId, StoppedRequest
from tests.contract.cached_suite import CachedContract
from tests.contract.chunk_suite import ChunkContract
from tests.contract.engine_suite import EngineContract
from tests.support.fake import FakeKit, prompt_of
from tests.support.pair import EnginePair, Refused, Sabotage, Shape

PLAIN = FakeConfig(num_blocks=64, block_size=16, max_model_len=900, max_num_seqs=8, max_num_batched_tokens=512)


def pair_of(config: FakeConfig) -> Iterator[EnginePair]:
    kit = FakeKit(config)
    pair = EnginePair(kit)
    yield pair
    pair.drain()
    pair.close()
    kit.close()


class TestFakeEngine(EngineContract):
    @pytest.fixture
    def pair(self) -> Iterator[EnginePair]:
        yield from pair_of(PLAIN)


class TestFakeEngineWithoutPrefixCache(EngineContract):
    @pytest.fixture
    def pair(self) -> Iterator[EnginePair]:
        yield from pair_of(dataclasses.replace(PLAIN, prefix_cache=False))


class TestFakeEngineInSmallChunks(EngineContract, ChunkContract):
    """Every prompt of the suite that is longer than a chunk is prefilled over several steps."""

    @pytest.fixture
    def pair(self) -> Iterator[EnginePair]:
        yield from pair_of(dataclasses.replace(PLAIN, max_num_batched_tokens=64))


class TestWhatTheFakeEngineHasCached(CachedContract):
    @pytest.fixture(params=[{}, {"max_num_batched_tokens": 64}, {"is_pipelined": True}], ids=str)
    def pair(self, request: pytest.FixtureRequest) -> Iterator[EnginePair]:
        yield from pair_of(dataclasses.replace(PLAIN, **request.param))


def test_without_a_prefix_cache_nothing_is_ever_told() -> None:
    (pair,) = pair_of(dataclasses.replace(PLAIN, prefix_cache=False))
    pair.run_alone(pair.first, Shape(50, 2))
    assert pair.first.take_cached_changes() is None


@pytest.fixture
def pair() -> Iterator[EnginePair]:
    yield from pair_of(PLAIN)


@pytest.fixture
def pipelined() -> Iterator[EnginePair]:
    yield from pair_of(dataclasses.replace(PLAIN, is_pipelined=True))


@pytest.fixture
def tight() -> Iterator[EnginePair]:
    yield from pair_of(dataclasses.replace(PLAIN, num_blocks=20, max_model_len=300))


def test_its_tokens_are_those_foretold_without_blocks(pair: EnginePair) -> None:
    shape = Shape(75, 40, prompt_key=1)
    expected = expected_output(FakeRequest(prompt_of(shape), 40))
    assert tuple(pair.run_alone(pair.first, shape)) == expected


def test_a_seed_changes_every_token_and_a_stop_token_ends_the_answer() -> None:
    prompt = (1, 2, 3)
    plain = expected_output(FakeRequest(prompt, 20))
    assert all(a != b for a, b in zip(plain, expected_output(FakeRequest(prompt, 20, seed=1)), strict=True))
    assert expected_output(FakeRequest(prompt, 20, stop_token=plain[4])) == plain[:5]


def test_preempted_requests_are_computed_again_and_answer_the_same(tight: EnginePair) -> None:
    shapes = [Shape(50, 80, prompt_key=i) for i in range(4)]
    requests = [tight.add(tight.first, shape) for shape in shapes]
    tight.finish(tight.first, *requests)
    assert tight.first.load().num_preemptions > 0
    for request, shape in zip(requests, shapes, strict=True):
        assert tuple(tight.tokens(request)) == expected_output(FakeRequest(prompt_of(shape), 80))


def test_the_least_urgent_running_request_is_preempted_first(tight: EnginePair) -> None:
    urgent = tight.add(tight.first, Shape(120, 150, prompt_key=1, priority=-1))
    bulk = tight.add(tight.first, Shape(120, 150, prompt_key=2, priority=5))
    tight.finish(tight.first, urgent)
    assert not tight.is_finished(bulk) and tight.first.load().num_preemptions >= 1
    tight.finish(tight.first, bulk)


def test_one_that_is_made_urgent_while_it_runs_is_no_longer_the_one_preempted(tight: EnginePair) -> None:
    first = tight.add(tight.first, Shape(120, 150, prompt_key=1, priority=-1))
    raised = tight.add(tight.first, Shape(120, 150, prompt_key=2, priority=5))
    tight.decode_until(tight.first, raised, 5)
    tight.first.set_priority(raised, -10)
    tight.finish(tight.first, raised)
    assert not tight.is_finished(first) and tight.first.load().num_preemptions >= 1
    tight.finish(tight.first, first)
    for request, key in ((first, 1), (raised, 2)):
        expected = expected_output(FakeRequest(prompt_of(Shape(120, 150, prompt_key=key)), 150))
        assert tuple(tight.tokens(request)) == expected


def test_the_urgent_one_of_those_that_wait_is_admitted_first(pair: EnginePair) -> None:
    blockers = [pair.add(pair.first, Shape(20, 5 + i, prompt_key=i)) for i in range(8)]
    pair.step(pair.first)
    late_bulk = pair.add(pair.first, Shape(20, 3, prompt_key=20, priority=3))
    later_urgent = pair.add(pair.first, Shape(20, 3, prompt_key=21, priority=0))
    pair.finish(pair.first, *blockers, late_bulk, later_urgent)
    first_seen = [request for request in pair.outputs if request in (late_bulk, later_urgent)]
    assert first_seen == [later_urgent, late_bulk]


def test_in_a_pipelined_engine_a_stop_waits_for_the_step_in_flight(pipelined: EnginePair) -> None:
    shape = Shape(40, 30, prompt_key=3)
    request = pipelined.add(pipelined.first, shape)
    pipelined.decode_until(pipelined.first, request, 4)
    progress = pipelined.first.progress(request)
    assert progress is not None and progress.settled_tokens < progress.num_tokens
    assert pipelined.first.try_stop(request) is None
    assert pipelined.first.has_work()
    stopped = pipelined.stop(pipelined.first, request)
    assert isinstance(stopped, StoppedRequest) and stopped.num_output_tokens == len(pipelined.tokens(request))
    pipelined.first.resume(request)
    ferried = pipelined.ferry(request, pipelined.first, pipelined.second)
    assert ferried.committed.num_output_tokens == len(pipelined.tokens(request))
    pipelined.finish(pipelined.second, request)
    assert tuple(pipelined.tokens(request)) == expected_output(FakeRequest(prompt_of(shape), 30))


def test_in_a_pipelined_engine_a_request_may_finish_while_it_is_being_stopped(pipelined: EnginePair) -> None:
    request = pipelined.add(pipelined.first, Shape(40, 3, prompt_key=3))
    pipelined.decode_until(pipelined.first, request, 2)
    assert pipelined.first.try_stop(request) is None
    pipelined.step(pipelined.first)
    assert pipelined.is_finished(request)
    assert pipelined.first.try_stop(request) is NotStopped.FINISHED


def test_a_request_that_cannot_be_moved_says_so(pair: EnginePair) -> None:
    request = RequestId("rooted")
    payload = encode_fake(FakeRequest((1, 2, 3), 50, movable=False))
    assert pair.first.add(Submission(request, "client", 0, 3, 50, payload)) is None
    pair.step(pair.first)
    assert not pair.first.requests()[0].movable
    assert pair.first.try_stop(request) is NotStopped.UNMOVABLE
    with pytest.raises(AssertionError, match="cannot be moved"):
        pair.ferry(request, pair.first, pair.second)


def test_a_destination_that_is_not_ready_at_once_is_asked_again(pair: EnginePair) -> None:
    request = RequestId("slow-grammar")
    payload = encode_fake(FakeRequest((1, 2, 3), 50, ready_polls=3))
    assert pair.first.add(Submission(request, "client", 0, 3, 50, payload)) is None
    pair.decode_until(pair.first, request, 2)
    pair.ferry(request, pair.first, pair.second)
    pair.finish(pair.second, request)
    assert tuple(pair.tokens(request)) == expected_output(FakeRequest((1, 2, 3), 50))


def test_a_payload_that_cannot_be_read_is_refused_for_good(pair: EnginePair) -> None:
    refusal = pair.first.add(Submission(RequestId("r"), "client", 0, 3, 50, b"\xff"))
    assert refusal is not None and refusal.final


def test_it_breaks_when_told_to() -> None:
    kit = FakeKit(dataclasses.replace(PLAIN, fail_at_step=1))
    kit.first.add(kit.submission(RequestId("r"), Shape(10, 10)))
    with pytest.raises(FakeEngineBroke):
        kit.first.step()
    kit.close()


def _without_generator(state: bytes) -> bytes:
    small = msgspec.msgpack.decode(state, type=FakeState)
    return msgspec.msgpack.encode(msgspec.structs.replace(small, generator=0))


@pytest.mark.parametrize(
    "sabotage",
    [
        Sabotage(skip_block=0),
        Sabotage(skip_block=3),
        Sabotage(skip_tail=True),
        Sabotage(alter_state=_without_generator),
    ],
)
def test_negative_control_a_move_that_leaves_something_out_changes_the_answer(
    pair: EnginePair, sabotage: Sabotage
) -> None:
    shape = Shape(75, 60, prompt_key=5)
    request = pair.add(pair.first, shape)
    pair.decode_until(pair.first, request, 10)
    pair.ferry(request, pair.first, pair.second, sabotage=sabotage)
    pair.finish(pair.second, request)
    assert tuple(pair.tokens(request)) != expected_output(FakeRequest(prompt_of(shape), 60))


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_moves_under_traffic_is_exact_and_leaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    config = dataclasses.replace(
        PLAIN, num_blocks=40, max_num_seqs=5, max_num_batched_tokens=48, max_model_len=300, is_pipelined=seed % 2 == 1
    )
    for pair in pair_of(config):
        shapes = {
            pair.new_id(): Shape(rng.randrange(1, 90), rng.randrange(1, 90), rng.randrange(5), rng.randrange(3))
            for _ in range(24)
        }
        waiting = list(shapes)
        where = {}
        num_moves = 0
        while waiting or not all(pair.is_finished(request) for request in shapes):
            if waiting and rng.random() < 0.3:
                request = waiting.pop()
                where[request] = rng.choice((pair.first, pair.second))
                pair.add(where[request], shapes[request], request)
            for engine in (pair.first, pair.second):
                if engine.has_work():
                    pair.step(engine)
            changed = rng.choice([*where, pair.new_id()])
            if changed in where:
                where[changed].set_priority(changed, rng.randrange(-2, 4))
            alive = [request for request in where if len(pair.tokens(request)) < shapes[request].max_tokens - 8]
            if alive and rng.random() < 0.4:
                request = rng.choice(alive)
                source = where[request]
                destination = pair.second if source is pair.first else pair.first
                try:
                    pair.ferry(request, source, destination, num_stages=rng.randrange(3), without_kv=rng.random() < 0.1)
                except Refused:
                    continue
                else:
                    where[request] = destination
                    num_moves += 1
        for request, shape in shapes.items():
            assert tuple(pair.tokens(request)) == expected_output(FakeRequest(prompt_of(shape), shape.max_tokens))
        assert num_moves > 5
