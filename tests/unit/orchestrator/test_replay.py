"""Does `kvferry replay` tell what happened and why, notice what does not fit, and say in a line what is wrong?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import run_cli
from orchestrator.core import Orchestrator
from orchestrator.events import Ticked
from orchestrator.journal.reader import JournalFiles
from orchestrator.runtime.journal import Journal, JournalParams, decided
from tests.support.core_day import PARAMS, a_day
from tests.support.written_journal import lines_of, read, write_story


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    write_story(tmp_path / "j", a_day(), core=PARAMS)
    return tmp_path / "j"


def rows(journal: Path, capsys: pytest.CaptureFixture[str], *filters: str) -> list[dict[str, Any]]:
    assert run_cli(["replay", str(journal), "--json", *filters]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_the_timeline_says_when_what_why_and_what_came_of_it(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["replay", str(journal)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (move,) = [line for line in lines if "move r00" in line]
    assert "0.500 move r00: instance-0 -> instance-1 rebalance: source" in move
    assert "committed after 0.50 s, stopped 12.4 ms, 32 blocks in 2 stages" in move and " 0.40 s " in move
    assert any("move r01" in line and "refused after 0.60 s (no blocks)" in line for line in lines)
    assert any("drain instance-0 asked for confirmed, empty after 1.20 s" in line for line in lines)
    assert any("refuse migrate requested" in line and "no instance is named 'instance-9'" in line for line in lines)
    assert any("instance-1 was lost, epoch 1 killed" in line for line in lines)
    assert any("fence instance-1, epoch 1, at instance-0 killed" in line for line in lines)
    assert any(line.startswith("moves, rebalance: 1 committed, 1 refused; committed after 0.50 s") for line in lines)
    assert "replayed: 17 events with 12 effects, all as written" in lines


def test_only_the_rows_that_are_asked_for_are_shown(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = [row["what"] for row in rows(journal, capsys)]
    moved = rows(journal, capsys, "--request", "r00")
    assert [row["what"] for row in moved] == ["move r00: instance-0 -> instance-1"]
    assert rows(journal, capsys, "--request", "client-r00") == moved, "the client's id does as well"
    of_b = [row["what"] for row in rows(journal, capsys, "--instance", "instance-1")]
    assert "move r00: instance-0 -> instance-1" in of_b and "drain instance-0" not in of_b
    late = [row["what"] for row in rows(journal, capsys, "--since", "1.3")]
    early = [row["what"] for row in rows(journal, capsys, "--until", "1.3")]
    assert early + late == everything and late[0].startswith("drain requested")
    day = rows(journal, capsys)[0]["utc"][:10]
    assert rows(journal, capsys, "--since", "2999-01-01") == [] == rows(journal, capsys, "--until", "1999-01-01")
    assert len(rows(journal, capsys, "--since", day, "--until", "2999")) == len(everything)


def test_the_summary_is_of_everything_and_for_programs_too(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["replay", str(journal), "--json", "--request", "nobody"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rows"] == [] and values["error"] == values["torn"] == ""
    assert values["summary"]["moves"]["rebalance"]["outcomes"] == {"committed": 1, "refused": 1}
    assert values["summary"]["signal_age_s"]["max"] == pytest.approx(0.4)
    assert values["replay"] == {
        "agrees": True,
        "verified_events": 17,
        "verified_effects": 12,
        "unverified_events": 0,
        "lost_events": 0,
        "divergence": None,
    }


def test_another_decision_than_the_cores_is_shown_with_both_sides(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.write_text(journal.read_text().replace('"request_id":"r01"', '"request_id":"r07"', 1))
    first = next(n for n, line in enumerate(journal.read_text().splitlines(), 1) if '"r07"' in line and "then" in line)
    assert run_cli(["replay", str(journal)]) == 1
    out = capsys.readouterr().out
    assert f"DIVERGES at j line {first}, s 1000.500000, after Ticked (7 events with 4 effects before it agree)" in out
    (written,) = [line for line in out.splitlines() if line.startswith("  journal: ") and "r07" in line]
    (replayed,) = [line for line in out.splitlines() if line.startswith("  replayed: ") and "r01" in line]
    assert written.split(": ", 1)[1].replace("r07", "r01") == replayed.split(": ", 1)[1]


def test_an_event_that_was_taken_out_is_noticed(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = journal.read_text().splitlines()
    journal.write_text("".join(f"{line}\n" for line in lines if "DrainingSet" not in line))
    assert run_cli(["replay", str(journal)]) == 1
    assert "DIVERGES" in capsys.readouterr().out


def test_parts_are_read_together_or_one_by_name_and_their_states_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = JournalParams(max_part_bytes=12_000, max_parts=50, flush_s=0.0, turn_at=0.3)
    write_story(tmp_path / "j", a_day() * 4, params, PARAMS, is_paced=True)
    assert (tmp_path / "j.1").is_file(), "it takes several parts"
    assert run_cli(["replay", str(tmp_path / "j"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert run_cli(["replay", str(tmp_path / "j.1"), "--json"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert (whole["replay"]["verified_events"], whole["replay"]["lost_events"]) == (4 * 17, 0)
    assert 0 < part["replay"]["verified_events"] < whole["replay"]["verified_events"]
    text = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(text.replace('"_num_migrations":', '"_num_migrations":7', 1))
    assert run_cli(["replay", str(tmp_path / "j")]) == 1
    out = capsys.readouterr().out
    assert "after the state of the core" in out and "journal: _num_migrations: 7" in out


def test_it_can_be_read_while_it_is_written_and_turned_over(tmp_path: Path) -> None:
    """1. The files are opened. 2. The journal goes on and turns its parts over. 3. All that was there is read."""
    path = tmp_path / "j"
    core = Orchestrator(PARAMS)
    journal = Journal(path, core, 0.0, JournalParams(max_part_bytes=4_000, turn_at=0.3, max_parts=3, flush_s=0.0))

    def go_on(num_ticks: int) -> None:
        for number in range(num_ticks):
            decided(core, Ticked(), float(number), journal)
            assert journal.flush(30.0)

    go_on(20)
    before = lines_of(path)
    with JournalFiles(path) as files:
        reading = files.lines()
        seen = [next(reading)[1]]
        go_on(100)
        seen += [line for _, line in reading]
    assert seen[: len(before)] == before and path.with_name("j.2").is_file()
    _, replay = read(path)
    assert replay.divergence is None and 0 < replay.num_verified < 120, "the first parts are gone by now"
    journal.close()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_last_line_that_is_not_whole_is_left_out_and_told(
    journal: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert run_cli(["replay", str(journal)]) == 0
    out = capsys.readouterr().out
    assert "replayed: 16 events" in out and "j line 18 is not whole" in out


def test_a_line_that_is_spoilt_is_named_after_what_was_read_before_it(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:9], lines[9][:30], *lines[10:], ""]))
    assert run_cli(["replay", str(journal)]) == 2
    out, err = capsys.readouterr()
    assert "move r00" in out and "replayed: 8 events" in out
    assert err.startswith("kvferry: j line 10: it is not JSON") and err.count("\n") == 1


HEAD = '{"kvferry_journal":1,"version":"0.1.0","run":"ab","part":1,"s":1.0,"at":"2026","lost":0,"core":null}\n'
ENTRY = '{"s":1.0,"at":"2026","on":"Ticked","is":{"$":"Ticked"}}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("my diary\n", "is not a journal of kvferry"),
        (ENTRY, "is not a journal of kvferry"),
        (HEAD.replace('"kvferry_journal":1', '"kvferry_journal":2'), "schema 2, and this one reads schema 1"),
        (HEAD.replace('"core":null', '"core":{"$":"os:system"}'), "'os:system' is no class of this version"),
        (HEAD.replace('"core":null', '"core":{"$":"Ticked"}'), "holds no state of the core"),
        (HEAD.replace('"part":1', '"part":"one"'), "'one' is not a int"),
        (HEAD + "[]\n", "line 2: it is no line of a journal"),
        (HEAD + "{}\n", "line 2: it is no line of a journal"),
        (HEAD + ENTRY.replace("Ticked", "Rebooted"), "'Rebooted' is no class of this version"),
        (HEAD + ENTRY.replace('"Ticked"', '"Token"'), "'Token' is no class of this version"),
        (HEAD + ENTRY.replace('{"$":"Ticked"}', '{"$":"Ticked","speed":1}'), "other fields here (speed)"),
        (HEAD + ENTRY.replace('{"$":"Ticked"}', '{"$":"Outcome","=":"won"}'), "'won' is not a valid Outcome"),
        (HEAD + '{"s":1.0,"at":"2026","on":"ReportReceived","of":"instance-0"}\n', "differs from is missing"),
        (HEAD + ENTRY[:-2] + ',"then":[{"$":"Ticked"}]}\n', "Ticked is no effect of this version"),
        (HEAD + "[" * 5000 + "\n", "line 2"),
    ],
)
def test_what_is_no_journal_of_this_version_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "j").write_text(text)
    assert run_cli(["replay", str(tmp_path / "j")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("kvferry: ") and err.count("\n") == 1, err


def test_a_file_that_is_missing_or_a_folder_and_a_time_that_is_none_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "there is no file"),
        ([str(tmp_path)], "is a folder"),
        ([str(tmp_path / "nowhere"), "--since", "yesterday"], "--since is 'yesterday'"),
        ([], "Missing argument"),
    ):
        assert run_cli(["replay", *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err


def test_events_without_a_state_before_them_are_explained_and_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "j").write_text(HEAD + ENTRY)
    assert run_cli(["replay", str(tmp_path / "j")]) == 0
    assert "1 events could not be verified" in capsys.readouterr().out
