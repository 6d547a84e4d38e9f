"""Do instances come and go over Ray while requests run? With fake engines: the rest is real."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from instance.fake_model import FakeRequest, expected_output
from migration.types import Epoch, Incarnation, InstanceId
from tests.support.fleet import Gateway
from tests.support.serving import Serving, wait_gone

pytestmark = pytest.mark.timeout(180)

READY_S = 110.0
SCALED_S = "60"
FAKE = ("fake", "--engine", "fake", "--instances", "2", "--autoscale-max", "3", "--no-rebalance")
NUM_REQUESTS = 6


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    cluster = Serving(*FAKE, "--journal", str(journal), "--step-time-ms", "25", num_gateways=0)
    try:
        cluster.wait_ready(READY_S)
        yield cluster
    finally:
        cluster.end()


@asynccontextmanager
async def gateway_of_our_own() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.mailbox.open()
    reader = asyncio.create_task(gateway.run())
    try:
        yield gateway
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
        gateway.mailbox.close()


def serving_ones(serving: Serving) -> dict[str, Incarnation]:
    return {
        (name := item["name"].removeprefix("instances/")): Incarnation(
            InstanceId(name), Epoch(item["epoch"]), item["address"]
        )
        for item in serving.status()["instances"]
        if item["state"] == "INSTANCE_STATE_SERVING"
    }


async def eventually(serving: Serving, is_so: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(30):
        while True:  # another process: there is no event to wait for
            if is_so(await asyncio.to_thread(serving.status)):
                return
            await asyncio.sleep(0.05)


async def test_scaling_in_under_load_and_out_again_loses_no_token_of_any_stream(serving: Serving) -> None:
    """1. Streams run on both. 2. `kvferry scale 1`: those of one move, and it is stopped. 3. `kvferry scale 2`: a new
    one comes under the old name and a new epoch. 4. A stream moves to it. 5. All say what they say alone."""
    requests = {f"scaled-{n}": FakeRequest(prompt=tuple(range(n, n + 30)), max_tokens=600) for n in range(NUM_REQUESTS)}
    async with gateway_of_our_own() as gateway:
        before = await asyncio.to_thread(serving_ones, serving)
        for number, (name, request) in enumerate(requests.items()):
            gateway.submit(before[f"instance-{number % 2}"], name, request)
        await gateway.until(lambda: all(gateway.entries[name] for name in requests))
        await eventually(serving, lambda status: len(status["requests"]) == NUM_REQUESTS)

        done = await asyncio.to_thread(serving.command, "scale", "1", "--deadline", SCALED_S)
        assert done.status == 0 and "emptying" in done.out, done
        left = await asyncio.to_thread(serving_ones, serving)
        assert len(left) == 1 and left.items() <= before.items()
        running = [name for name in requests if not gateway.is_finished(name)]
        assert running, "the streams must outlive the scaling, or nothing was tested"

        done = await asyncio.to_thread(serving.command, "scale", "2", "--deadline", SCALED_S)
        assert done.status == 0, done
        after = await asyncio.to_thread(serving_ones, serving)
        assert set(after) == set(before), "the name is free again"
        (new,) = after.keys() - left.keys()
        assert after[new].epoch == 2 and before[new].epoch == 1, "an incarnation is never there twice"

        late = FakeRequest(prompt=tuple(range(40)), max_tokens=400)
        gateway.submit(next(iter(left.values())), "late", late)
        await eventually(serving, lambda status: any(one["name"] == "requests/late" for one in status["requests"]))
        done = await asyncio.to_thread(serving.command, "migrate", "late", "--to", new)
        assert done.status == 0 and "committed" in done.out, done
        await gateway.until(lambda: all(gateway.is_whole(name) for name in (*requests, "late")))
        for name, request in (*requests.items(), ("late", late)):
            assert gateway.tokens(name) == expected_output(request)


def test_the_foreground_says_who_came_and_status_says_what_holds(serving: Serving) -> None:
    (scaling,) = serving.status()["scaling"]
    assert (scaling["target_instances"], scaling["num_instances"], scaling["max_instances"]) == (2, 2, 3)
    shown = serving.command("status").out
    assert "instances: 2 there, 2 wanted (by hand, 1 to 3)" in shown


def test_a_number_that_cannot_be_is_one_line(serving: Serving) -> None:
    for arguments, words in (
        (("scale", "4"), "4 instances are outside the limits 1 to 3"),
        (("scale", "--max", "9"), "--autoscale-max"),
        (("scale",), "nothing is given"),
    ):
        done = serving.command(*arguments)
        assert done.status == 1 and words in done.err and done.err.count("\n") == 1, done


async def test_a_killed_instance_is_replaced_under_a_new_epoch_once_a_number_was_said(serving: Serving) -> None:
    listed = (await asyncio.to_thread(serving.status))["instances"]
    victim = next(item for item in listed if item["state"] == "INSTANCE_STATE_SERVING")
    psutil.Process(victim["process_id"]).kill()
    await eventually(
        serving,
        lambda status: any(
            item["name"] == victim["name"]
            and item["epoch"] > victim["epoch"]
            and item["state"] == "INSTANCE_STATE_SERVING"
            for item in status["instances"]
        ),
    )


def test_the_journal_says_why_and_how_old_its_signals_were(serving: Serving) -> None:
    (journal,) = [line for line in serving.process.args if str(line).endswith("journal.jsonl")]  # type: ignore[union-attr]
    lines = Path(str(journal)).read_text(encoding="utf-8").splitlines()
    for effect in ("AnnounceScaling", "StartInstance", "StopInstance"):
        line = next(line for line in lines if f'"{effect}"' in line)
        assert '"reason":' in line and '"signal_age_s":' in line


def test_ctrl_c_stops_also_what_the_orchestrator_has_started(serving: Serving) -> None:
    """The last one of this module: it ends the shared cluster."""
    assert serving.command("scale", "3", "--deadline", SCALED_S).status == 0
    before = serving.descendants()
    status, said = serving.stop(signal.SIGINT)
    assert status == 0 and "nothing is left running" in said
    assert wait_gone(before, 3.0) == []


async def test_an_idle_fleet_shrinks_by_itself_where_that_is_asked_for() -> None:
    cluster = Serving(
        *("fake", "--engine", "fake", "--instances", "2", "--autoscale", "--autoscale-period-s", "1"),
        *("--autoscale-cooldown-s", "1"),
        num_gateways=0,
    )
    try:
        await asyncio.to_thread(cluster.wait_ready, READY_S)
        await eventually(cluster, lambda status: status["scaling"][0]["num_instances"] == 1)
        (scaling,) = (await asyncio.to_thread(cluster.status))["scaling"]
        assert scaling["automatic"] and "above 960 for 3 s" in scaling["reason"]
    finally:
        cluster.end()
