"""What does an operator's word do to requests and moves that run? Admin API, loop, agents and gateway, all real, in one
process (fake engines, no Ray): the client's stream ends with an error, and nothing is left anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import openai
import pytest
import pytest_asyncio

from instance.fake_model import FakeRequest
from instance.mailbox import Mailbox
from instance.spec import MigrationSummary
from instance.types import PriorityAnswer
from migration.types import Epoch, Incarnation, InstanceId
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.server import AdminServer
from orchestrator.core import Orchestrator
from orchestrator.effects import UpdateMembers, UpdatePriorities
from orchestrator.events import GatewayStarted, InstanceStarted
from orchestrator.gateway.priorities import PriorityRules
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig
from orchestrator.gateway.spec import Member as GatewayMember
from orchestrator.runtime.loop import LoopParams, OrchestratorLoop
from orchestrator.state import CoreParams
from tests.support.fleet import TOKEN, Fleet, expected_output, fleet_of
from tests.support.scripted_instance import encode_for_script
from tests.support.word_model import make_word_model, words

PROMPT = tuple(range(100, 160))
NUM_TOKENS = 440
"""As many as the model's 512 allow: some seconds."""
MODEL = "words"
SPENDER = "spends-the-budget-of-"
SLOWLY = 10.0
"""Bytes a second. The first copy in a direction goes at once; the one behind it waits for half a minute."""


class HereFleet:
    """The `Fleet` port over services of this process; an actor is named as its instance or gateway."""

    def __init__(self, fleet: Fleet, gateway: GatewayService) -> None:
        self._fleet, self._gateway = fleet, gateway

    async def migrate(
        self, actor_name: str, request_id: str, destination: Incarnation, mode: str, timeout_s: float
    ) -> MigrationSummary:
        return await self._fleet.services[actor_name].migrate(request_id, destination, mode)

    async def cancel_request(self, actor_name: str, request_id: str, timeout_s: float) -> bool:
        return self._gateway.cancel_request(request_id)

    async def cancel_migration(self, actor_name: str, request_id: str, reason: str, timeout_s: float) -> bool:
        return self._fleet.services[actor_name].cancel_migration(request_id, reason)

    async def set_priority(self, actor_name: str, request_id: str, priority: int, timeout_s: float) -> PriorityAnswer:
        return await self._fleet.services[actor_name].set_priority(request_id, priority)

    async def set_draining(self, actor_name: str, draining: bool, timeout_s: float) -> None:
        service = self._fleet.services[actor_name]
        service.drain() if draining else service.undrain()

    async def member_lost(self, actor_name: str, instance: InstanceId, epoch: Epoch, timeout_s: float) -> None:
        self._fleet.services[actor_name].member_lost(instance, epoch)

    async def set_members(self, actor_name: str, told: UpdateMembers, timeout_s: float) -> None:
        members = (one.incarnation for one in told.members)
        self._gateway.set_members(GatewayMember(one.instance, one.epoch, one.address) for one in members)

    async def set_priorities(self, actor_name: str, told: UpdatePriorities, timeout_s: float) -> None:
        self._gateway.set_priorities(PriorityRules(told.levels, dict(told.key_classes)))

    async def wait_dead(self, actor_name: str) -> str:
        await asyncio.Event().wait()
        return "never"


class House:
    """Two instances, a gateway, the orchestrator's loop and its admin API."""

    def __init__(self, fleet: Fleet, gateway: GatewayService, api: openai.AsyncOpenAI, stub: Any) -> None:
        self.fleet, self.gateway, self.api = fleet, gateway, api
        self.stub: pb_grpc.AdminServiceAsyncStub = stub

    async def stream(self, num_tokens: int, **more: Any) -> Any:
        return await self.api.completions.create(
            model=MODEL, prompt=words(*PROMPT), max_tokens=num_tokens, stream=True, **more
        )

    async def listed(self, num_requests: int = 1) -> list[pb.Request]:
        """Once so many requests are reported to run."""
        async with asyncio.timeout(10):
            while True:
                running = (await self.stub.ListRequests(pb.ListRequestsRequest(status="running"))).requests
                # Reports are some 250 ms old: what spent the budgets may still be in them.
                found = [request for request in running if not request.name.startswith(f"requests/{SPENDER}")]
                if len(found) == num_requests:
                    return found

    async def spend_budgets(self) -> None:
        """One move in each direction: the next one stays in its first copy."""
        for number, (source, destination) in enumerate((("i0", "i1"), ("i1", "i0")), start=1):
            name = f"{SPENDER}{source}"
            prompt = tuple(range(1000 * number, 1000 * number + 60))  # what is cached there already is not copied
            await self.fleet.run(source, name, FakeRequest(prompt, 100), 3)
            moved = await self.fleet.services[source].migrate(name, self.fleet.members[destination])
            assert moved.outcome == "committed", moved
            await self.fleet.finish(name)

    async def move(self, request: pb.Request) -> tuple[asyncio.Task[pb.MigrateRequestResponse], pb.Migration]:
        """Begin to move it to the other instance; returns when it is on the move."""
        destination = "instances/i1" if request.instance == "instances/i0" else "instances/i0"
        ask = pb.MigrateRequestRequest(name=request.name, destination=destination)
        moving = asyncio.ensure_future(self.stub.MigrateRequest(ask))
        asked = pb.ListMigrationsRequest(outcomes=[pb.MIGRATION_OUTCOME_UNSPECIFIED])
        async with asyncio.timeout(10):
            while True:
                found = (await self.stub.ListMigrations(asked)).migrations
                if found:
                    return moving, found[0]

    async def is_at_rest(self) -> None:
        """Nothing is left of any request, at the gateway and at the instances."""
        async with asyncio.timeout(10):
            while not await self._is_empty():  # noqa: ASYNC110 - it waits for sockets, which set no event of ours
                await asyncio.sleep(0.01)
        await self.fleet.check_rest()

    async def _is_empty(self) -> bool:
        loads = [await service.loop.call(lambda engine: engine.load()) for service in self.fleet.services.values()]
        used = sum(load.num_running + load.num_waiting + load.reserved_blocks for load in loads)
        return used + self.gateway.loop.router.num_requests == 0


async def text_of(stream: Any) -> str:
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_model(tmp_path_factory.mktemp("model") / "words")


@asynccontextmanager
async def orchestrated(fleet: Fleet, gateway: GatewayService, url: str) -> AsyncIterator[str]:
    """The admin address of a loop over them."""
    mailbox = Mailbox(TOKEN)
    await mailbox.open()
    core = Orchestrator(CoreParams(is_rebalancing=False))
    loop = OrchestratorLoop(core, HereFleet(fleet, gateway), mailbox, LoopParams(tick_s=0.05))
    running = asyncio.create_task(loop.run())
    await asyncio.sleep(0)
    server = AdminServer(loop)
    address = await server.start("127.0.0.1", 0)
    loop.add(GatewayStarted("gateway-0", "gateway-0", url))
    for name, member in fleet.members.items():
        started = fleet.started[name]
        loop.add(InstanceStarted(member, name, MODEL, started.block_size, started.total_blocks))
    await loop.until_gateways_know()
    try:
        yield address
    finally:
        await server.stop(0)
        loop.stop()
        await running
        mailbox.close()
        core.check_integrity()


@pytest_asyncio.fixture
async def house(model: Path) -> AsyncIterator[House]:
    async with fleet_of(2, "--step-time-ms", "15", copy_bytes_per_s=SLOWLY) as fleet:
        gateway = GatewayService(encode=encode_for_script)
        started = await gateway.start(GatewayConfig((str(model), "--served-model-name", MODEL), port=0, token=TOKEN))
        api = openai.AsyncOpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=2, timeout=30)
        try:
            async with (
                orchestrated(fleet, gateway, started.url) as address,
                grpc.aio.insecure_channel(address) as channel,
            ):
                router = gateway.loop.router
                async with asyncio.timeout(10):
                    while len(router.view(gateway.loop.now_s()).instances) < 2:  # noqa: ASYNC110 - sockets
                        await asyncio.sleep(0.005)
                yield House(fleet, gateway, api, pb_grpc.AdminServiceStub(channel))
        finally:
            await api.close()
            await gateway.stop()


async def test_a_stream_that_the_operator_ends_says_so_and_leaves_nothing(house: House) -> None:
    stream = await house.stream(NUM_TOKENS, extra_headers={"x-request-id": "victim"})
    reading = asyncio.create_task(text_of(stream))
    (request,) = await house.listed()
    ended = await house.stub.CancelRequest(pb.CancelRequestRequest(name=request.name))
    assert ended.request.name == request.name
    with pytest.raises(openai.APIError, match="the operator of this service ended the request"):
        await reading
    await house.is_at_rest()


async def test_an_answer_that_the_operator_ends_is_gone_and_not_tried_again(house: House) -> None:
    asking = asyncio.create_task(
        house.api.completions.create(model=MODEL, prompt=words(*PROMPT), max_tokens=NUM_TOKENS, n=2)
    )
    requests = await house.listed(2)
    await house.stub.CancelRequest(pb.CancelRequestRequest(name=requests[0].name))
    with pytest.raises(openai.APIStatusError) as caught:
        await asking
    assert caught.value.status_code == 410, "client libraries do not come back after it"
    await house.is_at_rest()


async def test_a_request_can_be_ended_while_it_moves(house: House) -> None:
    await house.spend_budgets()
    reading = asyncio.create_task(text_of(await house.stream(NUM_TOKENS)))
    (request,) = await house.listed()
    moving, _ = await house.move(request)
    await house.stub.CancelRequest(pb.CancelRequestRequest(name=request.name))
    with pytest.raises(openai.APIError, match="the operator"):
        await reading
    assert (await moving).migration.outcome == pb.MIGRATION_OUTCOME_ABORTED_BY_CLIENT
    await house.is_at_rest()


async def test_a_request_whose_gateway_has_gone_is_ended_at_the_instances(house: House) -> None:
    await house.fleet.run("i0", "orphan", FakeRequest(PROMPT, NUM_TOKENS), 3)
    await house.listed()
    ended = await house.stub.CancelRequest(pb.CancelRequestRequest(name="requests/orphan"))
    assert ended.request.instance == "instances/i0"
    await house.is_at_rest()
    assert house.fleet.gateway.num_tokens("orphan") < NUM_TOKENS


async def test_a_migration_that_is_called_off_leaves_its_request_where_it_was_and_whole(house: House) -> None:
    await house.spend_budgets()
    reading = asyncio.create_task(text_of(await house.stream(NUM_TOKENS)))
    (request,) = await house.listed()
    moving, migration = await house.move(request)
    called_off = (await house.stub.CancelMigration(pb.CancelMigrationRequest(name=migration.name))).migration
    assert called_off.outcome == pb.MIGRATION_OUTCOME_REFUSED and "withdrawn" in called_off.reason
    assert (await moving).migration.outcome == pb.MIGRATION_OUTCOME_REFUSED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.stub.CancelMigration(pb.CancelMigrationRequest(name=migration.name))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await house.stub.GetRequest(pb.GetRequestRequest(name=request.name))).request.instance == request.instance
    assert await reading == " " + words(*expected_output(FakeRequest(PROMPT, NUM_TOKENS)))
    await house.is_at_rest()
