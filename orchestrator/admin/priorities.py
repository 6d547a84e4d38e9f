"""The part of the admin API about levels and API keys: proto/kvferry/admin/v1/priorities.proto.

What was sent as a key's SHA-256 and is none may be the key itself: it is refused here, before anything keeps it, and in
no word of the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from orchestrator.admin.commands import Brain
from orchestrator.admin.failures import asked_etag, declined, invalid
from orchestrator.admin.pb.kvferry.admin.v1 import priorities_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import priorities_pb2_grpc as pb_grpc
from orchestrator.effects import KeyClassSet, LevelSet
from orchestrator.events import KeyClassRequested, LevelRequested, Token
from orchestrator.gateway.priorities import digest_in
from orchestrator.policy.levels import BadLevel, Level, Levels

SERVICE = "kvferry.admin.v1.PriorityService"
GATEWAYS_S = 3.0
"""Gateways that do not know of a change after so long hear of it later; the answer says so."""
MAX_LEVEL_CHARS = 32
_SET_KEY, _DELETE_KEY, _SET_LEVEL = (
    f"admin API {name}" for name in ("SetKeyPriority", "DeleteKeyPriority", "UpdatePriorityLevel")
)
"""Who asked, as the journal says it."""
Context = grpc.aio.ServicerContext[Any, Any]


class PriorityService(pb_grpc.PriorityServiceServicer):
    """Raises Failure; `guard.Guard` makes it a status, and answers a request_id that was seen before."""

    def __init__(self, brain: Brain) -> None:
        self._brain = brain

    async def GetPriorities(self, _request: pb.GetPrioritiesRequest, _context: Context) -> pb.GetPrioritiesResponse:
        now = self._brain.priorities()
        keys = [_key(digest, priority, now.levels) for digest, priority in now.key_classes]
        return pb.GetPrioritiesResponse(levels=map(_level, now.levels.levels), keys=keys, etag=now.etag)

    async def SetKeyPriority(self, request: pb.SetKeyPriorityRequest, _context: Context) -> pb.SetKeyPriorityResponse:
        digest, level, levels = _digest(request.key_sha256), request.level, self._brain.priorities().levels
        try:
            levels.priority(level)
        except BadLevel:
            names = ", ".join(one.name for one in levels.levels)
            raise invalid("level", f"it must be one of {names}, or a whole number") from None

        def requested(token: Token) -> KeyClassRequested:
            return KeyClassRequested(token, digest, level, _SET_KEY, asked_etag(request.etag), request.validate_only)

        result = await self._brain.ask(requested)
        if not isinstance(result, KeyClassSet) or result.priority is None:
            raise declined(result)
        key = _key(digest, result.priority, levels)
        applied = await self._applied(request.validate_only)
        return pb.SetKeyPriorityResponse(key=key, change=result.change, etag=result.etag, applied=applied)

    async def DeleteKeyPriority(
        self, request: pb.DeleteKeyPriorityRequest, _context: Context
    ) -> pb.DeleteKeyPriorityResponse:
        digest = _digest(request.key_sha256)

        def requested(token: Token) -> KeyClassRequested:
            return KeyClassRequested(token, digest, None, _DELETE_KEY, asked_etag(request.etag), request.validate_only)

        result = await self._brain.ask(requested)
        if not isinstance(result, KeyClassSet):
            raise declined(result)
        applied = await self._applied(request.validate_only)
        return pb.DeleteKeyPriorityResponse(change=result.change, etag=result.etag, applied=applied)

    async def UpdatePriorityLevel(
        self, request: pb.UpdatePriorityLevelRequest, _context: Context
    ) -> pb.UpdatePriorityLevelResponse:
        if not 0 < len(request.name) <= MAX_LEVEL_CHARS:
            raise invalid("name", f"it must be a level's, of at most {MAX_LEVEL_CHARS} characters")
        rank = request.rank if request.HasField("rank") else None
        blocks = request.headroom_blocks if request.HasField("headroom_blocks") else None

        def requested(token: Token) -> LevelRequested:
            return LevelRequested(
                token, request.name, rank, blocks, _SET_LEVEL, asked_etag(request.etag), request.validate_only
            )

        result = await self._brain.ask(requested)
        if not isinstance(result, LevelSet):
            raise declined(result)
        applied = await self._applied(request.validate_only)
        level = _level(result.level)
        return pb.UpdatePriorityLevelResponse(level=level, change=result.change, etag=result.etag, applied=applied)

    async def _applied(self, is_dry: bool) -> bool:
        if is_dry:
            return False
        try:
            async with asyncio.timeout(GATEWAYS_S):
                await self._brain.until_gateways_know()
        except TimeoutError:
            return False
        return True


def _digest(text: str) -> str:
    digest = digest_in(text)
    if digest is None:
        raise invalid("key_sha256", "it must be the key's SHA-256, 64 hexadecimal digits, and never the key itself")
    return digest


def _level(level: Level) -> pb.PriorityLevel:
    return pb.PriorityLevel(name=level.name, rank=level.rank, headroom_blocks=level.headroom_blocks)


def _key(digest: str, priority: int, levels: Levels) -> pb.KeyPriority:
    return pb.KeyPriority(key_sha256=digest, priority=priority, shown=levels.shown(priority))
