"""Does a request that is made urgent over the admin API get room beside it, and does the journal say why?

Over Ray, with fake engines: their steps are paced, so that requests last as long as the test needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from instance.fake_model import FakeRequest, expected_output
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.effects import Answer, Reprioritised, SetPriority, StartMigration
from orchestrator.events import PriorityAnswered, PriorityRequested
from orchestrator.journal.lines import Entry
from tests.support.fleet import Gateway
from tests.support.serving import Serving
from tests.support.written_journal import lines_of

pytestmark = pytest.mark.timeout(180)

READY_S = 110.0
PATIENCE_S = 20.0
HEADROOM_BLOCKS = 200
LEVELS = f"high:-10:{HEADROOM_BLOCKS},normal:0,low:10"
FAKE = ("fake", "--engine", "fake", "--instances", "2", "--step-time-ms", "10", "--priority-levels", LEVELS)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal.jsonl"


@pytest.fixture(scope="module")
def serving(journal: Path) -> Iterator[Serving]:
    cluster = Serving(*FAKE, "--journal", str(journal), num_gateways=0)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


async def owners(serving: Serving) -> dict[str, tuple[str, int]]:
    """Request -> (its instance, its priority), as `kvferry status` has it."""
    listed = (await asyncio.to_thread(serving.status))["requests"]
    return {
        item["name"].removeprefix("requests/"): (item["instance"].removeprefix("instances/"), item["priority"])
        for item in listed
    }


def entries_of(journal: Path) -> list[Entry]:
    return [line for line in lines_of(journal) if isinstance(line, Entry)]


def moves_of(journal: Path) -> list[StartMigration]:
    effects = [effect for entry in entries_of(journal) for effect in entry.effect_values()]
    return [effect for effect in effects if isinstance(effect, StartMigration)]


async def test_neighbours_of_a_raised_request_move_away_and_the_journal_says_why(
    serving: Serving, journal: Path
) -> None:
    """1. Three requests share an instance that has room enough. 2. One is raised: its level wants 200 of 256 blocks
    free beside it. 3. The others move to the idle instance, it stays, and no token of any changes."""
    requests = {f"shared-{n}": FakeRequest(prompt=tuple(range(n, n + 40)), max_tokens=1000) for n in range(3)}
    gateway = Gateway()
    await gateway.mailbox.open()
    reader = asyncio.create_task(gateway.run())
    try:
        shown = await asyncio.to_thread(serving.instance, "instance-0")
        to = Incarnation(InstanceId("instance-0"), Epoch(shown["epoch"]), shown["address"])
        for name, request in requests.items():
            gateway.submit(to, name, request)
        await gateway.until(lambda: all(gateway.entries[name] for name in requests))
        async with asyncio.timeout(PATIENCE_S):
            while (await owners(serving)).keys() != requests.keys():
                pass
        assert {owner for owner, _ in (await owners(serving)).values()} == {"instance-0"}
        done = await asyncio.to_thread(serving.command, "priority", "client-shared-1", "high")
        assert done.status == 0 and done.out.startswith("shared-1: normal (0) -> high (-10) on instance-0; it runs"), (
            done
        )
        wanted = {"shared-0": "instance-1", "shared-1": "instance-0", "shared-2": "instance-1"}
        async with asyncio.timeout(PATIENCE_S):
            while {name: owner for name, (owner, _) in (await owners(serving)).items()} != wanted:
                pass
        assert (await owners(serving))["shared-1"] == ("instance-0", -10)
        assert [one.priority for one in gateway.priorities["shared-1"]] == [-10]
        await gateway.until(lambda: all(gateway.is_whole(name) for name in requests))
        for name, request in requests.items():
            assert gateway.tokens(name) == expected_output(request)
    finally:
        reader.cancel()
        gateway.mailbox.close()
    async with asyncio.timeout(PATIENCE_S):
        while len(moves := await asyncio.to_thread(moves_of, journal)) < 2:
            pass
    entries = entries_of(journal)
    (asked,) = [entry for entry in entries if isinstance(entry.event, PriorityRequested)]
    assert isinstance(asked.event, PriorityRequested)
    assert (asked.event.asked_by, asked.event.level) == ("admin API SetRequestPriority", "high")
    (change,) = asked.effect_values()
    assert isinstance(change, SetPriority) and "normal (0) -> high (-10)" in change.reason
    (answered,) = [entry for entry in entries if isinstance(entry.event, PriorityAnswered)]
    (told,) = answered.effect_values()
    assert isinstance(told, Answer) and isinstance(told.result, Reprioritised)
    words = (f"of {HEADROOM_BLOCKS} blocks", f"{HEADROOM_BLOCKS} blocks are kept free")
    assert any(one in told.result.effect for one in words)
    assert {move.request_id for move in moves} == {"shared-0", "shared-2"}
    assert all(move.reason.startswith(f"isolate: {HEADROOM_BLOCKS} blocks are kept free") for move in moves)


def test_changes_that_cannot_be_made_say_so_in_one_line(serving: Serving) -> None:
    for arguments, words in (
        (("nobody", "high"), "no running request is named 'nobody'"),
        (("nobody", "urgent"), "give a level (high, normal, low) or a whole number"),
        (("nobody", "-99999999999"), "is no priority"),
    ):
        done = serving.command("priority", *arguments)
        assert done.status == 1 and words in done.err and done.err.count("\n") == 1, done
