"""Two real vLLM engines in one process, stepped from one thread, and how to write submissions for them."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from instance.spec import Carrier
from instance.types import Submission
from instance.vllm.codec import encode_request
from instance.vllm.host import VllmEngine
from instance.vllm.rank import Carriage
from migration.types import RequestId
from tests.support.model import tiny_model_path
from tests.support.pair import Shape

BLOCK_SIZE = 32
NUM_BLOCKS = 64
MAX_MODEL_LEN = 1024


def engine_argv(model: Path | None = None, **changes: object) -> tuple[str, ...]:
    """Flags of a small engine; `changes` by flag name, None to leave one out, True for a bare flag."""
    flags: dict[str, object] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": NUM_BLOCKS + 1,
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
        "disable_log_stats": True,
        **changes,
    }
    argv = [str(model or tiny_model_path())]
    for name, value in flags.items():
        if value is not None:
            argv.append(f"--{name.replace('_', '-')}")
            if value is not True:
                argv.append(str(value))
    return tuple(argv)


def start_engine(carrier: Carrier = Carrier.TCP, model: Path | None = None, **changes: object) -> VllmEngine:
    return VllmEngine.from_argv(engine_argv(model, **changes), Carriage(carrier, "127.0.0.1", "a-token"))


def prompt_of(key: int, num_tokens: int, vocabulary: int = 500) -> list[int]:
    chooser = random.Random(key * 100_003 + num_tokens)
    return [chooser.randrange(3, vocabulary) for _ in range(num_tokens)]


def submission_of(
    request_id: RequestId,
    prompt: list[int],
    params: SamplingParams,
    priority: int = 0,
    cache_salt: str | None = None,
    lora_request: LoRARequest | None = None,
    **fields: Any,
) -> Submission:
    """As a gateway would make it (vLLM's InputProcessor does these last touches there)."""
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=lora_request,
        cache_salt=cache_salt,
        data_parallel_rank=None,
        priority=priority,
        external_req_id=f"external-{request_id}",
        **fields,
    )
    payload = encode_request(request)
    return Submission(request_id, f"external-{request_id}", priority, len(prompt), params.max_tokens or 0, payload)


class VllmKit:
    """`EngineKit` over two engines of one process."""

    def __init__(self, first: VllmEngine, second: VllmEngine) -> None:
        self.first = first
        self.second = second

    def submission(self, request_id: RequestId, shape: Shape) -> Submission:
        params = SamplingParams(temperature=0.0, max_tokens=shape.max_tokens, ignore_eos=True)
        return submission_of(request_id, prompt_of(shape.prompt_key, shape.num_prompt_tokens), params, shape.priority)


@functools.cache
def shared_kit() -> VllmKit:
    """One pair for the whole test process: an engine costs seconds, and every test leaves both idle."""
    return VllmKit(start_engine(), start_engine())
