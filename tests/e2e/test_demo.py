"""Does `kvferry demo` do what its bars say, from the outside?"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from orchestrator.demo.result import read_result

DURATION_S = 15
TIME_LIMIT_S = 300
TAG = "KVFERRY_TEST_RUN"
"""Environment variable that every process of the run inherits."""
COMMAND = [sys.executable, "-c", "import sys; from orchestrator.cli import run_cli; sys.exit(run_cli(sys.argv[1:]))"]


def run_demo(
    repo_root: Path, arguments: list[str], timeout_s: float, tag: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", TAG: tag}
    return subprocess.run(
        [*COMMAND, "demo", *arguments],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.timeout(TIME_LIMIT_S + 30)
def test_a_short_demo_moves_running_requests_and_every_answer_is_exact(repo_root: Path, tmp_path: Path) -> None:
    tag = uuid.uuid4().hex
    done = run_demo(repo_root, ["--duration", str(DURATION_S), "--out", str(tmp_path / "out")], TIME_LIMIT_S, tag)
    told = done.stdout + done.stderr
    assert (tmp_path / "out" / "result.json").is_file(), told
    result = read_result(tmp_path / "out" / "result.json")
    figures = result.figures
    assert figures["mismatched_tokens"] == 0, told
    assert figures["client_errors"] == 0, told
    committed, drain_s = figures["committed_migrations"], figures["drain_s"]
    # The bar of 20 is for a minute; a quarter of it must show a quarter of the moves on any machine.
    assert committed is not None and committed >= 5, told
    assert drain_s is not None and drain_s <= 10.0, told
    assert result.n["compared_answers"] == result.n["requests"] > 0
    assert result.arms["undisturbed"]["migrations_committed"] == 0
    assert (tmp_path / "out" / "moves.png").stat().st_size > 10_000
    assert done.returncode == (0 if committed >= 20 else 1), told
    assert not left_over(tag)


def left_over(tag: str) -> list[str]:
    """Processes of the run, known by what they inherited, that are still there after a few seconds."""
    mine = [process for process in psutil.process_iter() if environment_of(process).get(TAG) == tag]
    _, alive = psutil.wait_procs(mine, timeout=5)
    return [str(process) for process in alive]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


@pytest.mark.timeout(160)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "{bad}"], "bad.csv:3: output_tokens is 'x', not a whole number of tokens"),
        (["--trace", "{missing}"], "missing.csv: cannot read the trace"),
        (["--duration", "1"], "--duration is 1 s; give 5 to 3600 seconds"),
        (["--model", "{missing}"], "missing.csv"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    repo_root: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.csv").write_text("arrival_s,input_tokens,output_tokens\n0,1,1\n1,1,x\n")
    names = {"bad": str(tmp_path / "bad.csv"), "missing": str(tmp_path / "missing.csv")}
    done = run_demo(repo_root, [argument.format(**names) for argument in arguments], 150)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
