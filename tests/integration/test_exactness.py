"""Does a migrated request put out exactly what it would have put out undisturbed? Tokens, logprobs, finish, usage.

Each kind of request runs twice on the same engines, in batches of one, so that even the last bit must be equal. The
negative
controls leave one piece of state behind and must fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.types import RequestStatus
from instance.vllm.codec import decode_state, encode_state
from instance.vllm.host import VllmEngine
from migration.types import StoppedRequest
from tests.contract.chunk_suite import ChunkContract
from tests.support.cases import CASES, params
from tests.support.exactness import Comparison, Seen
from tests.support.exactness_suite import PROMPT, Compare, comparisons
from tests.support.pair import EnginePair, Refused, Sabotage
from tests.support.vllm_kit import VllmKit, prompt_of, shared_kit, start_engine, submission_of

AT_BOUNDARY = (24, 25, 26)


@pytest.fixture
def compare() -> Iterator[Compare]:
    yield from comparisons(shared_kit())


@pytest.fixture(scope="module")
def chunking_kit() -> VllmKit:
    """Engines that need several steps for a prompt."""
    return VllmKit(start_engine(max_num_batched_tokens=64), start_engine(max_num_batched_tokens=64))


@pytest.mark.parametrize("case", [*CASES])
def test_a_migrated_request_puts_out_what_an_undisturbed_one_does(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected = comparison.undisturbed()
    assert len(expected.tokens) > 24, "the request is too short to be moved in its middle"
    assert comparison.migrated(hops=(20,)) == expected


def test_a_stop_token_after_the_migration_ends_the_request_there(compare: Compare) -> None:
    tokens = compare("greedy").undisturbed().tokens
    stop = next(token for i, token in enumerate(tokens) if i >= 30 and token not in tokens[:i])
    comparison = Comparison(shared_kit(), 1, PROMPT, params(stop_token_ids=[stop], logprobs=1))
    expected = comparison.undisturbed()
    assert (expected.stop_reason, len(expected.tokens)) == (stop, tokens.index(stop) + 1)
    assert comparison.migrated(hops=(20, 25)) == expected
    comparison.close()


@pytest.mark.parametrize("at", [1, 2, *AT_BOUNDARY, 66])
def test_the_moment_of_the_migration_does_not_matter(at: int, compare: Compare) -> None:
    comparison = compare("greedy")
    assert comparison.migrated(hops=(at,)) == comparison.undisturbed()


@pytest.mark.parametrize(
    "case", ["greedy", "seeded", "penalties, seeded", "json, penalties", "allowed ids", "bad words"]
)
def test_a_request_may_go_there_and_back_many_times(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected = comparison.undisturbed()
    hops = [at for at in (3, 11, 19, 27, 35, 43) if at < len(expected.tokens) - 3]
    assert len(hops) > 2
    assert comparison.migrated(hops) == expected


@pytest.mark.parametrize("case", ["greedy", "seeded", "penalties, seeded", "regex"])
def test_tokens_are_the_same_when_the_kv_is_computed_again(case: str, compare: Compare) -> None:
    comparison = compare(case)
    expected, moved = comparison.undisturbed(), comparison.migrated(hops=(20,), without_kv=True)
    # Prefill and decode kernels differ in the last bits: tokens are equal, logprobs need not be.
    assert replace(moved, logprobs=()) == replace(expected, logprobs=())


@pytest.mark.parametrize("case", ["greedy", "seeded", "json", "prompt logprobs"])
def test_a_request_that_has_not_run_moves_exactly(case: str, compare: Compare) -> None:
    """With a grammar it is still waiting for it: the first step has not asked yet whether it is compiled."""
    comparison = compare(case)
    expected = comparison.undisturbed()
    request_id, ferried = comparison.move_at_once()
    assert (ferried.settled_tokens, ferried.tail_blocks) == (0, 0)
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


@pytest.mark.parametrize("case", ["greedy", "penalties"])
def test_a_half_computed_prompt_moves_exactly(case: str, compare: Compare, chunking_kit: VllmKit) -> None:
    comparison = compare(case, num_prompt_tokens=300, kit=chunking_kit)
    expected = comparison.undisturbed()
    request_id = comparison.start()
    comparison.pair.step(comparison.first)
    ferried = comparison.pair.ferry(request_id, comparison.first, comparison.second)
    assert ferried.settled_tokens == 192 and ferried.committed.num_output_tokens == 0
    comparison.pair.finish(comparison.second, request_id)
    assert comparison.seen(request_id) == expected


class TestEnginesInSmallChunks(ChunkContract):
    """What the contract suite asks of them; here, where such engines run: an engine costs a gigabyte."""

    @pytest.fixture
    def pair(self, chunking_kit: VllmKit) -> Iterator[EnginePair]:
        pair = EnginePair(chunking_kit)
        yield pair
        pair.drain()
        pair.close()


def test_prompt_logprobs_that_are_not_complete_are_refused_with_the_reason(
    compare: Compare, chunking_kit: VllmKit
) -> None:
    comparison = compare("prompt logprobs", num_prompt_tokens=300, kit=chunking_kit)
    request_id = comparison.start()
    comparison.pair.step(comparison.first)
    refusal = comparison.first.describe(request_id)
    assert "prompt logprobs" in str(refusal)
    assert comparison.first.requests()[0].movable is False


@pytest.mark.parametrize("case", ["greedy", "penalties, seeded"])
def test_a_preempted_request_moves(case: str, compare: Compare) -> None:
    """1. Three requests nearly fill the blocks. 2. They grow; the youngest is preempted. 3. It is moved, and goes on
    there."""
    comparison = compare(case, key=50, num_prompt_tokens=600)
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed()
    others = [pair.new_id("other") for _ in range(2)]
    request_id = comparison.start()
    for i, other in enumerate(others):
        assert first.add(submission_of(other, prompt_of(60 + i, 700), params(max_tokens=80)())) is None
    pair.step_until(
        first, lambda: pair.is_finished(request_id) or _status(first, others[-1]) is RequestStatus.PREEMPTED
    )
    assert not pair.is_finished(request_id)
    moved = others[-1]
    alone = EnginePair(pair.kit)
    ferried = pair.ferry(moved, first, second)
    assert ferried.settled_tokens == 0 and ferried.committed.num_output_tokens > 0
    pair.finish(second, moved)
    pair.finish(first, request_id, others[0])
    again = alone.new_id()
    assert second.reset_prefix_cache()
    assert second.add(submission_of(again, prompt_of(61, 700), params(max_tokens=80)())) is None
    alone.finish(second, again)
    alone.close()
    assert pair.tokens(moved) == alone.tokens(again)
    assert comparison.seen(request_id).tokens == expected.tokens


def _status(engine: VllmEngine, request_id: object) -> RequestStatus:
    return next(view.status for view in engine.requests() if view.request_id == request_id)


# ---- negative controls: each leaves one piece of state behind, and the comparison must see it


def without_generator(state: bytes) -> bytes:
    decoded = decode_state(state)
    return encode_state(
        type(decoded)(**{**{name: getattr(decoded, name) for name in decoded.__struct_fields__}, "generator": None})
    )


@pytest.mark.parametrize("malformed", [{"generator": b"short"}, {"generator": b""}, {"prefill_stats": (1, 2)}])
def test_a_state_vllm_could_not_take_in_is_refused_and_the_engine_goes_on(
    compare: Compare, malformed: dict[str, object]
) -> None:
    comparison = compare("seeded", key=74)
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed()
    request_id = comparison.start()
    pair.decode_until(first, request_id, 5)
    sabotage = Sabotage(
        alter_state=lambda state: encode_state(msgspec.structs.replace(decode_state(state), **malformed))
    )
    with pytest.raises(Refused):
        pair.ferry(request_id, first, second, sabotage=sabotage)
    assert second.load().reserved_blocks == 0
    pair.finish(first, request_id)
    assert pair.tokens(request_id) == list(expected.tokens)


def assert_altered(moved: Seen, expected: Seen) -> None:
    assert moved.num_prefill_reports == expected.num_prefill_reports == 1
    assert (moved.tokens, moved.logprobs) != (expected.tokens, expected.logprobs)


def test_control_a_block_that_is_not_copied_is_noticed(compare: Compare) -> None:
    comparison = compare("greedy", key=70)
    expected = comparison.undisturbed()
    assert_altered(comparison.migrated(hops=(20,), sabotage=Sabotage(skip_block=3)), expected)


def test_control_a_tail_that_is_not_copied_is_noticed(compare: Compare) -> None:
    comparison = compare("greedy", key=71)
    expected = comparison.undisturbed()
    assert_altered(comparison.migrated(hops=(20,), sabotage=Sabotage(skip_tail=True)), expected)


def test_control_a_sampler_that_starts_again_is_noticed(compare: Compare) -> None:
    comparison = compare("seeded", key=72)
    expected = comparison.undisturbed()
    moved = comparison.migrated(hops=(20,), sabotage=Sabotage(alter_state=without_generator))
    assert moved.tokens[:20] == expected.tokens[:20]
    assert_altered(moved, expected)


def test_control_outputs_sent_as_prompt_are_noticed(compare: Compare) -> None:
    comparison = compare("strong penalties", key=73)
    pair, first, second = comparison.pair, comparison.first, comparison.second
    expected = comparison.undisturbed()
    request_id = comparison.start()
    pair.decode_until(first, request_id, 20)
    stopped = pair.stop(first, request_id)
    assert isinstance(stopped, StoppedRequest)
    first.release(request_id)
    longer = [*prompt_of(73, PROMPT), *decode_state(stopped.state).output_token_ids]
    resubmitted = pair.new_id()
    shorter = CASES["strong penalties"]()
    shorter.max_tokens = 50
    assert second.add(submission_of(resubmitted, longer, shorter)) is None
    pair.finish(second, resubmitted)
    assert [*pair.tokens(request_id), *pair.tokens(resubmitted)] != list(expected.tokens)
