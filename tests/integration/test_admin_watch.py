"""Does the Watch stream stay true and small for readers that stop reading, leave, or are too many?"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from instance.messages import RequestLoad
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.watching import WatchParams
from tests.support.admin_world import Terms, World, admin_world
from tests.support.reports import request_load

QUICK = Terms(watching=WatchParams(period_s=0.001, max_streams=2))
NUM_REQUESTS = 2000
NUM_ROUNDS = 60


def crowd(status: str) -> list[RequestLoad]:
    return [request_load(f"request-{number:04d}-{'x' * 60}", status=status) for number in range(NUM_REQUESTS)]


async def until_idle(world: World) -> None:
    """Calls that go through the same server: it looks at what has changed meanwhile."""
    for _ in range(5):
        await world.stub.GetPolicy(pb.GetPolicyRequest())


async def test_a_reader_that_does_not_read_is_told_the_end_and_not_the_way_there() -> None:
    async with admin_world(QUICK) as world:
        call = world.stub.Watch(pb.WatchRequest(topics=[pb.WATCH_TOPIC_REQUESTS]))
        first = await call.read()
        assert isinstance(first, pb.WatchResponse)
        for number in range(NUM_ROUNDS):
            world.runs("instance-0", *crowd("waiting" if number % 2 else "running"))
            await until_idle(world)
        world.runs("instance-0", *crowd("preempted"))
        num_bytes, last = 0, dict[str, str]()
        async with asyncio.timeout(60):
            while len(last) < NUM_REQUESTS or set(last.values()) != {"preempted"}:
                message = await call.read()
                assert isinstance(message, pb.WatchResponse)
                num_bytes += message.ByteSize()
                last |= {
                    change.request.name: change.request.status
                    for change in message.changes
                    if change.kind != pb.Change.KIND_ENDED
                }
        one_round = NUM_REQUESTS * 150
        assert num_bytes < one_round * NUM_ROUNDS / 3, "what happened while nobody read was not kept"
        call.cancel()


async def test_a_reader_that_reads_is_told_every_round() -> None:
    """The negative control: with the same changes, a reader that keeps up is sent far more."""
    async with admin_world(QUICK) as world:
        call = world.stub.Watch(pb.WatchRequest(topics=[pb.WATCH_TOPIC_REQUESTS]))
        await call.read()
        num_changes = 0
        async with asyncio.timeout(60):
            for number in range(10):
                world.runs("instance-0", *crowd("waiting" if number % 2 else "running"))
                told = 0
                while told < NUM_REQUESTS:
                    message = await call.read()
                    assert isinstance(message, pb.WatchResponse)
                    told += sum(change.kind != pb.Change.KIND_ENDED for change in message.changes)
                num_changes += told
        assert num_changes == 10 * NUM_REQUESTS
        call.cancel()


async def test_streams_are_bounded_and_a_reader_that_leaves_makes_room() -> None:
    async with admin_world(QUICK) as world:
        calls = [world.stub.Watch(pb.WatchRequest()) for _ in range(2)]
        for call in calls:
            message = await call.read()
            assert isinstance(message, pb.WatchResponse) and message.changes and not message.synced
            num_changes = 0
            while isinstance(message, pb.WatchResponse) and not message.synced:
                num_changes += len(message.changes)
                message = await call.read()
            assert num_changes == 4
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.stub.Watch(pb.WatchRequest()).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls[0].cancel()
        async with asyncio.timeout(10):
            while world.server.watchtower.num_streams == 2:
                await world.stub.GetPolicy(pb.GetPolicyRequest())
        assert isinstance(await world.stub.Watch(pb.WatchRequest()).read(), pb.WatchResponse)


async def test_a_stream_ends_with_a_clear_status_when_the_server_stops() -> None:
    async with admin_world() as world:
        call = world.stub.Watch(pb.WatchRequest())
        await call.read()
        await world.server.stop(5.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "is being stopped" in (caught.value.details() or "")


async def test_a_topic_that_does_not_exist_is_an_invalid_argument() -> None:
    async with admin_world() as world:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.stub.Watch(pb.WatchRequest(topics=[99])).read()  # type: ignore[list-item]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_empty_stream_is_synced_at_once_and_says_that_it_lives() -> None:
    async with admin_world(Terms(watching=WatchParams(period_s=0.001, alive_s=0.01))) as world:
        call = world.stub.Watch(pb.WatchRequest(topics=[pb.WATCH_TOPIC_MIGRATIONS]))
        for _ in range(3):
            message = await call.read()
            assert isinstance(message, pb.WatchResponse) and message.synced and not message.changes
        call.cancel()
