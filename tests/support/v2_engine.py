"""How does an engine run on a CPU with vLLM's V2 model runner, which engines on GPUs have unasked? A program.

    python -m tests.support.v2_engine {synchronous|asynchronous} FLAG...

Its kernels are Triton's, which are interpreted here, slowly (some 20 ms a step); `make test-v2` fetches Triton. The two
that the interpreter cannot run have stand-ins of torch: top-k and top-p, for which vLLM has its own, and the grammar's
mask, which is written out below. Nothing of what a migration touches is replaced.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.support import engine_process

PROGRAM = "tests.support.v2_engine"
TRITON = Path(sys.prefix) / "opt" / "triton"
ASYNCHRONOUS = "asynchronous"


class _NoDriver:
    @staticmethod
    def is_active() -> bool:
        return False


class _Interpreted:
    """What vLLM looks for before it uses Triton on a CPU."""

    driver = _NoDriver
    compiler = None


def prepare() -> None:
    """Before vLLM is imported."""
    sys.path.insert(0, str(TRITON))
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    importlib.import_module("triton.backends").backends["cpu"] = _Interpreted  # it is only there now
    from vllm.v1.sample.ops import topk_topp_sampler  # noqa: PLC0415
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker  # noqa: PLC0415

    topk_topp_sampler.HAS_TRITON = False  # there is a version without it
    StructuredOutputsWorker.apply_grammar_bitmask = mask_by_grammar


def mask_by_grammar(_: Any, logits: Any, input_batch: Any, grammar_req_ids: list[str], grammar_bitmask: Any) -> None:
    """In place: -inf for what the grammar forbids. `grammar_bitmask`: a row for each request with a grammar, a bit for
    each token, the lowest first; no token is guessed ahead."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    for bits, request_id in zip(grammar_bitmask, grammar_req_ids, strict=False):
        row = int(input_batch.cu_num_logits_np[input_batch.req_ids.index(request_id)])
        is_allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: logits.shape[1]].astype(bool)
        logits[row].masked_fill_(torch.from_numpy(~is_allowed), float("-inf"))


def main(scheduling: str, argv: tuple[str, ...]) -> None:
    prepare()
    from bench.exactness_asynchronous import asynchronous_scheduling  # noqa: PLC0415

    with asynchronous_scheduling() if scheduling == ASYNCHRONOUS else nullcontext():
        engine_process.main(argv)


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2:]))
