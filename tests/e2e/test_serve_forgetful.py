"""Would the comparison of moved streams notice state that is left behind? The negative control of test_serve.

The same serve, the same streams; but its instances send everything except the state of the sampler.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.model import tiny_model_path
from tests.support.moved_streams import GREEDY, MODEL, Sampling, moved_texts, texts_of
from tests.support.serving import Serving

pytestmark = pytest.mark.timeout(300)

READY_S = 240.0
NUM_TOKENS = 900
FORGETFUL = Path(__file__).parent.parent / "support" / "forgetful"
FLAGS = ("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    paths = [str(FORGETFUL), *filter(None, [os.environ.get("PYTHONPATH")])]
    cluster = Serving(
        *(str(tiny_model_path()), "--instances", "2", "--no-rebalance", *FLAGS),
        num_gateways=1,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


async def test_without_the_samplers_state_a_moved_seeded_stream_says_something_else(serving: Serving) -> None:
    sampling: Sampling = {"temperature": 0.8, "seed": 17}
    alone = await texts_of(serving, "alone-seeded", NUM_TOKENS, sampling)
    moved, num_committed = await moved_texts(serving, "moved-seeded", NUM_TOKENS, sampling, num_hops=1)
    assert num_committed == 1
    assert moved != alone


async def test_a_greedy_stream_needs_no_sampler_and_is_not_changed(serving: Serving) -> None:
    """What differs above is the sampler and nothing else."""
    alone = await texts_of(serving, "alone-greedy", NUM_TOKENS, GREEDY)
    moved, num_committed = await moved_texts(serving, "moved-greedy", NUM_TOKENS, GREEDY, num_hops=1)
    assert num_committed == 1
    assert moved == alone
