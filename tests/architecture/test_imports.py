"""Do the import contracts of pyproject.toml hold, and would they notice a breach?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def small_copy(repo_root: Path, tmp_path: Path) -> Path:
    """The contracts over packages with nothing in them but one innocent pure module."""
    shutil.copy(repo_root / "pyproject.toml", tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("__init__.py", "import_contracts.py"):
        shutil.copy(repo_root / "tools" / name, tmp_path / "tools")
    for package in ("orchestrator", "instance", "migration"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "migration" / "types.py").write_text("from dataclasses import dataclass\n")
    return tmp_path


def test_the_import_contracts_hold(repo_root: Path) -> None:
    result = lint_imports(repo_root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contracts_hold_over_innocent_packages(small_copy: Path) -> None:
    result = lint_imports(small_copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "text", "contract"),
    [
        ("migration/types.py", "import time\n", "pure modules"),
        ("migration/types.py", "def f() -> None:\n    import random\n", "pure modules"),
        ("migration/types.py", "from migration import driver\n", "pure modules"),
        ("migration/types.py", "import instance\n", "never back"),
        ("instance/agent.py", "import vllm.config\n", "vLLM only"),
        ("orchestrator/core.py", "import ray\n", "Ray only"),
        ("instance/agent.py", "import grpc\n", "gRPC only"),
        ("orchestrator/cli.py", "import torch\n", "torch and CuPy only"),
    ],
)
def test_a_breach_is_noticed(small_copy: Path, path: str, text: str, contract: str) -> None:
    (small_copy / "migration" / "driver.py").write_text("import asyncio\n")
    (small_copy / path).write_text(text)
    result = lint_imports(small_copy)
    assert result.returncode == 1
    assert any(contract in line and "BROKEN" in line for line in result.stdout.splitlines()), result.stdout
