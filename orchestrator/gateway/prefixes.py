"""By which hashes would an instance know the first blocks of this prompt? vLLM's own, made by its own code.

They chain over the whole prefix, with LoRA adapter, images and `cache_salt` where vLLM puts them: equal hashes mean
equal prompts up to there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_none_hash_seed
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from orchestrator.policy.prefixes import MAX_HASHED_BLOCKS, hash_of

logger = logging.getLogger(__name__)

PrefixHashes = Callable[[EngineCoreRequest, int], tuple[int, ...]]
"""Request, tokens of a block -> hashes of its first full blocks."""


def no_hashes(_request: EngineCoreRequest, _block_size: int) -> tuple[int, ...]:
    return ()


def prefix_hashes(cache_config: Any) -> PrefixHashes:
    """By vLLM's configuration; `no_hashes` where instances cache no prefixes, or no other process can know their hashes
    (a line in the log says so)."""
    if not cache_config.enable_prefix_caching:
        logger.info("prefix caching is off: requests are dispatched without regard to it")
        return no_hashes
    name = cache_config.prefix_caching_hash_algo
    hash_function = get_hash_fn_by_name(name)
    if resolve_none_hash_seed(hash_function) != resolve_none_hash_seed(hash_function):
        logger.warning(
            "requests are dispatched without regard to cached prefixes: with --prefix-caching-hash-algo %s each process"
            " has hashes of its own; set PYTHONHASHSEED to one value for all, or use sha256",
            name,
        )
        return no_hashes
    try:
        init_none_hash(hash_function)
    except ModuleNotFoundError as error:
        logger.warning("requests are dispatched without regard to cached prefixes: %s", error)
        return no_hashes
    return _Hashes(hash_function)


class _Hashes:
    def __init__(self, hash_function: Callable[[Any], bytes]) -> None:
        self._hash_function = hash_function
        self._has_failed = False

    def __call__(self, request: EngineCoreRequest, block_size: int) -> tuple[int, ...]:
        """Empty for what does not read the cache (a request for logprobs of its prompt), and for embeddings."""
        try:
            return self._of(request, block_size)
        except Exception as error:  # noqa: BLE001 - vLLM's inner code, on a client's input: it costs a hint, no request
            if not self._has_failed:
                # Its kind only: what it says may hold the prompt.
                logger.warning("a prompt could not be hashed, nor may others be: %s", type(error).__name__)
            self._has_failed = True
            return ()

    def _of(self, request: EngineCoreRequest, block_size: int) -> tuple[int, ...]:
        tokens, params = request.prompt_token_ids, request.sampling_params
        if tokens is None or request.prompt_embeds is not None or params is None or params.skip_reading_prefix_cache:
            return ()
        # The last token is always computed, so a block that ends with it is never taken from the cache whole.
        num_blocks = min((len(tokens) - 1) // block_size, MAX_HASHED_BLOCKS)
        if num_blocks <= 0:
            return ()
        beginning = copy(request)
        beginning.prompt_token_ids = tokens[: num_blocks * block_size]
        beginning.sampling_params = SamplingParams(max_tokens=1)  # no grammar to be prepared
        hashed = Request.from_engine_core_request(beginning, get_request_block_hasher(block_size, self._hash_function))
        return tuple(map(hash_of, hashed.block_hashes))
