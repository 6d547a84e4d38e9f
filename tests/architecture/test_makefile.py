"""Does `make help` name every target, and do targets without a subject say so?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

TARGETS = {
    "help", "setup", "demo", "test", "check", "test-all", "sim", "golden", "exhaustive", "compat", "proto", "diagrams",
    "bench", "test-gpu",
    "test-v2", "clean",
}  # fmt: skip


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True, check=False)


def test_help_names_every_target(repo_root: Path) -> None:
    result = make(repo_root, "help")
    named = set(re.findall(r"^  make ([a-z0-9-]+) +\S", result.stdout, flags=re.MULTILINE))
    assert result.returncode == 0
    assert named == TARGETS


def test_every_target_is_phony(repo_root: Path) -> None:
    makefile = (repo_root / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(phony.split()) == TARGETS


def test_compat_wants_a_version(repo_root: Path) -> None:
    result = make(repo_root, "compat")
    assert result.returncode == 2
    assert "make compat VLLM=0.31.0" in result.stderr


def test_set_up_without_python_311_says_what_to_do(repo_root: Path) -> None:
    result = make(repo_root, "setup", "BASE_PYTHON=")
    assert result.returncode == 2
    assert "Python 3.11 was not found" in result.stderr
