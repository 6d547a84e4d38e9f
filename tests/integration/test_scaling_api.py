"""Does the scaling part of the admin API do what its .proto says? The real loop and core, over a fake cluster."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from rich.console import Console

from instance.mailbox import Mailbox
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator import cli_scaling
from orchestrator.admin.client import AdminClient
from orchestrator.admin.errors import Declined
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2_grpc as pb_grpc
from orchestrator.admin.server import AdminServer
from orchestrator.cli_status import as_values, picture
from orchestrator.core import Orchestrator
from orchestrator.events import GatewayStarted, InstanceStarted, ReportReceived, RequestsReceived
from orchestrator.runtime.journal import Journal
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams, ScalingParams
from tests.support.fake_cluster import FakeCluster
from tests.support.reports import load_report, request_report
from tests.support.written_journal import PROMPT, read

GATEWAY = "kvferry-gateway-0"
SCALING = ScalingParams(can_start=True, most=4, capacity=4, first_epoch=2, linger_s=0.05, backoff_s=0.05)
PATIENCE_S = 10.0


class World:
    """A loop with two instances that report, a gateway, and the admin server."""

    def __init__(self, loop: OrchestratorLoop, cluster: FakeCluster, address: str) -> None:
        self.loop, self.cluster, self.address = loop, cluster, address
        self.step = 0

    def report(self) -> None:
        """Everybody the gateway knows of says that nothing runs there."""
        self.step += 1
        for member in self.cluster.members.get(GATEWAY, ()):
            instance, epoch = member.incarnation.instance, member.incarnation.epoch
            state = member.state.value
            self.loop.handle(ReportReceived(load_report(instance, epoch=epoch, step=self.step, state=state)))
            self.loop.handle(RequestsReceived(request_report(instance, epoch=epoch, step=self.step)))

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self.report()
                await asyncio.sleep(0.01)  # the loop's ticks are what is waited for

    def members(self) -> list[tuple[str, int]]:
        told = self.cluster.members.get(GATEWAY, ())
        return [(member.incarnation.instance, member.incarnation.epoch) for member in told]


@asynccontextmanager
async def world_of(
    params: ScalingParams, journal_path: Path | None = None, max_instances: int = 256
) -> AsyncIterator[World]:
    cluster, mailbox = FakeCluster(), Mailbox("test")
    await mailbox.open()
    core = Orchestrator(CoreParams(is_rebalancing=False, max_instances=max_instances, scaling=params))
    now_s = asyncio.get_running_loop().time()
    journal = Journal(journal_path, core, now_s, PROMPT) if journal_path is not None else None
    loop = OrchestratorLoop(core, cluster, mailbox, LoopParams(tick_s=0.02), journal, cluster)
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    server = AdminServer(loop)
    made = World(loop, cluster, await server.start("127.0.0.1", 0))
    loop.add(GatewayStarted("gateway-0", GATEWAY, "http://127.0.0.1:8000"))
    for name in ("instance-0", "instance-1"):
        incarnation = Incarnation(InstanceId(name), Epoch(1), "tcp://127.0.0.1:1")
        loop.add(InstanceStarted(incarnation, f"kvferry-{name}-1", "tiny", 16, 1000, process_id=7))
    try:
        yield made
    finally:
        await server.stop(0)
        loop.stop()
        await running
        mailbox.close()
        if journal is not None:
            await asyncio.to_thread(journal.close)


async def test_two_become_one_and_two_again_and_gateways_are_told_each_time(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with world_of(SCALING, path) as world, grpc.aio.insecure_channel(world.address) as channel:
        stub = pb_grpc.ScalingServiceStub(channel)
        first = (await stub.GetScaling(pb.GetScalingRequest())).scaling
        assert not first.HasField("target_instances") and (first.num_instances, first.max_instances) == (2, 4)
        answered = (await stub.ScaleInstances(pb.ScaleInstancesRequest(target_instances=1))).scaling
        assert answered.target_instances == 1 and answered.reason == "by hand" and not answered.automatic
        await world.until(lambda: world.members() == [("instance-0", 1)])
        assert world.cluster.stopped == [("instance-1", 1)]
        assert world.cluster.fenced == [("kvferry-instance-0-1", "instance-1", 1)]
        await stub.ScaleInstances(pb.ScaleInstancesRequest(target_instances=2))
        await world.until(lambda: world.members() == [("instance-0", 1), ("instance-1", 2)])
        last = (await stub.GetScaling(pb.GetScalingRequest())).scaling
        assert cli_scaling.is_reached(last) and not cli_scaling.is_reached(answered)
    told, replay = read(path)
    assert replay.divergence is None and replay.num_verified > 0 and replay.num_unverified == 0
    assert told.summary.events["ScaleRequested"] == 2
    for effect in ("AnnounceScaling", "StartInstance", "StopInstance"):
        line = next(line for line in path.read_text().splitlines() if f'"$":"{effect}"' in line)
        assert '"reason":' in line and '"signal_age_s":' in line


async def test_a_request_id_that_was_answered_before_does_nothing_twice() -> None:
    """The second answer is the first one, though another target holds by then; its id is no other command's."""
    async with world_of(SCALING) as world, grpc.aio.insecure_channel(world.address) as channel:
        stub = pb_grpc.ScalingServiceStub(channel)
        three = pb.ScaleInstancesRequest(target_instances=3, request_id="once")
        first = await stub.ScaleInstances(three)
        await stub.ScaleInstances(pb.ScaleInstancesRequest(target_instances=2, request_id="twice"))
        assert await stub.ScaleInstances(three) == first
        assert (await stub.GetScaling(pb.GetScalingRequest())).scaling.target_instances == 2
        with pytest.raises(grpc.aio.AioRpcError, match="use a new one"):
            await stub.ScaleInstances(pb.ScaleInstancesRequest(target_instances=1, request_id="once"))


@pytest.mark.parametrize(("target", "most", "reason"), [(None, -1, "INVALID_FIELD"), (5, None, "PRECONDITION")])
async def test_a_refusal_has_a_reason_that_programs_can_read(target: int | None, most: int | None, reason: str) -> None:
    async with world_of(SCALING) as world:
        with AdminClient(world.address) as client, pytest.raises(Declined) as caught:
            await asyncio.to_thread(client.scale, target, None, most)
        assert caught.value.reason == reason


async def test_a_start_that_fails_is_shown_and_tried_again() -> None:
    async with world_of(SCALING) as world, grpc.aio.insecure_channel(world.address) as channel:
        stub = pb_grpc.ScalingServiceStub(channel)
        world.cluster.launch_errors = ["no node has a place"]
        await stub.ScaleInstances(pb.ScaleInstancesRequest(target_instances=3))
        await world.until(lambda: len(world.members()) == 3)
        assert world.cluster.launched == [("instance-2", 2), ("instance-2", 3)]
        scaling = (await stub.GetScaling(pb.GetScalingRequest())).scaling
        assert scaling.num_start_failures == 1, "until it has served for a while"


async def test_more_than_the_core_takes_is_stopped_again() -> None:
    """Its bound on instances is lower than what is wanted: a process of which nobody knows must not be left."""
    async with world_of(replace(SCALING, max_start_failures=1), max_instances=2) as world:
        with AdminClient(world.address) as client:
            await asyncio.to_thread(client.scale, 3)
            await world.until(lambda: bool(world.cluster.stopped))
            assert world.cluster.stopped == [("instance-2", 2)] and len(world.members()) == 2


async def test_a_start_under_way_ends_with_the_orchestrator() -> None:
    async with world_of(SCALING) as world:
        world.cluster.launch_hangs = True
        with AdminClient(world.address) as client:
            scaling = await asyncio.to_thread(client.scale, 3)
            await world.until(lambda: bool(world.cluster.launched))
            shown = await asyncio.to_thread(client.scaling)
            assert list(shown.starting) == ["instances/instance-2"] and "starting instance-2" in cli_scaling.line(shown)
            assert scaling.target_instances == 3
    assert world.cluster.launch_cancelled == ["instance-2"]


@pytest.mark.parametrize(
    ("ask", "code", "words"),
    [
        (pb.ScaleInstancesRequest(), grpc.StatusCode.INVALID_ARGUMENT, "nothing is given"),
        (pb.ScaleInstancesRequest(request_id="i"), grpc.StatusCode.INVALID_ARGUMENT, "nothing is given"),
        (pb.ScaleInstancesRequest(target_instances=0), grpc.StatusCode.INVALID_ARGUMENT, "target_instances: 0"),
        (pb.ScaleInstancesRequest(min_instances=-1), grpc.StatusCode.INVALID_ARGUMENT, "min_instances: -1"),
        (
            pb.ScaleInstancesRequest(target_instances=5),
            grpc.StatusCode.FAILED_PRECONDITION,
            "outside the limits 1 to 4",
        ),
        (pb.ScaleInstancesRequest(max_instances=9), grpc.StatusCode.FAILED_PRECONDITION, "--autoscale-max"),
    ],
)
async def test_each_refusal_has_its_status_code_and_says_what_to_do(
    ask: pb.ScaleInstancesRequest, code: grpc.StatusCode, words: str
) -> None:
    async with world_of(SCALING) as world, grpc.aio.insecure_channel(world.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.ScalingServiceStub(channel).ScaleInstances(ask)
        assert caught.value.code() is code and words in (caught.value.details() or "")


async def test_an_orchestrator_without_a_launcher_refuses_in_one_line() -> None:
    async with world_of(ScalingParams()) as world:
        with AdminClient(world.address) as client, pytest.raises(Declined, match="cannot scale"):
            await asyncio.to_thread(client.scale, 1)


async def test_limits_and_mode_are_set_together_or_not_at_all() -> None:
    async with world_of(SCALING) as world:
        with AdminClient(world.address) as client:
            with pytest.raises(Declined, match="more than the most"):
                await asyncio.to_thread(client.scale, None, 3, 2, True)
            shown = await asyncio.to_thread(client.scaling)
            assert (shown.min_instances, shown.max_instances, shown.automatic) == (1, 4, False)
            shown = await asyncio.to_thread(client.scale, None, 2, 3, True)
            assert (shown.min_instances, shown.max_instances, shown.automatic) == (2, 3, True)
            assert cli_scaling.line(shown).startswith("instances: 2 there, 2 wanted (automatic, 2 to 3)")


async def test_the_command_line_follows_until_it_is_done_or_the_deadline_comes_and_status_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with world_of(SCALING) as world:
        world.cluster.launch_hangs = True

        def use() -> None:
            with AdminClient(world.address) as client:
                assert not cli_scaling.follow(client, client.scale(3), deadline_s=0.1)
                assert cli_scaling.follow(client, client.scale(2), deadline_s=PATIENCE_S)
                (shown,) = as_values(client)["scaling"]
                assert isinstance(shown, dict) and shown["target_instances"] == 2
                console = Console(record=True, width=200, file=io.StringIO())
                console.print(picture(client))
                assert "instances: 2 there, 2 wanted (by hand, 1 to 4)" in console.export_text()

        await asyncio.to_thread(use)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("instances: 2 there, 3 wanted") and said[-1].startswith("instances: 2 there, 2 wanted")
