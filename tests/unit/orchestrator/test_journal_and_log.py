"""Does the journal stay within its bound, and do log lines stay lines without secrets?"""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from orchestrator.core import Orchestrator
from orchestrator.events import PolicyUpdateRequested, ReportReceived, Ticked, Token
from orchestrator.log import LineFormatter, fields
from orchestrator.resting import RestingPlace
from orchestrator.runtime.journal import Journal
from orchestrator.state import CoreParams
from tests.support.reports import load_report


def test_each_event_is_a_line_of_json_with_its_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", max_bytes=1 << 20)
    journal.write(ReportReceived(load_report(free_blocks=17)), [], 1.5)
    journal.write(Ticked(), [], 2.0)
    journal.close()
    first, second = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert (first["at_s"], first["event"], first["value"]["report"]["free_blocks"]) == (1.5, "ReportReceived", 17)
    assert second["event"] == "Ticked" and second["effects"] == []


def test_a_change_of_the_policy_is_in_the_journal_with_what_was_and_what_is(tmp_path: Path) -> None:
    core, journal = Orchestrator(CoreParams()), Journal(tmp_path / "j", max_bytes=1 << 20)
    for event in (
        PolicyUpdateRequested(Token(1), (("rebalance.rest_s", 7.0), ("rebalance.enabled", False))),
        PolicyUpdateRequested(Token(2), (("rebalance.rest_s", -1.0),)),
    ):
        journal.write(event, core.on(event, 1.0), 1.0)
    journal.close()
    changed, refused = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert changed["value"]["changes"] == [["rebalance.rest_s", 7.0], ["rebalance.enabled", False]]
    assert changed["effects"][0]["value"]["result"]["changes"] == [
        ["rebalance.enabled", True, False],
        ["rebalance.rest_s", 10.0, 7.0],
    ]
    assert [row["field"] for row in refused["effects"][0]["value"]["result"]["violations"]] == ["rebalance.rest_s"]


def test_the_journal_never_holds_more_than_twice_its_bound_and_keeps_the_latest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", max_bytes=1000)
    for tick in range(200):
        journal.write(Ticked(), [], float(tick))
    journal.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"j", "j.1"} and max(sizes.values()) <= 1000
    assert json.loads((tmp_path / "j").read_text().splitlines()[-1])["at_s"] == 199.0


def test_a_full_disk_ends_the_journal_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "j").symlink_to("/dev/full")
    journal = Journal(tmp_path / "j", max_bytes=1 << 20)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            journal.write(Ticked(), [], 1.0)
            journal.flush()
        journal.close()
    assert [record.message.startswith("no journal from here on") for record in caplog.records] == [True]


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
