"""Does bench.exactness find moved requests exact, notice each thing that is left behind, and go on where it stopped?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from bench.exactness_kinds import KINDS
from bench.exactness_progress import BatchRecord, Progress, ProgressError, RequestRecord, SessionRecord, Verdict
from bench.exactness_sabotage import CONTROLS
from orchestrator.demo.result import Result, read_result

pytestmark = pytest.mark.timeout(900)

ANY_SEEDED = "seeded, logprobs"
NOTICED_BY = {
    "generator": ANY_SEEDED,
    "tail": "greedy, logprobs",
    "stage": "greedy, logprobs",
    "outputs": "penalties, seeded",
    "grammar": "regex",
    "parameters": "allowed ids",
    "adapter": "adapter",
    "offset": "greedy",
    "release": "greedy",
}
"""A kind whose requests must differ under each control."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.exactness", *arguments]


def run_bench(root: Path, folder: Path, *arguments: str) -> tuple[int, Result, str]:
    done = subprocess.run(
        command("--json", str(folder / "result.json"), *arguments),
        cwd=root,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    told = done.stdout + done.stderr
    assert (folder / "result.json").is_file(), told
    return done.returncode, read_result(folder / "result.json"), told


@pytest.mark.long
def test_a_few_requests_of_every_kind_are_exact_after_their_moves(repo_root: Path, tmp_path: Path) -> None:
    status, result, told = run_bench(
        repo_root, tmp_path, "--requests", "40", "--progress", str(tmp_path / "progress.jsonl")
    )
    figures = result.figures
    wrong = [figures[name] for name in ("mismatched_requests", "leaked_blocks", "lost_or_doubled_tokens")]
    assert (wrong, status) == ([0, 0, 0], 0), told
    migrated, migrations = figures["migrated_requests"], figures["migrations"]
    assert migrated is not None and migrated >= 40, told
    assert migrations is not None and migrations >= migrated, told
    assert figures["kinds"] == len(KINDS), told


@pytest.mark.parametrize(
    "control", [name if name == "generator" else pytest.param(name, marks=pytest.mark.long) for name in CONTROLS]
)
def test_what_is_left_behind_is_noticed(control: str, repo_root: Path, tmp_path: Path) -> None:
    status, result, told = run_bench(
        repo_root, tmp_path, "--requests", "3", "--only", NOTICED_BY[control], "--control", control
    )
    assert status == 1, told
    name = {"offset": "lost_or_doubled_tokens", "release": "leaked_blocks"}.get(control, "mismatched_requests")
    found = result.figures[name]
    assert found is not None and found > 0, told


def test_after_ctrl_c_no_process_is_left_and_the_next_start_goes_on(repo_root: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    arguments = command("--only", "greedy", "--requests", "400", "--progress", str(progress))
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, cwd=repo_root, stdout=pipe, stderr=subprocess.STDOUT, text=True) as bench:
        assert bench.stdout is not None
        assert any(" migrated, " in line for line in bench.stdout), "it ended before its first batch"
        children = psutil.Process(bench.pid).children(recursive=True)
        bench.send_signal(signal.SIGINT)
        told, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130, told
    assert f"run the same command again to go on ({progress})" in told
    assert not any(child.is_running() for child in children)
    num_done = sum('"request"' in line for line in progress.read_text().splitlines())
    assert num_done >= 24
    # As many as are there already: nothing is left to run, and no instance is started.
    status, result, again = run_bench(
        repo_root, tmp_path, "--only", "greedy", "--requests", "10", "--progress", str(progress)
    )
    assert status == 0, again
    assert "starting" not in again
    assert result.figures["migrated_requests"] == num_migrated(progress)


def num_migrated(progress: Path) -> int:
    records = [json.loads(line) for line in progress.read_text().splitlines()]
    return sum(record.get("verdict") == "exact" for record in records)


# ---- the progress file


SESSION = SessionRecord(1, "", "code")


def record(seed: int, verdict: Verdict = Verdict.EXACT, difference: str = "") -> RequestRecord:
    return RequestRecord("greedy", seed, verdict, 40, (), difference=difference)


def test_progress_is_read_again_up_to_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    first = Progress(path, SESSION, fresh=False)
    first.add(record(1), record(2, Verdict.NOT_MOVED), BatchRecord("roomy", 0, "", 1.0))
    first.close()
    path.write_bytes(path.read_bytes() + b'{"type":"request","kind":"gre')
    second = Progress(path, SESSION, fresh=False)
    second.add(record(3))
    second.close()
    third = Progress(path, SESSION, fresh=False)
    third.close()
    assert (second.num_resumed, third.num_resumed) == (1, 2)
    assert [request.seed for request in third.requests] == [1, 2, 3]
    assert len(third.sessions) == 3


@pytest.mark.parametrize("other", [SessionRecord(2, "", "code"), SessionRecord(1, "tail", "code")])
def test_progress_of_another_run_is_not_gone_on_with(other: SessionRecord, tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    Progress(path, SESSION, fresh=False).close()
    with pytest.raises(ProgressError, match="another run"):
        Progress(path, other, fresh=False)
    fresh = Progress(path, other, fresh=True)
    fresh.close()
    assert fresh.requests == []


def test_a_leak_or_a_difference_is_not_clean() -> None:
    progress = Progress(None, SESSION, fresh=False)
    progress.add(record(1), BatchRecord("roomy", 0, "", 1.0))
    assert progress.is_clean()
    progress.add(BatchRecord("roomy", 0, "first: a reservation is left", 1.0))
    assert not progress.is_clean()
    other = Progress(None, SESSION, fresh=False)
    other.add(record(1, Verdict.MISMATCHED, "token 3 of 40 is 1, not 2"))
    assert (other.is_clean(), other.figures()["mismatched_requests"]) == (False, 1)
