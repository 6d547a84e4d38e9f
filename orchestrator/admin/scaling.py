"""The part of the admin API that is about the number of instances: proto/kvferry/admin/v1/scaling.proto."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from orchestrator.admin.commands import Brain
from orchestrator.admin.convert import INSTANCES
from orchestrator.admin.failures import Failure, declined, invalid
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2_grpc as pb_grpc
from orchestrator.effects import ScalingSet
from orchestrator.events import ScaleRequested, Token
from orchestrator.state import ScalingSnapshot

SERVICE = "kvferry.admin.v1.ScalingService"
Context = grpc.aio.ServicerContext[Any, Any]


class ScalingService(pb_grpc.ScalingServiceServicer):
    """Raises Failure; `guard.Guard` makes it a status, and answers a request_id that was seen before."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    async def GetScaling(self, _request: pb.GetScalingRequest, _context: Context) -> pb.GetScalingResponse:
        known = self._brain.snapshot().scaling
        return pb.GetScalingResponse(scaling=scaling(known) if known is not None else None)

    async def ScaleInstances(self, request: pb.ScaleInstancesRequest, _context: Context) -> pb.ScaleInstancesResponse:
        given = {field.name: value for field, value in request.ListFields() if field.name != "request_id"}
        if not given:
            text = "nothing is given: name a target or a limit"
            raise Failure(grpc.StatusCode.INVALID_ARGUMENT, "NOTHING_GIVEN", text)
        for name, value in given.items():
            if name != "automatic" and value < 1:
                raise invalid(name, f"{value}, it must be 1 or more")

        def requested(token: Token) -> ScaleRequested:
            return ScaleRequested(
                token,
                target=given.get("target_instances"),
                fewest=given.get("min_instances"),
                most=given.get("max_instances"),
                is_automatic=given.get("automatic"),
            )

        result = await self._brain.ask(requested)
        if not isinstance(result, ScalingSet):
            raise declined(result)
        return pb.ScaleInstancesResponse(scaling=scaling(result.scaling))


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
