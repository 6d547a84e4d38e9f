"""Moves requests between two engines of two ranks each, there and back; run as a program, because it owns processes.

Prints one JSON line: for each request whether it was exact, and the bytes a push moved.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

from vllm.sampling_params import SamplingParams

from bench.exactness_asynchronous import asynchronous_scheduling
from instance.spec import Carrier
from instance.vllm.host import VllmEngine
from tests.support.exactness import Comparison
from tests.support.pair import Sabotage
from tests.support.vllm_kit import VllmKit, start_engine


def main(carrier: str, scheduling: str) -> None:
    def start() -> VllmEngine:
        with asynchronous_scheduling() if scheduling == "asynchronous" else nullcontext():
            return start_engine(Carrier(carrier), tensor_parallel_size=2, max_num_seqs=4)

    kit = VllmKit(start(), start())
    result: dict[str, object] = {
        "endpoints": len(kit.first.mover.endpoints()),
        "refused": kit.first.facts.migration_refused_because,
        "scheduler": type(kit.first._scheduler).__name__,
    }
    kinds = {
        "greedy": {"temperature": 0.0, "logprobs": 2},
        "seeded": {"temperature": 1.0, "seed": 5},
        "penalties": {"temperature": 0.0, "frequency_penalty": 0.5},
    }
    try:
        for i, (name, values) in enumerate(kinds.items()):

            def params(values: dict[str, float] = values) -> SamplingParams:
                return SamplingParams(max_tokens=50, ignore_eos=True, **values)

            comparison = Comparison(kit, 10 + i, 200, params)
            expected = comparison.undisturbed()
            result[name] = comparison.migrated(hops=(15, 30)) == expected
            if name == "greedy":
                other = Comparison(kit, 20, 200, params)
                expected = other.undisturbed()
                result["control"] = other.migrated(hops=(15,), sabotage=Sabotage(skip_block=2)) != expected
                other.close()
            comparison.close()
    finally:
        kit.first.close()
        kit.second.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
