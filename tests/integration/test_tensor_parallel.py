"""Does a request move between engines of two ranks each? Every rank pushes to its peer rank, told by its own socket."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:  # asked without importing it: this process does not need it
    pytest.skip("vLLM is not installed", allow_module_level=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("scheduling", "scheduler"),
    [
        ("synchronous", "FerryScheduler"),
        pytest.param("asynchronous", "FerryAsyncScheduler", marks=pytest.mark.long),
    ],
)
def test_a_request_moves_exactly_between_engines_of_two_ranks(scheduling: str, scheduler: str, repo_root: Path) -> None:
    command = [sys.executable, "-m", "tests.support.tensor_parallel", "shm", scheduling]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["refused"] is None and result["endpoints"] == 2
    assert result["scheduler"] == scheduler
    assert result["greedy"] and result["seeded"] and result["penalties"]
    assert result["control"], "a block left out on every rank must be noticed"
