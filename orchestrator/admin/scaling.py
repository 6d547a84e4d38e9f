"""The part of the admin API that is about the number of instances: proto/kvferry/admin/v1/scaling.proto."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from orchestrator.admin.convert import INSTANCES, STATUS_CODES
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2_grpc as pb_grpc
from orchestrator.effects import Refused, Result, ScalingSet
from orchestrator.events import Event, ScaleRequested, Token
from orchestrator.state import ScalingSnapshot, Snapshot

SERVICE = "kvferry.admin.v1.ScalingService"
Context = grpc.aio.ServicerContext[Any, Any]


class Brain(Protocol):
    """What the service needs of the loop."""

    def snapshot(self) -> Snapshot: ...

    async def ask(self, make: Callable[[Token], Event]) -> Result: ...


class ScalingService(pb_grpc.ScalingServiceServicer):
    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    async def GetScaling(self, _request: pb.GetScalingRequest, _context: Context) -> pb.GetScalingResponse:
        known = self._brain.snapshot().scaling
        return pb.GetScalingResponse(scaling=scaling(known) if known is not None else None)

    async def ScaleInstances(self, request: pb.ScaleInstancesRequest, context: Context) -> pb.ScaleInstancesResponse:
        given = {field.name: value for field, value in request.ListFields()}
        if not given:
            await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, "nothing is given: name a target or a limit")
        for name, value in given.items():
            if name != "automatic" and value < 1:
                await _fail(context, grpc.StatusCode.INVALID_ARGUMENT, f"{name} is {value}, it must be 1 or more")

        def requested(token: Token) -> ScaleRequested:
            return ScaleRequested(
                token,
                target=given.get("target_instances"),
                fewest=given.get("min_instances"),
                most=given.get("max_instances"),
                is_automatic=given.get("automatic"),
            )

        result = await self._brain.ask(requested)
        if isinstance(result, Refused):
            await _fail(context, STATUS_CODES[result.kind], result.reason)
        assert isinstance(result, ScalingSet), "the core answers a command with its own kind of result, or refuses"
        return pb.ScaleInstancesResponse(scaling=scaling(result.scaling))


async def _fail(context: Context, code: grpc.StatusCode, reason: str) -> NoReturn:
    await context.abort(code, reason)
    raise AssertionError("abort raises")


def scaling(known: ScalingSnapshot) -> pb.Scaling:
    return pb.Scaling(
        target_instances=known.target,
        min_instances=known.fewest,
        max_instances=known.most,
        automatic=known.is_automatic,
        num_instances=known.num_present,
        starting=[INSTANCES + name for name in known.starting],
        retiring=[INSTANCES + name for name in known.retiring],
        mean_freeness_steps=known.mean_freeness_steps,
        reason=known.reason,
        num_start_failures=known.num_start_failures,
        retry_in_s=known.retry_in_s,
    )
