"""Does a request that is decoded speculatively move exactly when its KV lies on two ranks, or sees through windows?

A process for each engine, as in test_exactness_speculative.py, which has everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams

from tests.support.guessing import Guessing, ProcessKit, flat, guessing_engines
from tests.support.pair import Sabotage
from tests.support.windowed_model import MIXED, windowed_model_path

pytestmark = pytest.mark.timeout(300)


def params(**values: Any) -> Callable[[], SamplingParams]:
    return lambda: SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True, **values)


CASES = {
    "greedy": params(logprobs=2),
    "penalties": params(frequency_penalty=0.2, presence_penalty=0.1, logprobs=1),
    "allowed ids": params(allowed_token_ids=list(range(100, 140)), logprobs=1),
}
"""Of the last, guesses are right all along."""


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessKit]:
    model = windowed_model_path(MIXED)
    with guessing_engines(tmp_path_factory.mktemp("engines"), model=model, num_gpu_blocks_override=161) as kit:
        yield kit


@contextmanager
def comparing(kit: ProcessKit, case: str) -> Iterator[Guessing]:
    comparison = Guessing(kit, CASES[case])
    yield comparison
    comparison.close()


def check_exact(kit: ProcessKit, case: str, hops: tuple[int, ...]) -> None:
    """Tokens, logprobs and steps."""
    with comparing(kit, case) as comparison:
        undisturbed = comparison.run()
        moved = comparison.run(hops)
        assert moved.seen == undisturbed.seen
        assert flat(moved) == flat(undisturbed)


def check_guesses(kit: ProcessKit) -> None:
    """A control: some are right before the move, and some after it."""
    with comparing(kit, "allowed ids") as comparison:
        moved = comparison.run((12,))
        assert [max(stay) > 1 for stay in moved.steps] == [True, True], moved.steps


def check_missing_tail(kit: ProcessKit) -> None:
    """A control: KV that is not copied is noticed. The tail is in every window."""
    with comparing(kit, "greedy") as comparison:
        expected, moved = comparison.run(), comparison.run((20,), Sabotage(skip_tail=True))
        assert (moved.seen.tokens, moved.seen.logprobs) != (expected.seen.tokens, expected.seen.logprobs)
        assert moved.seen.tokens[:20] == expected.seen.tokens[:20]


@pytest.mark.parametrize("hops", [(2,), (24,), (3, 11, 19, 27, 35, 43)])
@pytest.mark.parametrize("case", [*CASES])
def test_kv_that_sees_through_windows_moves_exactly(case: str, hops: tuple[int, ...], windowed: ProcessKit) -> None:
    check_exact(windowed, case, hops)


@pytest.mark.parametrize("control", [check_guesses, check_missing_tail])
def test_controls_with_windows(control: Callable[[ProcessKit], None], windowed: ProcessKit) -> None:
    control(windowed)


@pytest.mark.long
def test_kv_on_two_ranks_moves_exactly(tmp_path: Path) -> None:
    """Four processes, which take minutes on a few cores."""
    with guessing_engines(tmp_path, tensor_parallel_size=2, max_num_seqs=4) as kit:
        check_exact(kit, "greedy", (24,))
        check_exact(kit, "allowed ids", (12, 31))
        check_guesses(kit)
        check_missing_tail(kit)
