"""Which kind of test is this, and what surroundings does every test get?

The folder below tests/ is the marker. The environment is set here, before anything imports Ray or vLLM.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

FOLDER_MARKS = frozenset(
    {
        "unit",
        "exhaustive",
        "property",
        "golden",
        "simulation",
        "contract",
        "architecture",
        "integration",
        "e2e",
        "gpu",
    }
)

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# No test is timed: on a busy machine an example may take any time. A change is judged by the same examples each time;
# `make test-all` looks for new ones.
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden traces anew instead of comparing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in FOLDER_MARKS:
            item.add_marker(folder)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def is_rewriting_golden(request: pytest.FixtureRequest) -> bool:
    """True when golden traces are to be written anew (`make golden`)."""
    return bool(request.config.getoption("--rewrite-golden"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real traces and latency profiles; skips, saying so, where it is absent."""
    folder = Path(os.environ.get("KVFERRY_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no trace data: set KVFERRY_DATA to its folder (default: ../shared/data beside the checkout)")
    return folder
