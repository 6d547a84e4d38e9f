"""Do levels and classes of API keys change through the admin API, at every gateway, and does no key travel or stay?"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as admin_pb
from orchestrator.admin.pb.kvferry.admin.v1 import priorities_pb2 as pb
from orchestrator.admin.priorities import SERVICE
from orchestrator.cli import run_cli
from orchestrator.core import Orchestrator
from orchestrator.events import GatewayStarted, KeyClassRequested, LevelRequested
from orchestrator.gateway.priorities import key_digest
from orchestrator.journal.lines import Entry
from orchestrator.log import ROOT_LOGGER
from orchestrator.policy.levels import Level
from orchestrator.runtime.journal import Journal
from orchestrator.state import CoreParams
from tests.support.admin_world import GATEWAY, Terms, World, admin_world
from tests.support.reflected import ReflectedService
from tests.support.written_journal import PROMPT, lines_of, read

VIP, NEW = key_digest(b"vip"), key_digest(b"new")
SECRET = "sk-a-key-that-must-not-be-told"
CODE = grpc.StatusCode


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with admin_world(Terms(core=CoreParams(key_classes=((VIP, -10),)))) as made:
        await made.loop.until_gateways_know()
        yield made


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def known(world: World, gateway: str = GATEWAY) -> dict[str, int]:
    return dict(world.cluster.urgencies[gateway].key_classes)


async def test_a_gateway_is_told_at_its_start_and_before_a_change_is_answered(world: World) -> None:
    assert known(world) == {VIP: -10}
    answer = await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW.upper(), level="high"))
    assert answer.applied and known(world) == {VIP: -10, NEW: -10}
    assert (answer.key.key_sha256, answer.key.priority, answer.key.shown) == (NEW, -10, "high (-10)")
    assert answer.change == f"key sha256:{NEW[:12]}... none -> high (-10)"
    deleted = await world.priorities.DeleteKeyPriority(pb.DeleteKeyPriorityRequest(key_sha256=VIP))
    assert deleted.applied and known(world) == {NEW: -10}
    now = await world.priorities.GetPriorities(pb.GetPrioritiesRequest())
    assert [(key.key_sha256, key.priority) for key in now.keys] == [(NEW, -10)] and now.etag == deleted.etag


async def test_a_level_changes_at_the_gateways_with_the_keys_that_are_in_it(world: World) -> None:
    ask = pb.UpdatePriorityLevelRequest(name="high", rank=-50, headroom_blocks=64)
    answer = await world.priorities.UpdatePriorityLevel(ask)
    assert answer.applied and (answer.level.name, answer.level.rank, answer.level.headroom_blocks) == ("high", -50, 64)
    assert answer.change == "level high rank -10, 0 blocks -> rank -50, 64 blocks"
    assert known(world) == {VIP: -50}
    levels = world.cluster.urgencies[GATEWAY].levels.levels
    assert levels[0] == Level("high", -50, 64)
    now = await world.priorities.GetPriorities(pb.GetPrioritiesRequest())
    assert [(level.name, level.rank) for level in now.levels] == [("high", -50), ("normal", 0), ("low", 10)]
    assert [key.shown for key in now.keys] == ["high (-50)"]


async def test_a_later_gateway_and_one_that_takes_anothers_place_hear_what_was_changed(world: World) -> None:
    await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW, level="low"))
    world.loop.add(GatewayStarted("gateway-1", "kvferry-gateway-1", "http://127.0.0.1:8000"))
    await world.loop.until_gateways_know()
    assert known(world, "kvferry-gateway-1") == known(world) == {VIP: -10, NEW: 10}
    world.cluster.urgencies.clear()  # a new process under the same name knows nothing
    world.loop.add(GatewayStarted("gateway-0", GATEWAY, "http://127.0.0.1:8000"))
    await world.loop.until_gateways_know()
    assert known(world) == {VIP: -10, NEW: 10}


async def test_a_gateway_whose_connection_broke_is_told_again(world: World) -> None:
    world.cluster.failures_left[GATEWAY] = 1
    answer = await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW, level="low"))
    assert answer.applied and known(world) == {VIP: -10, NEW: 10}


async def test_the_answer_says_when_a_gateway_does_not_know_yet(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.admin.priorities.GATEWAYS_S", 0.05)
    world.cluster.broken.add(GATEWAY)
    answer = await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW, level="low"))
    assert not answer.applied and known(world) == {VIP: -10}
    world.cluster.broken.clear()
    await world.loop.until_gateways_know()
    assert known(world) == {VIP: -10, NEW: 10}


async def test_a_gateway_that_hangs_keeps_no_other_on_what_held_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.admin.priorities.GATEWAYS_S", 0.05)
    second = "kvferry-gateway-1"
    world.loop.add(GatewayStarted("gateway-1", second, "http://127.0.0.1:8000"))
    await world.loop.until_gateways_know()
    world.cluster.answers_when[second] = asyncio.Event()
    for level, priority in (("low", 10), ("high", -10)):
        answer = await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW, level=level))
        assert not answer.applied and known(world) == {VIP: -10, NEW: priority}
    assert known(world, second) == {VIP: -10}
    world.cluster.answers_when.pop(second).set()
    await world.loop.until_gateways_know()
    assert known(world, second) == known(world)


async def test_a_repetition_is_answered_as_the_first_time_and_done_once(world: World) -> None:
    ask = pb.SetKeyPriorityRequest(key_sha256=NEW, level="high", request_id="once")
    first = await world.priorities.SetKeyPriority(ask)
    await world.priorities.DeleteKeyPriority(pb.DeleteKeyPriorityRequest(key_sha256=NEW))
    assert await world.priorities.SetKeyPriority(ask) == first and known(world) == {VIP: -10}
    other = pb.SetKeyPriorityRequest(key_sha256=NEW, level="low", request_id="once")
    assert (await refused(world.priorities.SetKeyPriority(other)))[0] is CODE.ALREADY_EXISTS


async def test_a_dry_run_changes_nothing(world: World) -> None:
    before = await world.priorities.GetPriorities(pb.GetPrioritiesRequest())
    key = await world.priorities.SetKeyPriority(
        pb.SetKeyPriorityRequest(key_sha256=VIP, level="low", validate_only=True, request_id="dry")
    )
    assert key.change.endswith("high (-10) -> low (10)") and not key.applied
    level = await world.priorities.UpdatePriorityLevel(
        pb.UpdatePriorityLevelRequest(name="low", rank=11, validate_only=True)
    )
    assert level.level.rank == 11
    await world.priorities.DeleteKeyPriority(pb.DeleteKeyPriorityRequest(key_sha256=VIP, validate_only=True))
    assert await world.priorities.GetPriorities(pb.GetPrioritiesRequest()) == before


async def test_what_changes_something_is_logged_and_nothing_else_is(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ROOT_LOGGER)
    set_key, set_level = world.priorities.SetKeyPriority, world.priorities.UpdatePriorityLevel
    for _ in range(2):
        await set_key(pb.SetKeyPriorityRequest(key_sha256=NEW, level="low"))
        await set_level(pb.UpdatePriorityLevelRequest(name="high", headroom_blocks=64))
    await set_key(pb.SetKeyPriorityRequest(key_sha256=VIP, level="low", validate_only=True))
    await world.priorities.DeleteKeyPriority(pb.DeleteKeyPriorityRequest(key_sha256=NEW))
    changes = [record.getMessage() for record in caplog.records if record.msg.startswith("priorities changed")]
    assert [change.partition('change="')[2].split()[0] for change in changes] == ["key", "level", "key"]


async def test_each_refusal_has_its_status_code_and_repeats_no_key(world: World) -> None:
    stub = world.priorities
    set_key, delete, level = pb.SetKeyPriorityRequest, pb.DeleteKeyPriorityRequest, pb.UpdatePriorityLevelRequest
    cases: list[tuple[Awaitable[object], grpc.StatusCode]] = [
        (stub.SetKeyPriority(set_key(key_sha256=SECRET, level="high")), CODE.INVALID_ARGUMENT),
        (stub.SetKeyPriority(set_key(level="high")), CODE.INVALID_ARGUMENT),
        (stub.SetKeyPriority(set_key(key_sha256=VIP, level=SECRET)), CODE.INVALID_ARGUMENT),
        (stub.SetKeyPriority(set_key(key_sha256=VIP)), CODE.INVALID_ARGUMENT),
        (stub.SetKeyPriority(set_key(key_sha256=VIP, level="low", etag="old")), CODE.ABORTED),
        (stub.DeleteKeyPriority(delete(key_sha256=SECRET)), CODE.INVALID_ARGUMENT),
        (stub.DeleteKeyPriority(delete(key_sha256=NEW)), CODE.NOT_FOUND),
        (stub.UpdatePriorityLevel(level(name="high")), CODE.INVALID_ARGUMENT),
        (stub.UpdatePriorityLevel(level(name="high", rank=0)), CODE.INVALID_ARGUMENT),
        (stub.UpdatePriorityLevel(level(name="high", headroom_blocks=-1)), CODE.INVALID_ARGUMENT),
        (stub.UpdatePriorityLevel(level(rank=1)), CODE.INVALID_ARGUMENT),
        (stub.UpdatePriorityLevel(level(name="urgent", rank=1)), CODE.NOT_FOUND),
        (stub.UpdatePriorityLevel(level(name="high", rank=-11, etag="old")), CODE.ABORTED),
    ]
    for call, expected in cases:
        code, details = await refused(call)
        assert code is expected and details and SECRET not in details
    assert known(world) == {VIP: -10}
    assert [level.rank for level in world.cluster.urgencies[GATEWAY].levels.levels] == [-10, 0, 10]


async def test_a_client_without_a_proto_finds_the_service(world: World) -> None:
    service = await ReflectedService.of(world.channel, SERVICE)
    answer = await service.call("SetKeyPriority", {"key_sha256": NEW, "level": "high"})
    assert answer["key"]["priority"] == -10


def test_what_a_client_holds_for_an_etag_fills_no_journal(tmp_path: Path) -> None:
    path, core = tmp_path / "journal.jsonl", Orchestrator(CoreParams(key_classes=((VIP, -10),)))
    long = "x" * 1_000_000

    async def change() -> None:
        async with admin_world(Terms(made=core, journal=Journal(path, core, 0.0, PROMPT))) as world:
            for call in (
                world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=VIP, level="low", etag=long)),
                world.priorities.DeleteKeyPriority(pb.DeleteKeyPriorityRequest(key_sha256=VIP, etag=long)),
                world.priorities.UpdatePriorityLevel(pb.UpdatePriorityLevelRequest(name="high", rank=-11, etag=long)),
                world.stub.UpdatePolicy(admin_pb.UpdatePolicyRequest(policy=admin_pb.Policy(etag=long))),
            ):
                assert (await refused(call))[0] is CODE.ABORTED

    asyncio.run(change())
    assert path.stat().st_size < 100_000


def test_the_journal_has_who_changed_what_and_is_replayed_and_holds_no_key(tmp_path: Path) -> None:
    path, core = tmp_path / "journal.jsonl", Orchestrator(CoreParams(key_classes=((VIP, -10),)))

    async def change() -> None:
        async with admin_world(Terms(made=core, journal=Journal(path, core, 0.0, PROMPT))) as world:
            await world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=NEW, level="high"))
            await world.priorities.UpdatePriorityLevel(pb.UpdatePriorityLevelRequest(name="high", rank=-11))
            await refused(world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=SECRET, level="high")))
            await refused(world.priorities.SetKeyPriority(pb.SetKeyPriorityRequest(key_sha256=VIP, level=SECRET)))

    asyncio.run(change())
    entries = [line for line in lines_of(path) if isinstance(line, Entry)]
    asked = [entry.event for entry in entries if isinstance(entry.event, KeyClassRequested | LevelRequested)]
    assert [event.asked_by for event in asked] == ["admin API SetKeyPriority", "admin API UpdatePriorityLevel"]
    story, replay = read(path)
    assert replay.divergence is None and replay.num_verified == len(entries)
    told = [row for row in story.rows if row.what.startswith("tell the gateways the levels")]
    assert [row.why.partition(": ")[2].partition(" ")[0] for row in told[1:]] == ["key", "level"]
    assert SECRET not in path.read_text(encoding="utf-8")


class Command:
    """`kvferry` in this process, against the admin API of a world."""

    def __init__(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self._world, self._capsys = world, capsys

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(run_cli, [*arguments, "--admin", self._world.address])
        out, err = self._capsys.readouterr()
        return status, out, err


@pytest.fixture
def command(world: World, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(world, capsys)


async def test_the_command_reads_a_key_from_stdin_or_a_file_and_sends_its_digest(
    world: World, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{SECRET}\n".encode())))
    status, out, err = await command.run("priority-key", "-3")
    digest = key_digest(SECRET.encode())
    assert status == 0 and known(world)[digest] == -3, err
    assert out == f"key sha256:{digest[:12]}... none -> -3\n"
    file = tmp_path / "key"
    file.write_text(f"  {SECRET}\n")
    status, out, _ = await command.run("priority-key", "high", "--file", str(file))
    assert status == 0 and known(world)[digest] == -10 and SECRET not in out
    status, out, _ = await command.run("priority-key", "--remove", "--digest", f"sha256:{digest}", "--dry-run")
    assert status == 0 and out.startswith("would be: key sha256:") and digest in known(world)
    status, out, _ = await command.run("priority-key", "--remove", "--digest", f"sha256:{digest}")
    assert status == 0 and digest not in known(world)


async def test_the_commands_show_and_change_levels(world: World, command: Command) -> None:
    status, out, _ = await command.run("priority-level", "high", "--rank", "-20", "--headroom", "32")
    assert (status, out) == (0, "level high rank -10, 0 blocks -> rank -20, 32 blocks\n")
    status, out, _ = await command.run("priorities")
    assert out.splitlines() == [
        "level high: rank -20, 32 blocks kept free beside one that runs",
        "level normal: rank 0, 0 blocks kept free beside one that runs",
        "level low: rank 10, 0 blocks kept free beside one that runs",
        f"key sha256:{VIP}: high (-20)",
    ]
    status, out, _ = await command.run("priorities", "--json")
    assert json.loads(out)["keys"] == [{"key_sha256": VIP, "priority": -20, "shown": "high (-20)"}]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("priority-key",), 2, "name the level"),
        (("priority-key", "high", "--remove"), 2, "name the level"),
        (("priority-key", "high", "--digest", SECRET), 2, "--digest must be sha256:"),
        (("priority-key", "high", "--digest", f"sha256:{SECRET}"), 2, "--digest must be sha256:"),
        (("priority-key", "high", "--file", "/no/such/file"), 2, "cannot read /no/such/file"),
        (("priority-key", "high", SECRET), 2, "its key is read from stdin"),
        (("priority-key", "high", "--key", SECRET), 2, "its key is read from stdin"),
        (("priority-key", "high", f"--key={SECRET}"), 2, "its key is read from stdin"),
        (("priority-key", "--key", SECRET), 2, "its key is read from stdin"),
        (("priority-key", f"--key={SECRET}"), 2, "its key is read from stdin"),
        (("priority-key", f"-{SECRET}"), 2, "its key is read from stdin"),
        (("priority-key", "--remove", SECRET, SECRET), 2, "its key is read from stdin"),
        (("priority-key", "urgent", "--digest", f"sha256:{VIP}"), 1, "it must be one of high, normal, low"),
        (("priority-key", "--remove", "--digest", f"sha256:{NEW}"), 1, "has no class"),
        (("priority-level", "urgent", "--rank", "3"), 1, "there is no level 'urgent'"),
        (("priority-level", "high"), 1, "nothing is given"),
        (("priority-level", "high", "--rank", "99999999999"), 2, "'--rank'"),
        (("priority-level", "high", "--rank", "-2147483648"), 2, "'--rank'"),
        (("priority-level", "high", "--headroom", "99999999999"), 2, "'--headroom'"),
        (("priority-level", "high", "--headroom", "-1"), 2, "'--headroom'"),
        (("scale", "99999999999"), 2, "'N'"),
        (("scale", "--min", "99999999999"), 2, "'--min'"),
        (("scale", "--max", "99999999999"), 2, "'--max'"),
    ],
)
async def test_a_command_that_cannot_be_done_is_one_line_without_the_key(
    command: Command, arguments: tuple[str, ...], status: int, words: str
) -> None:
    found, out, err = await command.run(*arguments)
    assert found == status and words in err and len(err.splitlines()) == 1 and SECRET not in out + err


@pytest.mark.parametrize("text", ["", "\n", f"{SECRET}\n{SECRET}", "x" * 9000])
async def test_what_is_no_key_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    status, out, err = await command.run("priority-key", "high")
    assert status == 2 and "stdin must hold one API key on one line" in err and SECRET not in out + err
