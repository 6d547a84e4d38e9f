"""Does a request move exactly between engines with vLLM's V2 model runner, which GPUs have unasked?

`make test-v2`: on a CPU its kernels are interpreted (tests/support/v2_engine.py says what is replaced). This runner
knows requests by slots: one that is stopped gives its slot back, and one that arrives is handed to it as a new one,
output and all. Both schedulers are tried, the asynchronous one being what GPUs have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from instance.vllm import handshake
from migration.types import RequestId
from tests.support import v2_engine
from tests.support.cases import params
from tests.support.engine_process import EngineProcess
from tests.support.exactness_suite import Compare, MovesExactly, comparisons
from tests.support.vllm_kit import VllmKit, engine_argv, prompt_of, submission_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not v2_engine.TRITON.is_dir(), reason="Triton is not here: make test-v2 fetches it"),
]

CHUNK = 256
SCHEDULING = ("synchronous", v2_engine.ASYNCHRONOUS)


@pytest.fixture(scope="module", params=SCHEDULING)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmKit]:
    logs = tmp_path_factory.mktemp("engines")
    argv = engine_argv(max_num_batched_tokens=CHUNK)
    program = (v2_engine.PROGRAM, request.param)
    engines = [EngineProcess(argv, logs / f"{name}.log", program) for name in ("first", "second")]
    try:
        for engine in engines:
            engine.wait()
        yield VllmKit(*cast("Any", engines))  # it asks for no more than the port
    finally:
        for engine in engines:
            engine.close()


@pytest.fixture
def compare(kit: VllmKit) -> Iterator[Compare]:
    yield from comparisons(kit)


@pytest.fixture
def chunk() -> int:
    return CHUNK


def test_control_it_is_that_runner(kit: VllmKit) -> None:
    assert kit.first.facts.migration_refused_because is None
    assert handshake.decode(kit.first.facts.kv_fingerprint).model_runner == "V2"


class TestV2Runner(MovesExactly):
    """Its sampler keeps no state, so that a seeded prompt may be cut, too."""

    def test_a_seeded_half_computed_prompt_moves(self, compare: Compare, chunk: int) -> None:
        self.test_a_half_computed_prompt_moves("penalties, seeded", compare, chunk)

    @pytest.mark.parametrize(
        "lists", [{"allowed_token_ids": [5] * 1025}, {"logit_bias": dict.fromkeys(range(1025), 1.0)}]
    )
    def test_more_token_ids_than_its_arrays_hold_are_refused(self, lists: dict[str, Any], kit: VllmKit) -> None:
        """They would end the engine."""
        submission = submission_of(RequestId("too-many"), prompt_of(1, 20), params(**lists)())
        refusal = kit.first.add(submission)
        assert refusal is not None and refusal.final and "more than 1024" in refusal.reason
