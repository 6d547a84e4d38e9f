"""Does vLLM behind our port pass the contract of every engine?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.cached_suite import CachedContract
from tests.contract.engine_suite import EngineContract
from tests.support.pair import EnginePair

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.support.asynchronous import shared_asynchronous_kit
from tests.support.vllm_kit import shared_kit

pytestmark = pytest.mark.engine


@pytest.fixture
def pair() -> Iterator[EnginePair]:
    pair = EnginePair(shared_kit())
    yield pair
    pair.drain()
    pair.close()


class TestVllmEngine(EngineContract):
    """The shared suite, over two engines in this process."""


class TestWhatVllmHasCached(CachedContract):
    """The shared suite of the prefix cache, over the same engines."""


class TestVllmEngineThatSchedulesAsynchronously(EngineContract, CachedContract):
    """As engines on GPUs do: a step gives out the outputs of the step before."""

    @pytest.fixture
    def pair(self) -> Iterator[EnginePair]:
        pair = EnginePair(shared_asynchronous_kit())
        yield pair
        pair.drain()
        pair.close()
