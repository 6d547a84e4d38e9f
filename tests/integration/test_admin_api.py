"""Does the admin API do what its .proto says, for any gRPC client? The real loop and core, over a fake cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from instance.types import PriorityAnswer, PriorityOutcome
from orchestrator.admin.client import AdminClient
from orchestrator.admin.errors import Declined
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.server import MAX_CONCURRENT_RPCS, MAX_MESSAGE_BYTES, SERVICE, AdminServer
from orchestrator.errors import StartUpError, Unreachable
from tests.support.admin_world import GATEWAY, World, admin_world
from tests.support.reports import request_load


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with admin_world() as made:
        yield made


async def status_of(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_instances_gateways_and_requests_are_listed(world: World) -> None:
    listed = await world.stub.ListInstances(pb.ListInstancesRequest())
    first, second = listed.instances
    assert (first.name, first.epoch, first.state, first.num_running) == ("instances/instance-0", 1, 2, 2)
    assert first.report_age_s >= 0 and first.freeness_steps == pytest.approx(980 * 16 / 2) and first.process_id == 7
    assert second.free_blocks == 1000
    assert [(item.name, item.alive) for item in listed.gateways] == [("gateways/gateway-0", True)]
    requests = await world.stub.ListRequests(pb.ListRequestsRequest(parent="instances/instance-0"))
    assert [(item.name, item.instance) for item in requests.requests] == [
        ("requests/cmpl-1", "instances/instance-0"),
        ("requests/cmpl-2", "instances/instance-0"),
    ]
    assert (await world.stub.ListRequests(pb.ListRequestsRequest(parent="instances/instance-1"))).total_size == 0


async def test_requests_come_in_pages(world: World) -> None:
    first = await world.stub.ListRequests(pb.ListRequestsRequest(page_size=1))
    assert len(first.requests) == 1 and first.total_size == 2 and first.next_page_token
    rest = await world.stub.ListRequests(pb.ListRequestsRequest(page_size=1, page_token=first.next_page_token))
    assert rest.requests[0].name == "requests/cmpl-2" and not rest.next_page_token


async def test_a_page_ends_before_it_is_too_large_for_a_message(world: World) -> None:
    requests = [request_load(f"r{number:04d}", external_id="x" * 1000) for number in range(6000)]
    world.runs("instance-0", *requests)
    names, token, num_pages = list[str](), "", 0
    while token or not num_pages:
        page = await world.stub.ListRequests(pb.ListRequestsRequest(page_size=10_000, page_token=token))
        assert page.ByteSize() < MAX_MESSAGE_BYTES and page.total_size == 6000
        names += [item.name for item in page.requests]
        token, num_pages = page.next_page_token, num_pages + 1
    assert names == [f"requests/{request.request_id}" for request in requests] and num_pages > 1


async def test_calls_at_once_are_bounded(world: World) -> None:
    """Each connection carries so many; those beyond what the server takes in all are refused."""
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(world.address, options=own_connection) for _ in range(3)]
    drains = []
    for number in range(MAX_CONCURRENT_RPCS):
        stub = pb_grpc.AdminServiceStub(channels[number * 2 // MAX_CONCURRENT_RPCS])
        drains.append(stub.DrainInstance(pb.DrainInstanceRequest(name="instances/instance-0", wait=True)))
    await asyncio.gather(*(drain.read() for drain in drains))
    refused = pb_grpc.AdminServiceStub(channels[2]).GetPolicy(pb.GetPolicyRequest())
    assert (await status_of(refused))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    for drain in drains:
        drain.cancel()
    async with asyncio.timeout(10):
        while True:
            try:
                await pb_grpc.AdminServiceStub(channels[2]).GetPolicy(pb.GetPolicyRequest())
            except grpc.aio.AioRpcError:
                continue
            break
    for channel in channels:
        await channel.close()


async def test_a_migration_is_answered_when_it_has_ended_and_is_listed(world: World) -> None:
    ask = pb.MigrateRequestRequest(
        name="requests/client-cmpl-1", destination="instances/instance-1", mode=pb.MIGRATION_MODE_BLOCKING
    )
    migration = (await world.stub.MigrateRequest(ask)).migration
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMMITTED and migration.num_stages == 2
    assert world.cluster.migrated == [("kvferry-instance-0-1", "cmpl-1", "instance-1", "blocking")]
    (listed,) = (await world.stub.ListMigrations(pb.ListMigrationsRequest())).migrations
    assert listed.name == migration.name and listed.HasField("ended_age_s")


async def test_a_migration_whose_source_dies_is_an_outcome_and_no_error(world: World) -> None:
    world.cluster.deaths["kvferry-instance-0-1"].set_result("killed")
    ask = pb.MigrateRequestRequest(name="requests/cmpl-1", destination="instances/instance-1")
    try:
        assert (await world.stub.MigrateRequest(ask)).migration.outcome == pb.MIGRATION_OUTCOME_SOURCE_LOST
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND, "the death was noticed before the command came"


async def test_a_change_of_priority_is_made_by_the_owner_and_answered_with_its_effect(world: World) -> None:
    ask = pb.SetRequestPriorityRequest(name="requests/client-cmpl-1", level="high")
    answer = await world.stub.SetRequestPriority(ask)
    assert world.cluster.priorities == [("kvferry-instance-0-1", "cmpl-1", -10)]
    assert (answer.name, answer.instance) == ("requests/cmpl-1", "instances/instance-0")
    assert (answer.previous_priority, answer.priority, answer.status) == (0, -10, "running")
    assert answer.change == "normal (0) -> high (-10)" and answer.effect
    listed = await world.stub.ListRequests(pb.ListRequestsRequest())
    assert [item.priority for item in listed.requests] == [-10, 0]


async def test_a_change_of_priority_follows_a_request_that_has_just_been_handed_over(world: World) -> None:
    move = pb.MigrateRequestRequest(name="requests/cmpl-1", destination="instances/instance-1")
    await world.stub.MigrateRequest(move)
    world.cluster.priority_answers.append(PriorityAnswer(PriorityOutcome.NOT_HERE, reason="gone"))
    answer = await world.stub.SetRequestPriority(pb.SetRequestPriorityRequest(name="requests/cmpl-1", level="-5"))
    assert answer.instance == "instances/instance-1"
    assert [actor for actor, *_ in world.cluster.priorities] == ["kvferry-instance-0-1", "kvferry-instance-1-1"]


@pytest.mark.parametrize(
    ("name", "level", "given", "code"),
    [
        ("requests/x", "high", None, grpc.StatusCode.NOT_FOUND),
        ("requests/cmpl", "high", None, grpc.StatusCode.INVALID_ARGUMENT),
        ("requests/", "high", None, grpc.StatusCode.INVALID_ARGUMENT),
        ("requests/cmpl-1", "urgent", None, grpc.StatusCode.INVALID_ARGUMENT),
        ("requests/cmpl-1", "", None, grpc.StatusCode.INVALID_ARGUMENT),
        ("requests/cmpl-1", "high", PriorityOutcome.NOT_HERE, grpc.StatusCode.NOT_FOUND),
        ("requests/cmpl-1", "high", PriorityOutcome.UNSUPPORTED, grpc.StatusCode.FAILED_PRECONDITION),
        ("requests/cmpl-1", "high", PriorityOutcome.ON_THE_MOVE, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_each_refusal_to_change_a_priority_has_its_status_code(
    world: World, name: str, level: str, given: PriorityOutcome | None, code: grpc.StatusCode
) -> None:
    if given is not None:
        world.cluster.priority_answers.append(PriorityAnswer(given, reason="because"))
    call = world.stub.SetRequestPriority(pb.SetRequestPriorityRequest(name=name, level=level))
    found, details = await status_of(call)
    assert found is code and details


async def test_an_instance_that_does_not_answer_is_unavailable_and_one_that_died_is_aborted(world: World) -> None:
    ask = pb.SetRequestPriorityRequest(name="requests/cmpl-1", level="high")
    world.cluster.failures_left["kvferry-instance-0-1"] = 1
    code, details = await status_of(world.stub.SetRequestPriority(ask))
    assert code is grpc.StatusCode.UNAVAILABLE and "setting it again is safe" in details
    assert (await world.stub.SetRequestPriority(ask)).priority == -10
    world.cluster.deaths["kvferry-instance-0-1"].set_result("killed")
    code, _ = await status_of(world.stub.SetRequestPriority(ask))
    assert code in (grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND), "or the death was noticed before"


async def test_a_drain_streams_its_progress_until_the_instance_is_empty(world: World) -> None:
    call = world.stub.DrainInstance(pb.DrainInstanceRequest(name="instances/instance-0", wait=True))
    progress: list[pb.DrainInstanceResponse] = []
    async for message in call:
        if not progress:
            world.reports("instance-0", step=2, state="draining")
        progress.append(message)
    assert progress[0].num_requests == 2 and not progress[0].done
    assert progress[-1].done and progress[-1].num_requests == 0 and progress[-1].instance.drained
    assert ("kvferry-instance-0-1", True) in world.cluster.draining
    assert {name for _, name, *_ in world.cluster.migrated} <= {"cmpl-1", "cmpl-2"}
    undrained = await world.stub.UndrainInstance(pb.UndrainInstanceRequest(name="instances/instance-0"))
    assert undrained.instance.state == pb.INSTANCE_STATE_SERVING


async def test_gateways_are_told_when_an_instance_drains_and_when_it_dies(world: World) -> None:
    async with asyncio.timeout(5):
        while len(world.cluster.members.get(GATEWAY, ())) != 2:
            world.cluster.told.clear()
            await world.cluster.told.wait()
        world.cluster.deaths["kvferry-instance-0-1"].set_result("killed")
        while len(world.cluster.members[GATEWAY]) != 1:
            world.cluster.told.clear()
            await world.cluster.told.wait()
    assert world.cluster.fenced == [("kvferry-instance-1-1", "instance-0", 1)]
    listed = await world.stub.ListInstances(pb.ListInstancesRequest())
    assert listed.instances[0].state == pb.INSTANCE_STATE_STOPPED and listed.instances[0].reason == "killed"


async def test_each_refusal_has_its_status_code(world: World) -> None:
    stub, code = world.stub, grpc.StatusCode
    move = pb.MigrateRequestRequest
    cases: list[tuple[Awaitable[object], grpc.StatusCode]] = [
        (stub.MigrateRequest(move(name="requests/x", destination="instances/instance-1")), code.NOT_FOUND),
        (stub.MigrateRequest(move(name="requests/cmpl-1", destination="instances/nope")), code.NOT_FOUND),
        (stub.MigrateRequest(move(name="requests/cmpl", destination="instances/instance-1")), code.INVALID_ARGUMENT),
        (stub.MigrateRequest(move(name="", destination="instances/instance-1")), code.INVALID_ARGUMENT),
        (stub.MigrateRequest(move(name="requests/cmpl-1", destination="")), code.INVALID_ARGUMENT),
        (
            stub.MigrateRequest(move(name="requests/cmpl-1", destination="instances/instance-0")),
            code.FAILED_PRECONDITION,
        ),
        (stub.UndrainInstance(pb.UndrainInstanceRequest(name="instances/instance-0")), code.FAILED_PRECONDITION),
        (stub.ListRequests(pb.ListRequestsRequest(page_size=-1)), code.INVALID_ARGUMENT),
        (stub.ListRequests(pb.ListRequestsRequest(page_token="x")), code.INVALID_ARGUMENT),
        (stub.ListRequests(pb.ListRequestsRequest(parent="nodes/x")), code.INVALID_ARGUMENT),
    ]
    for call, expected in cases:
        assert (await status_of(call))[0] is expected
    drain = stub.DrainInstance(pb.DrainInstanceRequest(name="instances/nope", wait=True))
    assert (await status_of(drain.read()))[0] is code.NOT_FOUND


async def test_a_drain_that_the_instance_does_not_carry_out_is_unavailable(world: World) -> None:
    world.cluster.broken.add("kvferry-instance-0-1")
    call = world.stub.DrainInstance(pb.DrainInstanceRequest(name="instances/instance-0", wait=True))
    assert (await status_of(call.read()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_caller_that_goes_away_is_forgotten(world: World) -> None:
    call = world.stub.DrainInstance(pb.DrainInstanceRequest(name="instances/instance-0", wait=True))
    await call.read()
    call.cancel()
    again = world.stub.DrainInstance(pb.DrainInstanceRequest(name="instances/instance-0", wait=True), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in again:
            pass
    world.reports("instance-0", step=2, state="draining")  # would answer a token nobody holds
    assert (await world.stub.ListInstances(pb.ListInstancesRequest())).instances[0].drained


async def test_messages_are_bounded(world: World) -> None:
    call = world.stub.UndrainInstance(pb.UndrainInstanceRequest(name="x" * (MAX_MESSAGE_BYTES + 1)))
    assert (await status_of(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_and_reflection_answer_a_client_that_has_no_proto(world: World) -> None:
    health = health_pb2_grpc.HealthStub(world.channel)
    for service in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    reflection = reflection_pb2_grpc.ServerReflectionStub(world.channel)
    asks = [reflection_pb2.ServerReflectionRequest(list_services="")]
    asks.append(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    answers = [answer async for answer in reflection.ServerReflectionInfo(iter(asks))]
    assert SERVICE in [item.name for item in answers[0].list_services_response.service]
    assert b"MigrateRequest" in b"".join(answers[1].file_descriptor_response.file_descriptor_proto)


async def test_a_taken_admin_port_is_one_line(world: World) -> None:
    port = int(world.address.rpartition(":")[2])
    with pytest.raises(StartUpError, match=f"the admin port {port} on 127.0.0.1 is taken"):
        await AdminServer(world.loop).start("127.0.0.1", port)


async def test_the_client_of_the_command_line_speaks_it(world: World) -> None:
    def use() -> None:
        with AdminClient(world.address) as client:
            assert len(client.instances().instances) == 2 and len(client.requests()) == 2
            assert client.migrate("cmpl-1", "instance-1").outcome == pb.MIGRATION_OUTCOME_COMMITTED
            assert len(client.migrations()) == 1
            assert client.set_priority("cmpl-2", "-10").change == "normal (0) -> high (-10)"
            with pytest.raises(Declined, match="'urgent' is no priority"):
                client.set_priority("cmpl-2", "urgent")
            world.cluster.failures_left["kvferry-instance-0-1"] = 1
            with pytest.raises(Declined, match="again is safe"):
                client.set_priority("cmpl-2", "high")
            with pytest.raises(Declined, match="no running request"):
                client.migrate("nobody", "instance-1")
            assert [message.done for message in client.drain("instance-0", wait=False)] == [False]
            assert client.undrain("instance-0").name == "instances/instance-0"
        with AdminClient("127.0.0.1:1") as nobody, pytest.raises(Unreachable, match="nothing answers"):
            nobody.instances()

    await asyncio.to_thread(use)
