"""Does `kvferry simulate` say what was asked, the same way twice, and what is wrong with a flag?"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

KVFERRY = str(Path(sys.executable).with_name("kvferry"))
SMALL = ("--requests", "60", "--instances", "2", "--rate", "4")


def kvferry(*words: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KVFERRY_DATA"}
    if data is not None:
        environment["KVFERRY_DATA"] = str(data)
    return subprocess.run([KVFERRY, "simulate", *words], capture_output=True, text=True, check=False, env=environment)


def test_arms_are_listed() -> None:
    told = kvferry("arms")
    assert told.returncode == 0
    assert [line.split()[0] for line in told.stdout.splitlines()][-2:] == ["dispatch", "ours"]


def test_workloads_are_listed_with_their_source_and_licence() -> None:
    told = kvferry("workloads")
    assert told.returncode == 0
    lines = {line.split()[0]: line for line in told.stdout.splitlines() if line}
    assert "Azure/AzurePublicDataset 2023, CC-BY-4.0" in lines["azure-conv"]
    assert {"M-L,", "sharegpt", "mooncake", "servegen-m-small", "FILE"} <= lines.keys()
    assert "--data or KVFERRY_DATA" in told.stdout


def test_a_published_trace_is_played_and_what_is_too_long_is_told(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    rows = [f"{0.1 * row},{9_000 if row % 4 == 0 else 8_190},{5}" for row in range(240)]
    text = "\n".join(["arrival_s,input_tokens,output_tokens", *rows])
    (tmp_path / "traces" / "azure2023_conv.csv.gz").write_bytes(gzip.compress(text.encode()))
    words = ("compare", "--arm", "ours", *SMALL, "--workload", "azure-conv:test", "--json", str(tmp_path / "told.json"))
    by_flag, by_variable = kvferry(*words, "--data", str(tmp_path)), kvferry(*words, data=tmp_path)
    for told in (by_flag, by_variable):
        assert told.returncode == 0, told.stderr
        assert "azure-conv:test, seed 1: prompts of 8,190 tokens and answers of 2 in the mean" in told.stderr
        assert " more left out: their prompt has 8,192 tokens or more" in told.stderr
        assert "; 60 answers cut short at 8,192 tokens of prompt and answer" in told.stderr
    assert by_flag.stdout == by_variable.stdout
    [day] = json.loads((tmp_path / "told.json").read_text())["days"]
    assert day["scores"][""]["num_failed"] == 0 and day["scores"][""]["ttft_s"]["n"] == 54
    larger = kvferry(*words, "--data", str(tmp_path), "--blocks", "1000", "--max-model-len", "16000")
    assert larger.returncode == 0, larger.stderr
    assert "left out" not in larger.stderr and "answers of 5 in the mean" in larger.stderr


def test_two_arms_get_the_same_requests_and_two_runs_say_the_same(tmp_path: Path) -> None:
    def run(name: str) -> bytes:
        told = kvferry(
            "compare", *SMALL, "--arm", "ours", "--arm", "llumnix", "--urgent", "0.2", "--json", str(tmp_path / name)
        )
        assert told.returncode == 0, told.stderr
        assert "ours" in told.stdout and "urgent" in told.stdout
        return (tmp_path / name).read_bytes()

    written = run("first.json")
    assert written == run("second.json")
    days = json.loads(written)["days"]
    assert [day["arm"] for day in days] == ["ours", "llumnix"]
    assert {kind: score["ttft_s"]["n"] for kind, score in days[0]["scores"].items()} == {
        kind: score["ttft_s"]["n"] for kind, score in days[1]["scores"].items()
    }


def test_prefixes_are_cached_where_the_workload_knows_of_any_or_as_one_says(tmp_path: Path) -> None:
    trace, told_file = tmp_path / "talks.jsonl", tmp_path / "told.json"
    rows = [
        {
            "arrival_s": 0.2 * row,
            "input_tokens": 1_100,
            "output_tokens": 5,
            "hash_ids": [row % 3, 3 + row % 3, 10 + row],
        }
        for row in range(80)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def found(*words: str) -> tuple[float, str, str]:
        told = kvferry("compare", "--arm", "ours", *SMALL, *words, "--json", str(told_file))
        assert told.returncode == 0, told.stderr
        values = json.loads(told_file.read_text())
        counts = values["days"][0]["counts"]
        share = counts["found_tokens"] / counts["prompt_tokens"]
        assert values["question"]["engine"]["prefix_cache"] == ("keep prefixes of prompts" in told.stderr)
        return share, told.stdout, told.stderr

    share, shown, said = found("--workload", str(trace))
    assert share > 0.8 and "cached" in shown and f"{share:.0%}" in shown
    assert "instances keep prefixes of prompts" in said
    for words in (("--workload", str(trace), "--no-prefix-cache"), ("--workload", "M-M")):
        share, _, said = found(*words)
        assert share == 0 and "instances keep no prefixes" in said
    share, _, said = found("--workload", "M-M", "--prefix-cache")
    assert share == 0 and "instances keep prefixes of prompts" in said, "nothing is known of what it shares"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--workload", "X"), "no workload named 'X': name two of S, M and L"),
        (("--workload", "M-M:train"), "M-M is drawn from the seed and has no halves"),
        (("--workload", "azure-conv", "--cv", "2"), "--cv: the requests of azure-conv come as they came"),
        (("--workload", "arxiv"), "name the folder that has it with --data DIR or KVFERRY_DATA"),
        (("--workload", "arxiv", "--data", "missing"), "the data folder missing is no folder"),
        (("--blocks", "0"), "--blocks is 0, it must be at least 1"),
        (("--arm", "best"), "no arm named 'best'; there: round-robin"),
        (("--rate", "0"), "--rate and --cv must be positive"),
        (("--seeds", "0"), "--seeds is 0, it must be at least 1"),
        (("--urgent", "1"), "--urgent is 1, it must be a share below 1"),
        (("--profiles", "missing.json"), "--profiles missing.json"),
    ],
)
def test_a_wrong_flag_is_named(words: tuple[str, ...], why: str) -> None:
    told = kvferry("compare", *words)
    assert told.returncode == 2
    assert why in told.stderr and "Traceback" not in told.stderr


def test_ctrl_c_ends_it_and_its_workers() -> None:
    process = subprocess.Popen(
        [KVFERRY, "simulate", "compare", "--requests", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(group_of(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.05)  # its workers start
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130, told
        assert "Traceback" not in told
        deadline_s = time.monotonic() + 10
        while group_of(process.pid):  # the last to go is multiprocessing's own helper
            assert time.monotonic() < deadline_s, "its workers live on"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def group_of(process_id: int) -> list[int]:
    """Processes of this one's session that live."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if one.status() != psutil.STATUS_ZOMBIE and os.getsid(one.pid) == process_id:
                found.append(one.pid)
    return found
