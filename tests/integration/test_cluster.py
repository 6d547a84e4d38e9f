"""Does a whole kvferry over Ray come up, obey, lose an instance and go down? With fake engines: the rest is real."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from instance.fake_model import FakeRequest, expected_output
from migration.types import Epoch, Incarnation, InstanceId
from tests.support.fleet import Gateway
from tests.support.serving import Serving, kvferry, wait_gone

pytestmark = pytest.mark.timeout(180)

READY_S = 110.0
FAKE = ("fake", "--engine", "fake", "--instances", "3", "--no-rebalance", "--step-time-ms", "10")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    cluster = Serving(*FAKE, "--journal", str(journal), num_gateways=0)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


def incarnation(serving: Serving, name: str) -> Incarnation:
    shown = serving.instance(name)
    return Incarnation(InstanceId(name), Epoch(shown["epoch"]), shown["address"])


class Client:
    """A gateway's inbox and its reader, for the time of a `with`."""

    def __init__(self) -> None:
        self.gateway = Gateway()

    async def __aenter__(self) -> Gateway:
        await self.gateway.mailbox.open()
        self._reader = asyncio.create_task(self.gateway.run())
        return self.gateway

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        self.gateway.mailbox.close()


async def eventually_listed(serving: Serving, request_id: str, on: str) -> None:
    async with asyncio.timeout(10):
        while True:
            listed = (await asyncio.to_thread(serving.status))["requests"]
            if any(
                item["name"] == f"requests/{request_id}" and item["instance"] == f"instances/{on}" for item in listed
            ):
                return


def tokens_of(gateway: Gateway, request_id: str) -> tuple[int, ...]:
    return tuple(token for _, entry in gateway.entries[request_id] for token in entry.token_ids)


def is_over(gateway: Gateway, request_id: str) -> bool:
    return any(entry.finish_reason is not None for _, entry in gateway.entries[request_id])


def test_it_says_what_it_does_while_it_starts(serving: Serving) -> None:
    said = "\n".join(serving.lines)
    assert "instance-0 loading the fake engine ..." in said
    assert "instance-2 ready in" in said and "tokens of KV cache" in said
    assert f"admin API on {serving.admin}" in said


def test_status_shows_every_instance_as_a_table_and_as_json(serving: Serving) -> None:
    values = json.loads(serving.command("status", "--json").out)
    assert [item["state"] for item in values["instances"]] == ["INSTANCE_STATE_SERVING"] * 3
    assert all(item["process_id"] > 0 and item["total_blocks"] == 256 for item in values["instances"])
    table = serving.command("status").out
    assert "instance-1" in table and "serving" in table


async def test_a_request_migrates_there_and_back_by_command_and_its_tokens_are_exact(serving: Serving) -> None:
    request = FakeRequest(prompt=tuple(range(40)), max_tokens=1400)
    async with Client() as gateway:
        gateway.submit(incarnation(serving, "instance-0"), "there-and-back", request)
        await gateway.until(lambda: len(gateway.entries["there-and-back"]) > 3)
        await eventually_listed(serving, "there-and-back", "instance-0")
        done = await asyncio.to_thread(serving.command, "migrate", "there-and", "--to", "instance-1")
        assert done.status == 0 and "committed, instance-0 -> instance-1" in done.out, done
        await eventually_listed(serving, "there-and-back", "instance-1")
        done = await asyncio.to_thread(serving.command, "migrate", "there-and-back", "--to", "instance-0")
        assert done.status == 0 and "committed, instance-1 -> instance-0" in done.out, done
        await gateway.until(lambda: is_over(gateway, "there-and-back"))
        assert tokens_of(gateway, "there-and-back") == expected_output(request)
    latest = serving.status()["migrations"][:2]
    assert [item["outcome"] for item in latest] == ["MIGRATION_OUTCOME_COMMITTED"] * 2
    assert all(item["cause"] == "asked for" for item in latest)


async def test_a_drain_moves_what_runs_and_refuses_what_comes_until_it_is_undone(serving: Serving) -> None:
    requests = {
        f"drained-{number}": FakeRequest(prompt=tuple(range(number, number + 30)), max_tokens=500)
        for number in range(4)
    }
    async with Client() as gateway:
        to = incarnation(serving, "instance-1")
        for name, request in requests.items():
            gateway.submit(to, name, request)
        await gateway.until(lambda: all(gateway.entries[name] for name in requests))
        await eventually_listed(serving, "drained-3", "instance-1")
        done = await asyncio.to_thread(serving.command, "drain", "instance-1", "--deadline", "20")
        assert done.status == 0 and done.out.splitlines()[-1] == "instance-1 is empty", done
        assert serving.instance("instance-1")["drained"]
        gateway.submit(to, "too-late", requests["drained-0"])
        await gateway.until(lambda: "too-late" in gateway.answers)
        assert gateway.answers["too-late"].refusal is not None
        await gateway.until(lambda: all(is_over(gateway, name) for name in requests))
        for name, request in requests.items():
            assert tokens_of(gateway, name) == expected_output(request), "a drain changes no token"
    again = serving.command("drain", "instance-1", "--no-wait")
    assert again.status == 1 and "draining already" in again.err
    assert serving.command("undrain", "instance-1").status == 0
    assert serving.instance("instance-1")["state"] == "INSTANCE_STATE_SERVING"


async def test_a_request_without_a_gateway_is_ended_by_command_at_its_instance(serving: Serving) -> None:
    async with Client() as gateway:
        gateway.submit(
            incarnation(serving, "instance-0"), "to-be-ended", FakeRequest(tuple(range(40)), max_tokens=1500)
        )
        await eventually_listed(serving, "to-be-ended", "instance-0")
        dry = await asyncio.to_thread(serving.command, "cancel", "to-be", "--dry-run")
        assert (dry.status, dry.out) == (0, "to-be-ended would end on instance-0\n"), dry
        done = await asyncio.to_thread(serving.command, "cancel", "to-be-ended")
        assert (done.status, done.out) == (0, "to-be-ended was ended on instance-0\n"), done
        async with asyncio.timeout(10):
            while (await asyncio.to_thread(serving.instance, "instance-0"))["num_running"]:
                pass
        assert not is_over(gateway, "to-be-ended"), "it was ended, not finished"


def test_the_policy_is_changed_by_command_and_the_journal_says_to_what(serving: Serving) -> None:
    done = serving.command("policy", "--set", "rebalance.rest_s=7", "--set", "drain.max_moves=3")
    assert done.status == 0 and "rebalance.rest_s is now 7 (was 1)" in done.out, done
    assert "rebalance.rest_s            7" in serving.command("policy").out
    assert serving.command("policy", "--reset", "rebalance.rest_s", "--reset", "drain.max_moves").status == 0
    (journal,) = [line for line in serving.process.args if str(line).endswith("journal.jsonl")]  # type: ignore[union-attr]
    asked = [line for line in Path(str(journal)).read_text(encoding="utf-8").splitlines() if '"PolicyUpdate' in line]
    assert '"changes":[["rebalance.rest_s",1.0,7.0],["drain.max_moves",16,3]]' in asked[0]


def test_commands_that_cannot_be_done_say_so_in_one_line(serving: Serving) -> None:
    for arguments, words in (
        (("migrate", "nobody", "--to", "instance-0"), "no running request is named 'nobody'"),
        (("drain", "instance-9"), "no instance is named 'instance-9'"),
        (("undrain", "instance-0"), "not draining"),
        (("cancel", "nobody"), "no running request is named 'nobody'"),
        (("cancel-migration", "999999"), "no migration has the number 999999"),
        (("policy", "--set", "drain.max_moves=0"), "it must be a whole number from 1 to 1000"),
    ):
        done = serving.command(*arguments)
        assert done.status == 1 and words in done.err and done.err.count("\n") == 1, done


async def test_a_killed_instance_is_lost_at_once_and_the_others_go_on(serving: Serving) -> None:
    request = FakeRequest(prompt=tuple(range(20)), max_tokens=40)
    psutil.Process(serving.instance("instance-2")["process_id"]).kill()
    async with asyncio.timeout(15):
        while (await asyncio.to_thread(serving.instance, "instance-2"))["state"] != "INSTANCE_STATE_STOPPED":
            pass
    async with Client() as gateway:
        gateway.submit(incarnation(serving, "instance-0"), "after", request)
        await gateway.until(lambda: is_over(gateway, "after"))
        assert tokens_of(gateway, "after") == expected_output(request)


def test_the_journal_holds_decisions_with_their_reason_and_the_age_of_their_signals(serving: Serving) -> None:
    (journal,) = [line for line in serving.process.args if str(line).endswith("journal.jsonl")]  # type: ignore[union-attr]
    text = Path(str(journal)).read_text(encoding="utf-8")
    assert '"StartMigration"' in text and '"reason":"asked for"' in text and '"signal_age_s":' in text


def test_the_journal_of_it_all_is_explained_and_replays_to_the_last_effect(serving: Serving) -> None:
    """While it is being written."""
    (journal,) = [line for line in serving.process.args if str(line).endswith("journal.jsonl")]  # type: ignore[union-attr]
    done = kvferry("replay", str(journal), "--json")
    assert done.status == 0, done
    told = json.loads(done.out)
    assert told["replay"]["agrees"] and told["replay"]["verified_events"] > 100
    assert told["replay"]["lost_events"] == told["replay"]["unverified_events"] == 0
    assert told["summary"]["moves"]["asked for"]["outcomes"].get("committed", 0) >= 2
    assert any(row["what"].startswith("instance-2 was lost") for row in told["rows"])
    shown = kvferry("replay", str(journal), "--request", "there-and-back")
    assert shown.status == 0 and "move there-and-back: instance-0 -> instance-1" in shown.out, shown
    assert Path(str(journal)).stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_ctrl_c_stops_everything_and_leaves_no_process(serving: Serving) -> None:
    """The last one of this module: it ends the shared cluster."""
    before = serving.descendants()
    assert len(before) > 4
    status, said = serving.stop(signal.SIGINT)
    assert status == 0 and "nothing is left running" in said
    assert wait_gone(before, 3.0) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_start_works_at_once_and_leaves_nothing_when_it_is_terminated_or_killed(
    number: signal.Signals,
) -> None:
    cluster = Serving("fake", "--engine", "fake", "--instances", "1", num_gateways=0)
    try:
        cluster.wait_ready(READY_S)
        before = cluster.descendants()
        status, _ = cluster.stop(number)
        assert status == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        assert wait_gone(before, 10.0) == [], "Ray's processes end with the one that started them"
    finally:
        cluster.end()


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    cluster = Serving("fake", "--engine", "fake", "--instances", "2", num_gateways=0)
    try:
        cluster.wait_ready(READY_S)
        before = cluster.descendants()
        cluster.process.send_signal(signal.SIGINT)
        status, _ = cluster.stop(signal.SIGINT)
        assert status in (0, 130), "130 unless the first one was done before the second came"
        assert wait_gone(before, 10.0) == []
    finally:
        cluster.end()
