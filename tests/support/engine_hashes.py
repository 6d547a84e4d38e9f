"""By which hashes does vLLM's engine know a prompt's blocks? As `EngineCore.preprocess_add_request` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from instance.messages import HASH_BYTES


def request_of(tokens: Sequence[int], params: SamplingParams | None = None, **more: Any) -> EngineCoreRequest:
    """`more`: fields of EngineCoreRequest."""
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": list(tokens),
        "mm_features": None,
        "sampling_params": params or SamplingParams(max_tokens=4),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**fields | more)


def hashes_of(request: EngineCoreRequest, block_size: int, algorithm: Any = sha256) -> tuple[int, ...]:
    """The last bytes of each full block's hash."""
    init_none_hash(algorithm)
    made = Request.from_engine_core_request(request, get_request_block_hasher(block_size, algorithm))
    return tuple(int.from_bytes(one[-HASH_BYTES:], "big") for one in made.block_hashes)
