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
from xml.etree import ElementTree

import psutil
import pytest

from orchestrator.cli import run_cli
from orchestrator.cli_simulate_run import rates_of

KVFERRY = str(Path(sys.executable).with_name("kvferry"))
SHORT = ("--workload", "S-S", "--requests", "30", "--instances", "2")
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
    assert all(day["scores"]["urgent"]["itl_s"]["n"] > 0 for day in days)
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
    assert share > 0.8 and "cached" in shown and f" {100 * share:.1f} " in shown
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
        (("--model", "x"), "--model names an entry of --profiles, which is not given"),
        (("--slo-ttft", "0"), "--slo-ttft is 0.0, it must be a number of seconds above 0"),
        (("--arm", "ours", "--against", "llumnix"), "--against llumnix: it must be one of the arms: --arm llumnix"),
        (("--json", "no/such/file"), "--json: there is no folder no/such"),
    ],
)
def test_a_wrong_flag_is_named(
    words: tuple[str, ...],
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVFERRY_DATA", raising=False)
    assert run_cli(["simulate", "compare", *words]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("sweep", "--rate", "1:2"), "--rate is '1:2': name requests a second above 0, or FROM:TO:STEP such as"),
        (("sweep", "--rate", "2:1:1"), "--rate is '2:1:1': 1 is below 2"),
        (("sweep", "--rate", "1:9:0.001"), "--rate is '1:9:0.001': that is more than 200 rates"),
        (("sweep", "--rate", "nan"), "--rate is 'nan': name requests a second above 0"),
        (("run", "--out", "no/such/folder"), "--out: there is no folder no/such"),
        (("run", "--journal", "."), "--journal: . is a folder, name a file"),
        (("run", "--arm", "best"), "no arm named 'best'; there: round-robin"),
        (("report", "missing.json"), "missing.json cannot be read: No such file or directory"),
        (("report", "other.json"), "other.json is no result of `kvferry simulate`: it holds no simulated days"),
    ],
)
def test_what_is_wrong_with_a_flag_or_a_file_is_said(
    words: tuple[str, ...],
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("{}")
    assert run_cli(["simulate", *words]) == 2
    assert why in capsys.readouterr().err


def test_rates_are_named_one_by_one_or_as_a_span() -> None:
    assert rates_of(["3", "1:2:0.5", "3", "0.1:0.3:0.1"]) == [3.0, 1.0, 1.5, 2.0, 0.1, 0.2, 0.3]


def test_a_day_is_written_whole_replayed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(["simulate", "run", *SHORT, "--slo-ttft", "5", "--out", "day", "--journal", "journal"]) == 0
    told = capsys.readouterr().out
    assert "result: day/result.json" in told and "TTFT s" in told and "instance h" in told
    written = json.loads(Path("day/result.json").read_text())
    assert len(written["days"]) == 1 and written["days"][0]["scores"][""]["attainment"] == 1.0
    num_seconds = len(written["days"][0]["series"]["at_s"])
    assert num_seconds > 10
    assert [len(one["free_blocks"]) for one in written["instances"]] == [num_seconds] * 2
    assert run_cli(["replay", "journal"]) == 0
    assert "all as written" in capsys.readouterr().out

    assert run_cli(["simulate", "run", *SHORT, "--arm", "dispatch", "--out", "other"]) == 0
    files = ["day/result.json", "other/result.json"]
    assert run_cli(["simulate", "report", *files, "--html", "page.html"]) == 0
    page = ElementTree.fromstring(Path("page.html").read_text().removeprefix("<!DOCTYPE html>"))
    titles = {"".join(one.itertext()) for one in page.iter("figcaption")}
    assert {"Time to first token", "Freeness, ours", "Moves"} <= titles
    assert run_cli(["simulate", "report", files[0], files[0]]) == 2
    assert "is there twice: name each result once" in capsys.readouterr().err
    assert run_cli(["simulate", "report", *files, "--against", "llumnix"]) == 2
    assert "there is no day of 'llumnix' to compare with" in capsys.readouterr().err


def test_a_sweep_tells_each_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # in this process: others would take longer to start than to work
    out = tmp_path / "sweep.json"
    words = (*SHORT, "--arm", "dispatch", "--arm", "ours", "--json", str(out))
    assert run_cli(["simulate", "sweep", *words, "--rate", "2:4:2", "--against", "dispatch"]) == 0
    assert "Ratios to dispatch" in capsys.readouterr().out
    days = [(day["requests_per_s"], day["arm"]) for day in json.loads(out.read_text())["days"]]
    assert days == [(2.0, "dispatch"), (2.0, "ours"), (4.0, "dispatch"), (4.0, "ours")]


@pytest.mark.parametrize(
    ("words", "said"), [(("compare",), ""), (("sweep", "--rate", "5:6:1"), "interrupted after 0 of 16 days")]
)
def test_ctrl_c_ends_it_and_its_workers(words: tuple[str, ...], said: str) -> None:
    process = subprocess.Popen(
        [KVFERRY, "simulate", *words, "--requests", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job, and so these tests in one, has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it takes no lock
    )
    try:
        while len(group_of(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.05)  # its workers start
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130, told
        assert "Traceback" not in told and said in told
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
