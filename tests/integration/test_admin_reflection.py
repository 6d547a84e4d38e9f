"""Does a client that has no .proto get what it asks for, and the right status code when it does not?

Messages are built from the descriptors that the server's reflection gives, as grpcurl does; errors are read with
grpc_status, as any gRPC library can.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.access import ServerAccess
from orchestrator.admin.failures import DETAILS, DOMAIN, MAX_TEXT_BYTES
from orchestrator.admin.server import MAX_MESSAGE_BYTES, SERVICE
from tests.support.admin_world import Terms, World, admin_world
from tests.support.reflected import ReflectedService
from tests.support.reports import request_load

TOKEN = "a-token-of-24-characters"
CODE = grpc.StatusCode
MUTATING = (
    "MigrateRequest",
    "CancelRequest",
    "CancelMigration",
    "SetRequestPriority",
    "DrainInstance",
    "UndrainInstance",
    "UpdatePolicy",
)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with admin_world() as made:
        yield made


@pytest_asyncio.fixture
async def admin(world: World) -> ReflectedService:
    return await ReflectedService.of(world.channel, SERVICE)


class Refusal:
    """What an error says, to people and to programs."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.text = error.code(), error.details() or ""
        self.reason, self.fields, self.retry_s = "", list[str](), None
        encoded = dict(error.trailing_metadata() or ()).get(DETAILS)
        status = status_pb2.Status.FromString(encoded) if encoded else status_pb2.Status()
        if encoded:
            assert (status.code, status.message) == (self.code.value[0], self.text)
        for packed in status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if packed.Unpack(info):
                assert info.domain == DOMAIN
                self.reason = info.reason
            elif packed.Unpack(bad):
                self.fields = [row.field for row in bad.field_violations]
            elif packed.Unpack(retry):
                self.retry_s = retry.retry_delay.seconds


async def refusal(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Refusal(caught.value)


async def everything(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message async for message in stream]


# ---------------------------------------------------------------------- status codes
@pytest.mark.parametrize(
    ("method", "values", "code", "reason"),
    [
        ("GetInstance", {"name": "instances/nope"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("GetInstance", {"name": "instances/"}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("GetRequest", {"name": "requests/nope"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("GetMigration", {"name": "migrations/7"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("GetMigration", {"name": "migrations/x"}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("ListInstances", {"page_size": -1}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("ListInstances", {"states": [99]}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("ListRequests", {"status": "asleep"}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("ListMigrations", {"page_token": "?"}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        ("UndrainInstance", {"name": "instances/nope"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("UndrainInstance", {"name": "instances/instance-0"}, CODE.FAILED_PRECONDITION, "PRECONDITION"),
        ("UndrainInstance", {"name": "instances/instance-0", "epoch": 2}, CODE.ABORTED, "STALE_EPOCH"),
        ("UndrainInstance", {"name": "instances/instance-0", "epoch": 0}, CODE.ABORTED, "STALE_EPOCH"),
        (
            "MigrateRequest",
            {"name": "requests/cmpl-1", "destination": "instances/instance-1", "destination_epoch": 7},
            CODE.ABORTED,
            "STALE_EPOCH",
        ),
        (
            "MigrateRequest",
            {"name": "requests/cmpl-1", "destination": "instances/instance-1", "mode": 77},
            CODE.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        ("CancelRequest", {"name": "requests/nope"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("CancelRequest", {"name": "requests/cmpl"}, CODE.INVALID_ARGUMENT, "AMBIGUOUS"),
        ("CancelMigration", {"name": "migrations/7"}, CODE.NOT_FOUND, "NOT_FOUND"),
        ("UpdatePolicy", {"policy": {"etag": "0123"}}, CODE.ABORTED, "OVERTAKEN"),
        ("UpdatePolicy", {"policy": {"name": "another"}}, CODE.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            "UndrainInstance",
            {"name": "instances/instance-0", "request_id": "a b"},
            CODE.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
    ],
)
async def test_each_refusal_has_its_code_and_its_reason(
    admin: ReflectedService, method: str, values: dict[str, Any], code: grpc.StatusCode, reason: str
) -> None:
    refused = await refusal(admin.call(method, values))
    assert (refused.code, refused.reason) == (code, reason)
    assert refused.text and "\n" not in refused.text
    assert bool(refused.fields) == (code is CODE.INVALID_ARGUMENT)


async def test_an_unknown_method_is_unimplemented(world: World) -> None:
    call: Any = world.channel.unary_unary(f"/{SERVICE}/NoSuchMethod")
    assert (await refusal(call(b""))).code is CODE.UNIMPLEMENTED


async def test_bytes_that_are_no_message_are_an_invalid_argument(world: World) -> None:
    for method in ("GetInstance", "UpdatePolicy"):
        call: Any = world.channel.unary_unary(f"/{SERVICE}/{method}")
        refused = await refusal(call(b"\x0a\xff\xff\xff"))
        assert (refused.code, refused.reason) == (CODE.INVALID_ARGUMENT, "UNREADABLE")


async def test_an_oversized_message_is_resource_exhausted(admin: ReflectedService) -> None:
    refused = await refusal(admin.call("GetInstance", {"name": "x" * (MAX_MESSAGE_BYTES + 1)}))
    assert refused.code is CODE.RESOURCE_EXHAUSTED


async def test_what_a_caller_sent_comes_back_cut(admin: ReflectedService) -> None:
    refused = await refusal(admin.call("GetInstance", {"name": "instances/" + "\N{HOCHO}\n" * 100_000}))
    assert refused.code is CODE.INVALID_ARGUMENT and len(refused.text.encode()) <= MAX_TEXT_BYTES


async def test_a_call_whose_deadline_has_passed_is_not_carried_out(world: World, admin: ReflectedService) -> None:
    values = {"name": "requests/cmpl-1", "destination": "instances/instance-1"}
    refused = await refusal(admin.call("MigrateRequest", values, timeout_s=-1))
    assert refused.code is CODE.DEADLINE_EXCEEDED
    await admin.call("GetPolicy")  # the server has had every chance to do it by now
    assert world.cluster.migrated == []


async def test_a_deadline_that_passes_ends_the_call_and_what_was_begun_goes_on(
    world: World, admin: ReflectedService
) -> None:
    world.cluster.may_end.clear()
    values = {"name": "requests/cmpl-1", "destination": "instances/instance-1"}
    assert (await refusal(admin.call("MigrateRequest", values, timeout_s=1.5))).code is CODE.DEADLINE_EXCEEDED
    listed = await admin.call("ListMigrations", {"outcomes": ["MIGRATION_OUTCOME_UNSPECIFIED"]})
    assert [item["request"] for item in listed["migrations"]] == ["requests/cmpl-1"]


async def test_what_may_work_later_says_when_to_come_back(world: World, admin: ReflectedService) -> None:
    world.cluster.may_end.clear()
    for request_id in ("cmpl-1", "cmpl-2"):
        values = {"name": f"requests/{request_id}", "destination": "instances/instance-1"}
        assert (await refusal(admin.call("MigrateRequest", values, timeout_s=1.5))).code is CODE.DEADLINE_EXCEEDED
    world.runs("instance-0", *map(request_load, ("cmpl-1", "cmpl-2", "cmpl-3")))
    third = {"name": "requests/cmpl-3", "destination": "instances/instance-1"}
    refused = await refusal(admin.call("MigrateRequest", third))
    assert (refused.code, refused.reason, refused.retry_s) == (CODE.RESOURCE_EXHAUSTED, "EXHAUSTED", 1)


# ---------------------------------------------------------------------- token
@pytest.mark.parametrize(
    "given",
    [
        (),
        (("authorization", "Bearer another-token-of-24-char"),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", TOKEN),),
        (("authorization", f"Bearer {TOKEN}x"),),
        (("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")),
    ],
)
async def test_a_wrong_token_is_unauthenticated(given: tuple[tuple[str, str], ...]) -> None:
    async with admin_world(Terms(access=ServerAccess(token=TOKEN))) as world:
        right = await ReflectedService.of(world.channel, SERVICE, (("authorization", f"bearer {TOKEN}"),))
        assert (await right.call("GetPolicy"))["policy"]["name"] == "policy"
        wrong = ReflectedService(world.channel, right.descriptor, given)
        for method in ("GetPolicy", *MUTATING[:3]):
            refused = await refusal(wrong.call(method, {}))
            assert (refused.code, refused.reason) == (CODE.UNAUTHENTICATED, "BAD_TOKEN")
            assert TOKEN not in refused.text
        for method in ("Watch", "DrainInstance"):
            assert (await refusal(everything(wrong.stream(method, {})))).code is CODE.UNAUTHENTICATED
        assert (await refusal(ReflectedService.of(world.channel, SERVICE, given))).code is CODE.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(world.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, "probes carry no token"


# ---------------------------------------------------------------------- repetition
async def test_every_method_that_changes_something_takes_a_request_id(admin: ReflectedService) -> None:
    assert (
        tuple(method.name for method in admin.descriptor.methods if "request_id" in method.input_type.fields_by_name)
        == MUTATING
    )


async def test_the_same_command_again_gets_the_same_answer_and_is_done_once(
    world: World, admin: ReflectedService
) -> None:
    values = {"name": "requests/cmpl-1", "destination": "instances/instance-1", "request_id": "id-1"}
    first = await admin.call("MigrateRequest", values)
    assert await admin.call("MigrateRequest", values) == first
    assert len(world.cluster.migrated) == 1
    other = await refusal(admin.call("MigrateRequest", {**values, "name": "requests/cmpl-2"}))
    assert (other.code, other.reason) == (CODE.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    other = await refusal(admin.call("UndrainInstance", {"name": "instances/instance-0", "request_id": "id-1"}))
    assert other.code is CODE.ALREADY_EXISTS
    assert len(world.cluster.migrated) == 1


async def test_a_repetition_waits_for_the_first_whose_caller_has_left(world: World, admin: ReflectedService) -> None:
    world.cluster.may_end.clear()
    values = {"name": "requests/cmpl-1", "destination": "instances/instance-1", "request_id": "id-1"}
    assert (await refusal(admin.call("MigrateRequest", values, timeout_s=1.5))).code is CODE.DEADLINE_EXCEEDED
    again = asyncio.create_task(admin.call("MigrateRequest", values))
    await admin.call("GetPolicy")
    world.cluster.may_end.set()
    assert (await again)["migration"]["outcome"] == "MIGRATION_OUTCOME_COMMITTED"
    assert len(world.cluster.migrated) == 1


async def test_a_command_that_failed_is_tried_anew(world: World, admin: ReflectedService) -> None:
    values = {"name": "requests/cmpl-9", "destination": "instances/instance-1", "request_id": "id-1"}
    assert (await refusal(admin.call("MigrateRequest", values))).code is CODE.NOT_FOUND
    world.runs("instance-0", request_load("cmpl-9"))
    assert (await admin.call("MigrateRequest", values))["migration"]["request"] == "requests/cmpl-9"


async def test_a_drain_given_again_is_the_same_drain(world: World, admin: ReflectedService) -> None:
    values = {"name": "instances/instance-0", "request_id": "drain-1"}
    for _ in range(2):
        messages = await everything(admin.stream("DrainInstance", values))
        assert messages[-1]["instance"]["state"] == "INSTANCE_STATE_DRAINING"
    assert world.cluster.draining == [("kvferry-instance-0-1", True)]
    without_id = await refusal(everything(admin.stream("DrainInstance", {"name": "instances/instance-0"})))
    assert without_id.code is CODE.FAILED_PRECONDITION
    last = await refusal(everything(admin.stream("DrainInstance", {"name": "instances/instance-1", "epoch": 1})))
    assert last.code is CODE.FAILED_PRECONDITION
    stale = await refusal(everything(admin.stream("DrainInstance", {"name": "instances/instance-1", "epoch": 4})))
    assert (stale.code, stale.reason) == (CODE.ABORTED, "STALE_EPOCH")


# ---------------------------------------------------------------------- reading
async def test_what_is_listed_can_be_got(world: World, admin: ReflectedService) -> None:
    await admin.call("MigrateRequest", {"name": "requests/cmpl-1", "destination": "instances/instance-1"})
    listed = await admin.call("ListInstances")
    for item in listed["instances"]:
        assert (await admin.call("GetInstance", {"name": item["name"]}))["instance"]["epoch"] == item["epoch"]
    for item in (await admin.call("ListRequests"))["requests"]:
        got = (await admin.call("GetRequest", {"name": item["name"]}))["request"]
        assert got["external_id"] == item["external_id"]
        by_client = await admin.call("GetRequest", {"name": f"requests/{item['external_id']}"})
        assert by_client["request"]["name"] == item["name"]
    for item in (await admin.call("ListMigrations"))["migrations"]:
        assert (await admin.call("GetMigration", {"name": item["name"]}))["migration"]["request"] == item["request"]


async def all_pages(
    admin: ReflectedService, method: str, field: str, asked: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    pages, token = [], ""
    while True:
        page = await admin.call(method, {**asked, "page_token": token})
        pages.append(page.get(field, []))
        token = page.get("next_page_token", "")
        if not token:
            return pages


async def test_pages_together_are_the_whole_and_their_tokens_fit_no_other_question(
    world: World, admin: ReflectedService
) -> None:
    requests = [request_load(f"cmpl-{number}", status="waiting" if number % 2 else "running") for number in range(7)]
    world.runs("instance-0", *requests)
    for request in requests[:5]:
        values = {"name": f"requests/{request.request_id}", "destination": "instances/instance-1"}
        await admin.call("MigrateRequest", values)
    for method, field, asked, sizes in (
        ("ListRequests", "requests", {"page_size": 3}, [3, 3, 1]),
        ("ListRequests", "requests", {"page_size": 2, "status": "waiting"}, [2, 1]),
        ("ListRequests", "requests", {"page_size": 7}, [7]),
        ("ListMigrations", "migrations", {"page_size": 2}, [2, 2, 1]),
        ("ListMigrations", "migrations", {"page_size": 2, "instance": "instances/instance-1"}, [2, 2, 1]),
        ("ListMigrations", "migrations", {"request": "requests/cmpl-3"}, [1]),
        ("ListInstances", "instances", {"page_size": 1}, [1, 1]),
        ("ListInstances", "instances", {"states": ["INSTANCE_STATE_DRAINING"]}, [0]),
    ):
        pages = await all_pages(admin, method, field, asked)
        assert [len(page) for page in pages] == sizes, (method, asked)
        names = [item["name"] for page in pages for item in page]
        whole = await admin.call(method, {name: value for name, value in asked.items() if name != "page_size"})
        assert names == [item["name"] for item in whole.get(field, [])]
    token = (await admin.call("ListRequests", {"page_size": 2}))["next_page_token"]
    later = await admin.call("ListRequests", {"page_size": 3, "page_token": token})
    assert len(later["requests"]) == 3, "the size may differ from page to page"
    damaged = token[:-2] + ("A" if token[-2] != "A" else "B") + token[-1]
    for method, values in (
        ("ListRequests", {"page_token": token, "status": "waiting"}),
        ("ListRequests", {"page_token": damaged}),
        ("ListRequests", {"page_token": "x" * 5000}),
        ("ListRequests", {"page_token": "\N{HOCHO}"}),
        ("ListMigrations", {"page_token": token}),
    ):
        refused = await refusal(admin.call(method, values))
        assert (refused.code, refused.fields) == (CODE.INVALID_ARGUMENT, ["page_token"])


# ---------------------------------------------------------------------- ending and calling off
async def test_a_request_is_ended_where_its_stream_is(world: World, admin: ReflectedService) -> None:
    dry = await admin.call("CancelRequest", {"name": "requests/cmpl-1", "validate_only": True})
    assert dry["request"]["instance"] == "instances/instance-0" and world.cluster.cancelled == []
    ended = await admin.call("CancelRequest", {"name": "requests/client-cmpl-1", "request_id": "id-1"})
    assert ended["request"]["name"] == "requests/cmpl-1"
    assert await admin.call("CancelRequest", {"name": "requests/client-cmpl-1", "request_id": "id-1"}) == ended
    assert world.cluster.cancelled == [("kvferry-gateway-0", "cmpl-1")]
    world.cluster.broken.add("kvferry-gateway-0")
    refused = await refusal(admin.call("CancelRequest", {"name": "requests/cmpl-2"}))
    assert (refused.code, refused.reason, refused.retry_s) == (CODE.UNAVAILABLE, "UNAVAILABLE", 1)


async def test_a_migration_in_flight_is_called_off_and_one_that_ended_is_not(
    world: World, admin: ReflectedService
) -> None:
    world.cluster.may_end.clear()
    values = {"name": "requests/cmpl-1", "destination": "instances/instance-1"}
    moving = asyncio.create_task(admin.call("MigrateRequest", values))
    async for message in admin.stream("Watch", {"topics": ["WATCH_TOPIC_MIGRATIONS"]}):
        if message.get("changes"):
            break
    called_off = await admin.call("CancelMigration", {"name": "migrations/1"})
    assert called_off["migration"]["outcome"] == "MIGRATION_OUTCOME_REFUSED"
    assert (await moving)["migration"]["outcome"] == "MIGRATION_OUTCOME_REFUSED"
    assert world.cluster.withdrawn == [("kvferry-instance-0-1", "cmpl-1")]
    again = await refusal(admin.call("CancelMigration", {"name": "migrations/1"}))
    assert again.code is CODE.FAILED_PRECONDITION and "ended already" in again.text


# ---------------------------------------------------------------------- policy
async def test_the_policy_changes_by_field_mask_all_or_nothing(world: World, admin: ReflectedService) -> None:
    before = (await admin.call("GetPolicy"))["policy"]
    asked = {
        "policy": {"rebalance": {"threshold_steps": 99, "rest_s": 3}, "max_migrations_in": 1, "etag": before["etag"]},
        "update_mask": "rebalance.thresholdSteps,rebalance.enabled,maxMigrationsIn",
    }
    dry = await admin.call("UpdatePolicy", {**asked, "validate_only": True, "request_id": "id-1"})
    assert (await admin.call("GetPolicy"))["policy"] == before, "it was only checked"
    done = await admin.call("UpdatePolicy", {**asked, "request_id": "id-1"})
    assert done == dry
    assert done["changes"] == [
        {"field": "rebalance.threshold_steps", "before": "512", "after": "99"},
        {"field": "max_migrations_in", "before": "2", "after": "1"},
    ]
    after = (await admin.call("GetPolicy"))["policy"]
    assert after == done["policy"] and after["rebalance"]["rest_s"] == 1, "what the mask does not name stays"
    assert (await refusal(admin.call("UpdatePolicy", asked))).code is CODE.ABORTED, "the etag is an old one"
    wrong = {"policy": {"rebalance": {"threshold_steps": -1, "max_moves": 0, "rest_s": 2}, "max_migrations_out": 99}}
    refused = await refusal(admin.call("UpdatePolicy", wrong))
    assert refused.code is CODE.INVALID_ARGUMENT
    assert refused.fields == ["rebalance.threshold_steps", "rebalance.max_moves", "max_migrations_out"]
    assert (await admin.call("GetPolicy"))["policy"] == after
    mask = await refusal(admin.call("UpdatePolicy", {"policy": {}, "update_mask": "rebalance.nope"}))
    assert (mask.code, mask.fields) == (CODE.INVALID_ARGUMENT, ["update_mask"])
    back = await admin.call("UpdatePolicy", {"policy": {}, "update_mask": "*"})
    assert back["policy"] == before
