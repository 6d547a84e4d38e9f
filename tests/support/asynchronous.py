"""Which two engines schedule asynchronously, as on GPUs? bench/exactness_asynchronous.py says how."""

from __future__ import annotations

import functools

from bench.exactness_asynchronous import asynchronous_scheduling
from tests.support.vllm_kit import VllmKit, start_engine

__all__ = ["asynchronous_scheduling", "shared_asynchronous_kit"]


@functools.cache
def shared_asynchronous_kit() -> VllmKit:
    """As `vllm_kit.shared_kit`, one pair for the whole test process."""
    with asynchronous_scheduling():
        return VllmKit(start_engine(), start_engine())
