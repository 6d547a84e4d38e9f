"""Does every call of the admin API pass its guard: deadline, repetition, bounded memory?"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from orchestrator.admin.failures import DETAILS, MAX_VIOLATIONS, Failure, invalid
from orchestrator.admin.guard import Guard
from orchestrator.admin.idempotency import RepetitionParams, Repetitions
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb


class Aborted(Exception):
    """What grpc raises to end a handler."""


class CallContext:
    """grpc's side of one call."""

    def __init__(self, left_s: float | None = None) -> None:
        self.left_s = left_s
        self.code: grpc.StatusCode | None = None
        self.trailers: dict[str, bytes] = {}

    def time_remaining(self) -> float | None:
        return self.left_s

    async def abort(self, code: grpc.StatusCode, text: str, trailing_metadata: Any) -> None:
        self.code, self.trailers = code, dict(trailing_metadata)
        raise Aborted(text)


class Details:
    method = "/kvferry.admin.v1.AdminService/UndrainInstance"
    invocation_metadata = ()


class Work:
    """A method that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.fails = False

    async def __call__(self, _request: Any, _context: Any) -> int:
        self.num_calls += 1
        if self.fails:
            raise invalid("name", "it is wrong")
        return self.num_calls


async def guarded(work: Work, repetitions: Repetitions | None = None) -> Any:
    handler: Any = grpc.unary_unary_rpc_method_handler(work)

    async def found(_details: Any) -> Any:
        return handler

    return (await Guard("", repetitions or Repetitions()).intercept_service(found, Details())).unary_unary


@pytest.mark.parametrize("left_s", [0.0, -0.5])
async def test_a_call_whose_deadline_has_passed_is_not_begun(left_s: float) -> None:
    work, context = Work(), CallContext(left_s)
    with pytest.raises(Aborted):
        await (await guarded(work))(pb.UndrainInstanceRequest(name="a"), context)
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED and work.num_calls == 0
    assert await (await guarded(work))(pb.UndrainInstanceRequest(name="a"), CallContext(0.1)) == 1


async def test_without_an_id_a_command_is_done_each_time_and_with_one_once() -> None:
    work = Work()
    call = await guarded(work)
    plain, named = pb.UndrainInstanceRequest(name="a"), pb.UndrainInstanceRequest(name="a", request_id="1")
    assert [await call(plain, CallContext()) for _ in range(2)] == [1, 2]
    assert [await call(named, CallContext()) for _ in range(3)] == [3, 3, 3]
    check = pb.CancelRequestRequest(name="a", request_id="2", validate_only=True)
    assert [await call(check, CallContext()) for _ in range(2)] == [4, 5], "what is only checked is not remembered"


async def test_a_failure_is_not_remembered() -> None:
    work = Work()
    call = await guarded(work)
    named = pb.UndrainInstanceRequest(name="a", request_id="1")
    work.fails = True
    context = CallContext()
    with pytest.raises(Aborted):
        await call(named, context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    work.fails = False
    assert await call(named, CallContext()) == 2


@pytest.mark.parametrize("request_id", ["", "1"])
async def test_a_command_whose_loop_ends_is_unknown_and_one_whose_caller_leaves_is_cancelled(request_id: str) -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    class Waits(Work):
        async def __call__(self, _request: Any, _context: Any) -> int:
            return await answer

    named, context = pb.UndrainInstanceRequest(name="a", request_id=request_id), CallContext()
    call = await guarded(Waits())
    leaving = asyncio.ensure_future(call(named, context))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert context.code is None
    answer = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(call(pb.UndrainInstanceRequest(name="b", request_id=request_id * 2), context))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(Aborted, match="loop has ended"):
        await waiting
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_answers_are_forgotten_after_their_time_and_past_their_number() -> None:
    now_s = [0.0]
    repetitions = Repetitions(RepetitionParams(keep_s=10.0, max_remembered=2), lambda: now_s[0])
    work = Work()
    call = await guarded(work, repetitions)
    names = [pb.UndrainInstanceRequest(name="a", request_id=str(number)) for number in range(4)]
    assert [await call(name, CallContext()) for name in names[:3]] == [1, 2, 3]
    assert repetitions.num_remembered == 2
    assert await call(names[0], CallContext()) == 4, "the oldest was forgotten"
    assert await call(names[2], CallContext()) == 3
    now_s[0] = 10.1
    assert await call(names[2], CallContext()) == 5, "its time was over"


async def test_commands_under_way_are_bounded_and_end_with_the_server() -> None:
    repetitions = Repetitions(RepetitionParams(max_under_way=1))

    async def forever() -> None:
        await asyncio.Event().wait()

    task = repetitions.begin("1", pb.UndrainInstanceRequest(name="a"), forever)
    assert repetitions.begin("1", pb.UndrainInstanceRequest(name="a"), forever) is task
    with pytest.raises(Failure) as caught:
        repetitions.begin("2", pb.UndrainInstanceRequest(name="a"), forever)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    repetitions.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert repetitions.num_remembered == 0


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "a/b", "\N{SNOWMAN}"])
async def test_an_id_that_is_none_is_an_invalid_argument(request_id: str) -> None:
    context = CallContext()
    with pytest.raises(Aborted):
        await (await guarded(Work()))(pb.UndrainInstanceRequest(name="a", request_id=request_id), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_details_of_an_error_fit_into_its_trailers() -> None:
    violations = tuple((f"field_{number}" * 100, "\N{HOCHO}" * 10_000) for number in range(100))
    context = CallContext()
    with pytest.raises(Aborted):
        await Failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "x" * 10_000, violations).abort(context)  # type: ignore[arg-type]
    status = status_pb2.Status.FromString(context.trailers[DETAILS])
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad) and 0 < len(bad.field_violations) <= MAX_VIOLATIONS
    assert len(context.trailers[DETAILS]) < 5000
