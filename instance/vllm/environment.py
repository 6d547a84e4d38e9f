"""What does vLLM read from the environment that we want otherwise? Call `prepare_environment` before vLLM is imported.

Imports nothing of vLLM itself: its logger reads the level when it is imported.
"""

from __future__ import annotations

import os

DEFAULTS = {
    # The engine lives in this process; vLLM's CPU platform would otherwise insist on a process of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Threads are not pinned: instances share the cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def prepare_environment() -> None:
    """Fill in what is missing; what the user has set stays."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
