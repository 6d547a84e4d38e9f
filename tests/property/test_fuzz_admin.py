"""Does any message, sense or nonsense, crash the admin API or make it answer that it is broken?

Over real gRPC, into the real loop and core: random bytes, random messages, damaged messages, messages of other methods.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import priorities_pb2
from tests.support.admin_world import NAMES, World, admin_world

NUM_CALLERS = 16
UNDRAIN_EVERY = 25
CALL_S = 5.0
BROKEN = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})
METHODS: tuple[MethodDescriptor, ...] = (
    *pb.DESCRIPTOR.services_by_name["AdminService"].methods,
    *priorities_pb2.DESCRIPTOR.services_by_name["PriorityService"].methods,
)
TEXTS = (
    *("", "policy", "*", "rebalance", "rebalance.max_moves", "max_migrations_in", "name", "id-1", "id-2"),
    *("instances/instance-0", "instances/instance-1", "instance-1", "instances/", "instances/a/b", "requests/cmpl-1"),
    *("requests/cmpl-2", "cmpl-", "client-cmpl-1", "migrations/1", "migrations/-1", "migrations/99999999999999999999"),
    *("\x00", "\N{HOCHO}" * 500, "a b", "..", "running", "x" * 5000, "\u202e", "MTIz", "%s%n", "\n\r\t"),
)
FITTING = {
    "destination": ("instances/instance-1",),
    "Instance": ("instances/instance-0", "instances/instance-1"),
    "Migration": ("migrations/1", "migrations/2"),
    "Request": ("requests/cmpl-1", "requests/cmpl-2"),
    "Level": ("high", "normal", "low"),
    "key_sha256": ("a" * 64, "B" * 64),
    "level": ("high", "normal", "-3"),
}
"""Names that exist, by what is in the field's or its message's name."""
NUMBERS = (0, 1, -1, 2, 3, 7, 1000, 10_000, 2**31 - 1, -(2**31))
WIDE_NUMBERS = (*NUMBERS, 2**63 - 1, -(2**63))
FLOATS = (0.0, 1.0, -1.0, 0.5, 512.0, 1e300, -1e300, float("nan"), float("inf"), float("-inf"), 5e-324)


def value_of(field: FieldDescriptor, rng: random.Random, depth: int) -> Any:
    """Something that the field can hold; mostly what the API knows."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            fitting = [FITTING[word] for word in FITTING if word in (field.name, *_words(field))]
            return rng.choice(fitting[0] if fitting and rng.random() < 0.7 else TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_INT64:
            return rng.choice(WIDE_NUMBERS)
        case FieldDescriptor.CPPTYPE_MESSAGE:
            assert field.message_type is not None
            return message_of(field.message_type, rng, depth + 1)
        case _:
            return rng.choice(NUMBERS)


def _words(field: FieldDescriptor) -> tuple[str, ...]:
    """Of a `name`, what its method is about: GetInstanceRequest -> Instance."""
    message = field.containing_type.name if field.containing_type is not None else ""
    about = message.removesuffix("Request")
    return tuple(word for word in FITTING if about.endswith(word)) if field.name == "name" else ()


def message_of(kind: Descriptor, rng: random.Random, depth: int = 0) -> Message:
    """Some of its fields set."""
    message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        left_out = 0.1 if field.name in ("name", "destination") else 0.6
        if depth > 3 or rng.random() < left_out:
            continue
        if field.is_repeated:
            items = [value_of(field, rng, depth) for _ in range(rng.choice((0, 1, 2, 5)))]
            getattr(message, field.name).extend(items)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(value_of(field, rng, depth))
        else:
            setattr(message, field.name, value_of(field, rng, depth))
    return message


def damaged(encoded: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in or left out."""
    data = bytearray(encoded or b"\x0a\x01a")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(3):
            case 0 if data:
                data[at] = rng.randrange(256)
            case 1 if data:
                del data[at : at + rng.randint(1, 8)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


def payload(method: MethodDescriptor, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.15:
        return rng.randbytes(rng.choice((0, 1, 2, 5, 20, 100, 5000)))
    other = rng.choice(METHODS) if kind < 0.25 else method
    encoded = message_of(other.input_type, rng).SerializeToString()
    return damaged(encoded, rng) if kind < 0.5 else encoded


async def send(world: World, method: MethodDescriptor, encoded: bytes) -> grpc.StatusCode:
    """How it was answered; of a stream the first message counts."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    channel: Any = world.channel  # messages are bytes here
    try:
        if method.server_streaming:
            call = channel.unary_stream(path)(encoded, timeout=CALL_S)
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(path)(encoded, timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def undrain(world: World) -> None:
    """Both instances serve again: otherwise most commands soon find one draining."""
    for name in NAMES:
        with suppress(grpc.aio.AioRpcError):  # it does serve
            await world.stub.UndrainInstance(pb.UndrainInstanceRequest(name=f"instances/{name}"))


async def fuzz(num_messages: int, seed: int) -> Counter[tuple[str, grpc.StatusCode]]:
    """Every (method, status) and how often it was seen."""
    seen: Counter[tuple[str, grpc.StatusCode]] = Counter()
    async with admin_world() as world:
        ask = pb.MigrateRequestRequest(name="requests/cmpl-1", destination="instances/instance-1")
        await world.stub.MigrateRequest(ask)

        async def caller(number: int) -> None:
            rng = random.Random(seed * NUM_CALLERS + number)
            for turn in range(num_messages // NUM_CALLERS):
                if turn % UNDRAIN_EVERY == 0:
                    await undrain(world)
                method = rng.choice(METHODS)
                encoded = payload(method, rng)
                code = await send(world, method, encoded)
                assert code not in BROKEN, f"{method.name} answers {code.name} to {encoded!r}"
                seen[method.name, code] += 1

        async with asyncio.TaskGroup() as callers:
            for number in range(NUM_CALLERS):
                callers.create_task(caller(number))
        listed = await world.stub.ListInstances(pb.ListInstancesRequest())
        assert len(listed.instances) == 2, "it still serves"
        async with asyncio.timeout(30):
            while world.server.watchtower.num_streams:
                await world.stub.GetPolicy(pb.GetPolicyRequest())
    return seen


def check_reach(seen: Counter[tuple[str, grpc.StatusCode]]) -> None:
    """The messages got somewhere: every method has answered (but one: migrations end at once here), and has refused."""
    for method in METHODS:
        codes = {code for name, code in seen if name == method.name}
        assert grpc.StatusCode.OK in codes or method.name == "CancelMigration", f"no message to {method.name} was taken"
        assert grpc.StatusCode.INVALID_ARGUMENT in codes, f"no message to {method.name} was refused"
    codes = {code for _, code in seen}
    assert {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED, grpc.StatusCode.ALREADY_EXISTS} <= codes
    assert grpc.StatusCode.FAILED_PRECONDITION in codes


async def test_two_thousand_messages_break_nothing() -> None:
    seen = await fuzz(2000, seed=1)
    num_taken = sum(number for (_, code), number in seen.items() if code is grpc.StatusCode.OK)
    assert 200 < num_taken < 1800, "some got somewhere, some were refused"
    assert {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= {code for _, code in seen}


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_messages_break_nothing() -> None:
    seen = await fuzz(100_000, seed=2)
    check_reach(seen)
    assert seen.total() == 100_000
    print(f"\n{seen.total()} messages, {dict(Counter(code.name for _, code in seen.elements()))}")
