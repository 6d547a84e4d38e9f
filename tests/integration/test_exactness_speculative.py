"""Does a request move exactly while its engine guesses tokens ahead (ngram speculative decoding)?

Each engine lives in a process of its own: of two such engines in one process the second computes something else
(vLLM 0.32 on CPU), with or without migrations. Steps are compared, too: how many tokens each step put out tells which
guesses were made and which were right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from instance.engine import Engine
from instance.types import RequestStatus
from instance.vllm import handshake
from instance.vllm.codec import decode_state, encode_state
from migration.types import Description, RequestId
from tests.support.cases import JSON
from tests.support.guessing import NUM_GUESSES, Guessing, ProcessKit, flat, guessing_engines, repeating_prompt
from tests.support.pair import Refused, Sabotage, Shape
from tests.support.vllm_kit import prompt_of, submission_of

pytestmark = pytest.mark.timeout(300)

NUM_SLOTS = 4
CHUNK = 288
"""Of a prompt, in one step."""
PROMPT = 200


def params(**values: object) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(**{"temperature": 0.0, "max_tokens": 70, "ignore_eos": True, **values})


def grammar() -> StructuredOutputsParams:
    made = StructuredOutputsParams(json=JSON)
    made._backend = "xgrammar"  # a gateway's InputProcessor chooses it
    return made


CASES = {
    "greedy": params(logprobs=2),
    "penalties": params(frequency_penalty=0.2, presence_penalty=0.1, repetition_penalty=1.05, logprobs=3),
    "strong penalties": params(frequency_penalty=2.0, presence_penalty=2.0, logprobs=1),
    "min_tokens, stop ids": params(min_tokens=40, stop_token_ids=list(range(3, 500, 3)), ignore_eos=False),
    "five logprobs": params(logprobs=5, prompt_logprobs=2),
    "allowed ids": params(allowed_token_ids=list(range(100, 140)), logprobs=1),
    "max_tokens in the middle of a step": params(allowed_token_ids=list(range(100, 140)), max_tokens=61),
    "json": params(structured_outputs=grammar(), ignore_eos=False, logprobs=1),
    "json, penalties": params(structured_outputs=grammar(), ignore_eos=False, frequency_penalty=0.5),
}
GUESSED_ON_BOTH_SIDES = {
    "greedy": 32,
    "penalties": 32,
    "five logprobs": 32,
    "allowed ids": 12,
    "max_tokens in the middle of a step": 12,
}
"""After so many tokens some guesses were right, and some will be."""
Compare = Callable[..., Guessing]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessKit]:
    logs = tmp_path_factory.mktemp("engines")
    with guessing_engines(logs, max_num_seqs=NUM_SLOTS, max_num_batched_tokens=CHUNK) as engines:
        yield engines


@pytest.fixture
def compare(kit: ProcessKit) -> Iterator[Compare]:
    made: list[Guessing] = []

    def make(case: str, **changes: int) -> Guessing:
        made.append(Guessing(kit, CASES[case], **changes))
        return made[-1]

    yield make
    for comparison in made:
        comparison.close()


@pytest.mark.parametrize("hops", [(2,), (24,), (31, 33), (3, 11, 19, 27, 35, 43)])
@pytest.mark.parametrize("case", [*CASES])
def test_tokens_logprobs_and_steps_are_those_of_an_undisturbed_run(
    case: str, hops: tuple[int, ...], compare: Compare
) -> None:
    comparison = compare(case)
    undisturbed = comparison.run()
    hops = tuple(at for at in hops if at < len(undisturbed.seen.tokens) - 8)
    assert hops, "the request is too short to be moved in its middle"
    moved = comparison.run(hops)
    assert moved.seen == undisturbed.seen
    assert flat(moved) == flat(undisturbed)


@pytest.mark.parametrize("case", [*GUESSED_ON_BOTH_SIDES])
def test_control_guesses_are_right_before_and_after_the_move(case: str, compare: Compare) -> None:
    comparison = compare(case)
    moved = comparison.run((GUESSED_ON_BOTH_SIDES[case],))
    assert [max(stay) > 1 for stay in moved.steps] == [True, True], moved.steps


def test_guesses_that_travelled_are_right_in_the_first_step_at_the_destination(compare: Compare) -> None:
    moved = compare("allowed ids").run((12, 24, 36, 48))
    assert [stay[0] for stay in moved.steps[1:]] == [NUM_GUESSES + 1] * 4, moved.steps


@pytest.mark.parametrize("at", [*range(20, 30)])
def test_the_moment_of_the_migration_does_not_matter(at: int, compare: Compare) -> None:
    """Also where the settled KV, or the guesses, end at a block's edge."""
    comparison = compare("allowed ids")
    assert comparison.run((at,)).seen == comparison.run().seen


@pytest.mark.parametrize("case", ["greedy", "json", "penalties"])
def test_tokens_are_the_same_when_the_kv_is_computed_again(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected, moved = comparison.undisturbed(), comparison.migrated(hops=(20,), without_kv=True)
    assert replace(moved, logprobs=()) == replace(expected, logprobs=())


@pytest.mark.parametrize("case", ["greedy", "json", "five logprobs"])
def test_a_request_that_has_not_run_moves_exactly(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected = comparison.undisturbed()
    request_id, _ = comparison.move_at_once()
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


@pytest.mark.parametrize("case", ["greedy", "penalties"])
def test_a_half_computed_prompt_moves_exactly(case: str, compare: Compare) -> None:
    comparison = compare(case, num_prompt_tokens=900)
    expected = comparison.undisturbed()
    request_id = comparison.start()
    comparison.pair.step(comparison.first)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=1)
    assert ferried.settled_tokens == 2 * CHUNK and ferried.committed.num_output_tokens == 0
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


def test_a_preempted_request_moves(compare: Compare) -> None:
    """1. Three requests nearly fill the blocks. 2. They grow; the youngest is preempted. 3. It is moved, and goes on
    there."""
    comparison = compare("greedy")
    pair, first, second = comparison.pair, comparison.first, comparison.second
    requests = [Shape(660, 160, prompt_key=60 + i) for i in range(3)]
    expected = [pair.run_alone(first, shape) for shape in requests]
    assert first.reset_prefix_cache()
    ids = [pair.add(first, shape) for shape in requests]
    pair.step_until(first, lambda: RequestStatus.PREEMPTED in {view.status for view in first.requests()})
    moved = next(view.request_id for view in first.requests() if view.status is RequestStatus.PREEMPTED)
    ferried = pair.ferry(moved, first, second)
    assert ferried.settled_tokens == 0 and ferried.committed.num_output_tokens > 0
    pair.finish(second, moved)
    pair.finish(first, *(request_id for request_id in ids if request_id != moved))
    assert [pair.tokens(request_id) for request_id in ids] == expected


@pytest.mark.parametrize("case", [case for case in CASES if case != "five logprobs"])
def test_tokens_are_the_same_beside_other_traffic_on_both_engines(case: str, compare: Compare) -> None:
    """Another batch changes the last bits of a logprob in any vLLM: tokens and steps are compared."""
    comparison = compare(case)
    pair = comparison.pair
    shapes = [Shape(90 + 30 * i, 60, prompt_key=30 + i) for i in range(3)]
    alone = [pair.run_alone(comparison.first, shape) for shape in shapes]
    undisturbed = comparison.run()
    assert comparison.first.reset_prefix_cache() and comparison.second.reset_prefix_cache()
    others = comparison.add_others(3, 3)
    for engine in (comparison.first, comparison.second):
        for _ in range(4):
            pair.step(engine)
    request_id = pair.new_id()
    submission = submission_of(request_id, repeating_prompt(2, PROMPT), CASES[case]())
    assert comparison.first.add(submission) is None
    here, there = comparison.first, comparison.second
    for at in (12, 24, 30):
        pair.decode_until(here, request_id, at)
        pair.step(there)
        pair.ferry(request_id, here, there)
        here, there = there, here
    pair.finish(here, request_id)
    pair.finish(comparison.first, *others[:3])
    pair.finish(comparison.second, *others[3:])
    assert pair.tokens(request_id) == list(undisturbed.seen.tokens)
    assert comparison.steps(request_id) == flat(undisturbed)
    assert [pair.tokens(other) for other in others[:3]] == alone


def test_a_moved_request_that_waits_for_a_slot_goes_on_with_its_guesses(compare: Compare) -> None:
    """1. A slot is free at the destination: it reserves. 2. Meanwhile others take every slot. 3. The request comes and
    waits with its KV. 4. A slot is free again: it verifies the guesses it came with."""
    comparison = compare("allowed ids")
    pair, first, second = comparison.pair, comparison.first, comparison.second
    undisturbed = comparison.run()
    request_id = comparison.start()
    pair.decode_until(first, request_id, 12)
    num_before = len(comparison.steps(request_id))
    others: list[RequestId] = []

    def meanwhile(state: bytes) -> bytes:
        assert decode_state(state).draft_token_ids
        others.extend(comparison.add_others(0, NUM_SLOTS))
        pair.step_until(second, lambda: second.load().num_running == NUM_SLOTS)
        return state

    pair.ferry(request_id, first, second, num_stages=0, sabotage=Sabotage(alter_state=meanwhile))
    for _ in range(3):
        pair.step(second)
    assert status(second, request_id) is RequestStatus.PREEMPTED
    pair.finish(second, request_id, *others)
    assert pair.tokens(request_id) == list(undisturbed.seen.tokens)
    assert comparison.steps(request_id)[num_before] == NUM_GUESSES + 1
    assert comparison.steps(request_id) == flat(undisturbed)


def test_a_resumed_request_goes_on_with_its_guesses_though_its_slot_was_taken(compare: Compare) -> None:
    """1. Every slot is taken, and one more waits. 2. One is stopped: the one that waited takes its slot. 3. It is
    resumed, and waits with its KV. 4. It goes on."""
    comparison = compare("allowed ids")
    pair, first = comparison.pair, comparison.first
    undisturbed = comparison.run()
    request_id = comparison.start()
    others = comparison.add_others(NUM_SLOTS, 0)
    pair.decode_until(first, request_id, 12)
    pair.stop(first, request_id)
    pair.step_until(first, lambda: first.load().num_running == NUM_SLOTS)
    first.resume(request_id)
    pair.step(first)
    assert status(first, request_id) is RequestStatus.PREEMPTED
    pair.finish(first, request_id, *others)
    assert pair.tokens(request_id) == list(undisturbed.seen.tokens)
    assert comparison.steps(request_id) == flat(undisturbed)


def status(engine: Engine, request_id: RequestId) -> RequestStatus:
    return next(view.status for view in engine.requests() if view.request_id == request_id)


# ---- what is refused


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "top_k": 8},
]


@pytest.mark.parametrize("sampling", SAMPLED)
def test_a_sampled_request_is_refused_on_a_cpu(sampling: dict[str, Any], compare: Compare) -> None:
    """vLLM would draw from memory that nothing has written, and may end with it."""
    pair = compare("greedy").pair
    refusal = pair.first.add(submission_of(pair.new_id(), prompt_of(1, 100), params(**sampling)()))
    assert refusal is not None and "sampled requests cannot run on a CPU" in refusal.reason
    assert not pair.first.has_work()


def with_guesses(state: bytes, guesses: list[int]) -> bytes:
    return encode_state(msgspec.structs.replace(decode_state(state), draft_token_ids=guesses))


def test_more_guesses_than_are_verified_here_are_refused_and_the_source_goes_on(compare: Compare) -> None:
    comparison = compare("greedy")
    expected = comparison.undisturbed()
    request_id = comparison.start()
    comparison.pair.decode_until(comparison.first, request_id, 5)
    too_many = Sabotage(alter_state=partial(with_guesses, guesses=[5] * (NUM_GUESSES + 1)))
    with pytest.raises(Refused, match="4 guessed tokens, and at most 3"):
        comparison.pair.ferry(request_id, comparison.first, comparison.second, sabotage=too_many)
    assert comparison.second.load().reserved_blocks == 0
    comparison.pair.finish(comparison.first, request_id)
    assert comparison.seen(request_id) == expected


def test_guesses_for_a_prompt_that_is_not_computed_are_refused(compare: Compare) -> None:
    comparison = compare("greedy", num_prompt_tokens=900)
    request_id = comparison.start()
    comparison.pair.step(comparison.first)
    early = Sabotage(alter_state=partial(with_guesses, guesses=[5]))
    with pytest.raises(Refused, match="has not computed its own"):
        comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=0, sabotage=early)
    comparison.pair.finish(comparison.first, request_id)


def test_guesses_that_the_grammar_does_not_take_are_left_out(compare: Compare) -> None:
    """vLLM would end with the step that fills in such a guess."""
    comparison = compare("json")
    expected = comparison.undisturbed()
    request_id = comparison.start()
    comparison.pair.decode_until(comparison.first, request_id, 10)
    wrong = Sabotage(alter_state=partial(with_guesses, guesses=[3, 4, 5]))
    comparison.pair.ferry(request_id, comparison.first, comparison.second, num_stages=0, sabotage=wrong)
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id).tokens == expected.tokens


def test_an_engine_that_guesses_otherwise_is_refused_with_both_ways(compare: Compare) -> None:
    comparison = compare("greedy")
    request_id = comparison.start()
    comparison.pair.decode_until(comparison.first, request_id, 5)

    def unguessed(description: Description) -> Description:
        other = msgspec.structs.replace(handshake.decode(description.kv_fingerprint), speculation="")
        return replace(description, kv_fingerprint=handshake.encode(other))

    with pytest.raises(Refused, match="the source guesses none, this instance 3 tokens by ngram of 1 to 3"):
        comparison.pair.ferry(
            request_id, comparison.first, comparison.second, sabotage=Sabotage(alter_description=unguessed)
        )
    comparison.pair.finish(comparison.first, request_id)


# ---- negative controls


@pytest.mark.parametrize("guesses", [[], [5, 6, 7]])
def test_control_guesses_left_behind_or_replaced_change_the_steps_and_no_token(
    guesses: list[int], compare: Compare
) -> None:
    comparison = compare("allowed ids")
    undisturbed = comparison.run()
    moved = comparison.run((12,), Sabotage(alter_state=partial(with_guesses, guesses=guesses)))
    assert moved.seen.tokens == undisturbed.seen.tokens
    assert flat(moved) != flat(undisturbed)


@pytest.mark.parametrize("sabotage", [Sabotage(skip_block=3), Sabotage(skip_tail=True)])
def test_control_kv_that_is_not_copied_is_noticed(sabotage: Sabotage, compare: Compare) -> None:
    comparison = compare("greedy")
    expected, moved = comparison.run(), comparison.run((20,), sabotage)
    assert (moved.seen.tokens, moved.seen.logprobs) != (expected.seen.tokens, expected.seen.logprobs)
    assert moved.seen.tokens[:20] == expected.seen.tokens[:20]
