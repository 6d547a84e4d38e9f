"""Does the journal stay within its bounds and out of the loop's way, and do log lines stay lines without secrets?"""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import threading
import tomllib
from pathlib import Path

import pytest

from orchestrator.core import Orchestrator
from orchestrator.effects import Answer, PolicyUpdated
from orchestrator.errors import JournalError, LimitExceeded
from orchestrator.events import GatewayStarted, PolicyUpdateRequested, ReportReceived, Ticked, Token
from orchestrator.journal.lines import VERSION, Checkpoint, Entry
from orchestrator.log import LineFormatter, fields
from orchestrator.resting import RestingPlace
from orchestrator.runtime.journal import Journal, JournalParams, check_path, decided
from orchestrator.state import CoreParams
from tests.support.reports import load_report
from tests.support.written_journal import PROMPT, lines_of, read, write_story

REPORT = ReportReceived(load_report(free_blocks=17))


def a_journal(path: Path, params: JournalParams = PROMPT) -> tuple[Journal, Orchestrator]:
    core = Orchestrator(CoreParams())
    return Journal(path, core, 1.0, params), core


def test_a_change_of_the_policy_is_in_the_journal_with_what_was_and_what_is(tmp_path: Path) -> None:
    changes = (("rebalance.margin_steps", 32.0), ("drain.max_moves", 16))
    write_story(tmp_path / "j", [(0.0, PolicyUpdateRequested(Token(1), changes))])
    _, changed = lines_of(tmp_path / "j")
    assert isinstance(changed, Entry) and changed.event == PolicyUpdateRequested(Token(1), changes)
    (told,) = changed.effect_values()
    assert isinstance(told, Answer) and isinstance(told.result, PolicyUpdated)
    assert told.result.changes == (("rebalance.margin_steps", 64.0, 32.0),), "what stays as it was is no change"


def test_it_begins_with_its_version_and_the_parameters_and_each_event_is_a_line_of_json_with_its_time(
    tmp_path: Path,
) -> None:
    write_story(tmp_path / "j", [(0.5, REPORT), (0.5, Ticked())])
    first, report, tick = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert (first["kvferry_journal"], first["part"], first["s"]) == (1, 1, 1000.0)
    assert first["core"]["_params"]["rebalance"]["threshold_steps"] == 512.0
    assert (report["s"], report["on"], report["report"]["free_blocks"]) == (1000.5, "ReportReceived", 17)
    assert tick["s"] == 1001.0 and tick["on"] == "Ticked" and "then" not in tick
    assert all(line["at"].startswith("20") and line["at"].endswith("Z") for line in (first, report, tick))


def test_a_report_that_says_the_same_again_takes_no_room(tmp_path: Path) -> None:
    write_story(tmp_path / "j", [(0.1, REPORT)] * 3)
    _, _, second, third = (tmp_path / "j").read_text().splitlines()
    assert json.loads(second).keys() == {"s", "at", "on", "of"} and len(third) < 120
    entries = [line for line in lines_of(tmp_path / "j") if isinstance(line, Entry)]
    assert [entry.event for entry in entries] == [REPORT] * 3


def test_the_version_is_that_of_the_package(repo_root: Path) -> None:
    assert tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "j").touch(mode=0o644)
    write_story(tmp_path / "j", [(0.1, Ticked())])
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600


def test_it_never_holds_more_than_its_bound_and_keeps_the_latest(tmp_path: Path) -> None:
    params = JournalParams(max_part_bytes=2_000, max_parts=3, flush_s=0.0)
    write_story(tmp_path / "j", [(1.0, Ticked())] * 200, params)
    heads = {path.name: len(path.read_bytes().splitlines()[0]) for path in tmp_path.iterdir()}
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) <= {"j", "j.1", "j.2"}
    assert all(size - heads[name] <= 2_001 for name, size in sizes.items())
    assert lines_of(tmp_path / "j")[-1].now_s == 1200.0
    _, replay = read(tmp_path / "j")
    assert replay.divergence is None and 0 < replay.num_verified < 200, "what is left can be replayed"


def test_a_new_run_never_continues_the_part_of_the_last_one(tmp_path: Path) -> None:
    write_story(tmp_path / "j", [(0.1, Ticked())])
    write_story(tmp_path / "j", [(0.1, REPORT)])
    runs = [line.run for line in lines_of(tmp_path / "j") if isinstance(line, Checkpoint)]
    assert len(set(runs)) == 2 and (tmp_path / "j.1").is_file()
    story, replay = read(tmp_path / "j")
    assert story.summary.num_runs == 2 and replay.num_verified == 2 and replay.divergence is None


@pytest.mark.parametrize("name", ["j", "j.1", "j.3"])
def test_a_file_of_somebody_else_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("my diary\n")
    with pytest.raises(JournalError, match=f"{name} is there and is not a journal"):
        a_journal(tmp_path / "j")
    assert (tmp_path / name).read_text() == "my diary\n" and list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_folder_that_is_missing_or_in_its_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"there is no folder .*nowhere"):
        check_path(tmp_path / "nowhere" / "j", 4)
    with pytest.raises(JournalError, match="is a folder"):
        check_path(tmp_path, 4)


def test_a_full_disk_ends_the_journal_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "j").symlink_to("/dev/full")
    mode = Path("/dev/full").stat().st_mode
    with caplog.at_level(logging.ERROR):
        write_story(tmp_path / "j", [(0.1, Ticked())] * 3)
    assert [record.message.startswith("no journal from here on") for record in caplog.records] == [True]
    assert Path("/dev/full").stat().st_mode == mode, "a device keeps its mode"


def test_a_disk_that_hangs_costs_entries_and_never_the_loop(tmp_path: Path) -> None:
    """1. Nobody reads the pipe, so the thread hangs in its write. 2. The loop goes on; the queue is full. 3. The pipe
    is read again. 4. The journal goes on with a checkpoint that says how many are missing, and a replay agrees."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    params = JournalParams(max_queued=10, flush_s=0.0, close_s=20.0)
    journal, core = a_journal(tmp_path / "pipe", params)
    num_written = 0
    while journal.num_lost < 5:
        num_written += 1
        decided(core, Ticked(), float(num_written), journal)
        assert num_written < 200_000, "a pipe holds far less than that"
    os.set_blocking(reader, True)
    said = bytearray()
    while journal.num_lost:
        said += os.read(reader, 1 << 16)
        num_written += 1
        decided(core, Ticked(), float(num_written), journal)
    said += drained(reader, journal)
    (tmp_path / "j").write_bytes(bytes(said))
    _, replay = read(tmp_path / "j")
    assert replay.num_lost >= 5 and replay.num_lost + replay.num_verified == num_written
    assert replay.divergence is None


def drained(reader: int, journal: Journal) -> bytes:
    """What is left, while a second thread would hang in `close` otherwise."""
    closing = threading.Thread(target=journal.close)
    closing.start()
    said = bytearray()
    while text := os.read(reader, 1 << 16):
        said += text
    closing.join()
    os.close(reader)
    return bytes(said)


def test_the_event_at_which_the_core_raises_is_in_the_journal_with_the_error(tmp_path: Path) -> None:
    core = Orchestrator(CoreParams(max_gateways=0))
    journal = Journal(tmp_path / "j", core, 1.0, PROMPT)
    with pytest.raises(LimitExceeded):
        decided(core, GatewayStarted("gateway-0", "g", "http://here"), 2.0, journal)
    journal.close()
    (_, entry) = lines_of(tmp_path / "j")
    assert isinstance(entry, Entry) and entry.raised.startswith("LimitExceeded: 0 gateways")
    story, replay = read(tmp_path / "j")
    assert replay.divergence is None and replay.num_verified == 1
    assert story.rows[-1].what == "the core refused GatewayStarted"


def test_an_exception_stays_on_one_line_and_secrets_are_hidden() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(LineFormatter("%(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it failed %s", fields(token="abc", age_s=0.123456, reason="two words"))
    (line,) = out.getvalue().splitlines()
    assert line.startswith('it failed token=*** age_s=0.1235 reason="two words" | Traceback') and "abc" not in line


def test_what_rests_is_bounded_and_forgotten_in_time() -> None:
    place: RestingPlace[str] = RestingPlace(max_names=2)
    place.rest("a", 10.0)
    place.rest("b", 20.0)
    place.rest("b", 5.0)
    place.forget_rested(10.0)
    assert place.names() == {"b"}, "the longer rest is kept"
    place.rest("c", 30.0)
    place.rest("d", 30.0)
    assert place.names() == {"c", "d"}
