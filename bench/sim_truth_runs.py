"""What does a real fleet do with these requests? Runs for bench.sim_truth, as their clients saw them, and its journal.

Instances keep no prefix cache, since the simulator's have none; nothing moves, since it is engines that are foretold.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.policy_live_runs import send, settled
from bench.policy_workload import Workload
from bench.sim_truth_twin import Run, Served
from orchestrator.config import ServeConfig
from orchestrator.demo.answers import Answer
from orchestrator.demo.cluster import MODEL_NAME, running_cluster
from orchestrator.demo.options import small_model
from orchestrator.demo.warmup import warm_up
from orchestrator.errors import OrchestratorError
from orchestrator.runtime.ray_cluster import RayCluster

BLOCK_SIZE = 32
NUM_BLOCKS = 321
"""Of an instance, one of them vLLM's own."""
MAX_MODEL_LEN = 4_096
MAX_NUM_SEQS = 64


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    workload: Workload
    seed: int


def config(num_instances: int, journal: Path) -> ServeConfig:
    return ServeConfig(
        model=small_model(),
        engine_argv=(
            *("--served-model-name", MODEL_NAME),
            *("--dtype", "float32"),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--block-size", str(BLOCK_SIZE)),
            *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
            *("--kv-cache-memory-bytes", "1G"),
            *("--max-num-seqs", str(MAX_NUM_SEQS)),
            "--no-enable-prefix-caching",
        ),
        instances=num_instances,
        gateways=1,
        port=0,
        admin_port=0,
        rebalance=False,
        journal=str(journal),
        log_level="WARNING",
    )


async def play_all(ray: RayCluster, serve: ServeConfig, plans: Sequence[Plan], console: Console) -> list[Run]:
    """One after the other, on one fleet. Raises OrchestratorError when a request fails: there is nothing to compare."""
    runs = []
    async with running_cluster(ray, serve, console) as cluster:
        await warm_up(cluster.base_url, cluster.model, "warm", console)
        await settled(cluster, serve.instances)
        for plan in plans:
            began_s = time.monotonic()
            requests = served(await send(cluster, plan.name, plan.workload.plan(plan.seed)))
            await settled(cluster, serve.instances)
            runs.append(Run(plan.name, requests, began_s, time.monotonic()))
            console.print(f"{plan.name}: {len(requests)} requests", highlight=False)
    return runs


def served(answers: Sequence[Answer]) -> tuple[Served, ...]:
    """Raises OrchestratorError when one of them failed."""
    failed = [f"{one.request_id}: {one.error or 'no token came'}" for one in answers if one.error or not one.received_s]
    if failed or not answers:
        raise OrchestratorError(f"{len(failed)} of {len(answers)} requests failed: {(*failed, 'none was sent')[0]}")
    in_order = sorted(answers, key=lambda one: one.sent_s)
    began_s = in_order[0].sent_s
    return tuple(
        Served(
            at_s=one.sent_s - began_s,
            num_prompt=one.num_prompt_tokens,
            num_answer=len(one.token_ids),
            first_s=one.received_s[0] - began_s,
            last_s=one.received_s[-1] - began_s,
        )
        for one in in_order
    )
