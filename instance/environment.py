"""Which environment variables must an engine's process have before vLLM is imported?"""

from __future__ import annotations

import os
from collections.abc import Mapping

from instance.spec import EngineKind, InstanceSpec

SMALL_MACHINE_CPUS = 8
"""Up to here several engines share the machine: one OpenMP thread each, or they fight for the cores."""


def engine_environment(spec: InstanceSpec, environ: Mapping[str, str], num_cpus: int, is_local: bool) -> dict[str, str]:
    """What to set, given what is set: the user's word wins, except where the engine's host depends on it.

    `is_local`: the model is a folder on this machine, so nothing is looked up on the hub.
    """
    if spec.engine is not EngineKind.VLLM:
        return {}
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if num_cpus <= SMALL_MACHINE_CPUS:
        wanted["OMP_NUM_THREADS"] = "1"
    if is_local:
        wanted["HF_HUB_OFFLINE"] = "1"
    chosen = {name: value for name, value in wanted.items() if name not in environ}
    chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # We host the engine core in this process.
    return chosen


def apply_environment(spec: InstanceSpec) -> None:
    """Set it in this process. Call it before vLLM, torch or numpy's threads are first used."""
    is_local = bool(spec.engine_argv) and os.path.isdir(os.path.expanduser(spec.engine_argv[0]))
    os.environ.update(engine_environment(spec, os.environ, os.cpu_count() or 1, is_local))
