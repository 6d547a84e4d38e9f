"""What does a journal that was tampered with do to its reader? It is read, or refused in one line, and nothing else."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli_replay import summary_lines, verdict_lines
from orchestrator.errors import JournalError
from tests.support.core_day import PARAMS, a_day
from tests.support.written_journal import read, write_story

SPOILT = (b"", b"0", b"null", b'"', b"{}", b"[]", b"\n", b"\xff", b'{"$":"Ticked"}', b"-1", b"1e999", b"[" * 70, b",")
VALUES = (b"null", b"[]", b"{}", b"-1", b'"no"', b'{"$":"Ticked"}', b'{"@":0}', b"1e300")


@cache
def written_day() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_story(Path(folder, "j"), a_day(), core=PARAMS)
        return Path(folder, "j").read_bytes()


def is_read_or_refused(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "j").write_bytes(text)
        try:
            told, replay = read(Path(folder, "j"))
        except JournalError as error:
            assert str(error)
        else:
            assert verdict_lines(replay) and summary_lines(told.summary)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_that_are_cut_out_or_put_in(data: st.DataObject) -> None:
    text = bytearray(written_day())
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        at = data.draw(st.integers(0, len(text) - 1), label="at")
        text[at : at + data.draw(st.integers(0, 12), label="cut")] = data.draw(st.sampled_from(SPOILT), label="instead")
    is_read_or_refused(bytes(text))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_values_that_are_other_than_their_fields_should_hold(data: st.DataObject) -> None:
    """It stays JSON, so that the values get as far as they can."""
    text = written_day()
    colons = [at for at, byte in enumerate(text) if byte == ord(":") and text[at - 1] == ord('"')]
    at = data.draw(st.sampled_from(colons), label="at") + 1
    end = min(found for found in (text.find(b",", at), text.find(b"}", at)) if found >= 0)
    is_read_or_refused(text[:at] + data.draw(st.sampled_from(VALUES), label="instead") + text[end:])


def test_the_day_itself_is_read(tmp_path: Path) -> None:
    """The control."""
    (tmp_path / "j").write_bytes(written_day())
    _, replay = read(tmp_path / "j")
    assert replay.divergence is None and replay.num_verified == len(a_day())
