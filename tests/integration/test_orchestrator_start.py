"""Does a start of the orchestrator that fails leave everything as it was? The actor's class, without Ray."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from orchestrator.errors import StartUpError
from orchestrator.runtime.actor import OrchestratorActor
from orchestrator.runtime.spec import OrchestratorSpec, OrchestratorStarted
from tests.support.core_day import a_day
from tests.support.written_journal import read, write_story


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Of two lives, in as many parts as are kept."""
    path = tmp_path / "j"
    for _ in range(2):
        write_story(path, a_day())
    return path


def contents(journal: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(journal.parent.iterdir())}


def config(journal: Path, admin_port: int, **changes: object) -> bytes:
    spec = OrchestratorSpec("127.0.0.1", admin_port, journal=str(journal), journal_parts=2, token="test")
    return msgspec.json.encode(msgspec.structs.replace(spec, **changes))


async def test_a_start_that_fails_for_its_port_costs_no_part_of_the_journal(journal: Path) -> None:
    before = contents(journal)
    assert len(before) == 2, "the next part would cost the oldest one"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        for _ in range(2):
            with pytest.raises(StartUpError, match=f"the admin port {port} on 127.0.0.1 is taken"):
                await OrchestratorActor().start(config(journal, port))
    assert contents(journal) == before


async def test_a_start_that_fails_for_its_journal_leaves_the_port_free(journal: Path, tmp_path: Path) -> None:
    other = tmp_path / "not-a-journal"
    other.write_text("somebody's letters")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    failed = OrchestratorActor()
    with pytest.raises(StartUpError, match="is there and is not a journal"):
        await failed.start(config(other, port))
    assert other.read_text() == "somebody's letters"
    actor = OrchestratorActor()
    try:
        started = msgspec.json.decode(await actor.start(config(journal, port)), type=OrchestratorStarted)
        assert started.admin_address == f"127.0.0.1:{port}"
    finally:
        await actor.stop()
        await failed.stop()  # as whoever asked for it does; earlier it would be this that frees the port


async def test_one_that_succeeds_begins_a_part_that_can_be_replayed(journal: Path) -> None:
    before = contents(journal)
    actor = OrchestratorActor()
    await actor.start(config(journal, 0))
    await actor.stop()
    after = contents(journal)
    assert after["j.1"] == before["j"] and after["j"] not in before.values()
    story, replay = read(journal)
    assert replay.divergence is None and story.summary.num_runs == 2
