"""What happens to every call around its method? Token, deadline, readable message, repetition, rich errors."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from orchestrator.admin.failures import Failure
from orchestrator.admin.idempotency import Repetitions

OPEN_TO_ALL = "/grpc.health.v1.Health/"
"""Probes carry no token; it says whether we serve, and nothing else."""
_BEARER = "bearer "

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""grpc's own tuple of a method: behaviour, kind, codecs."""


class _Unreadable:
    """Stands for a message that is none."""


class Guard(grpc.aio.ServerInterceptor):
    """Every call passes here. Methods raise Failure; whatever else they raise is a bug, and is seen as UNKNOWN."""

    def __init__(self, token: str, repetitions: Repetitions) -> None:
        """`token` empty: none is asked for."""
        self._token = token.encode()
        self._repetitions = repetitions

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # UNIMPLEMENTED
        if not self._may(handler_call_details):
            return _denied(handler)
        if handler.request_streaming or handler_call_details.method.startswith(OPEN_TO_ALL):
            return handler  # reflection and health: their own libraries'
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream), _lenient(handler), handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary), _lenient(handler), handler.response_serializer
        )

    def _may(self, details: Any) -> bool:
        if not self._token or details.method.startswith(OPEN_TO_ALL):
            return True
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].lower().startswith(_BEARER):
            return False
        return hmac.compare_digest(given[0][len(_BEARER) :].encode(), self._token)

    def _unary(self, method: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                _check(request, context)
                if not _is_to_be_remembered(request):
                    return await method(request, context)

                async def work() -> Any:
                    return await method(request, context)

                return await asyncio.shield(self._repetitions.begin(request.request_id, request, work))
            except Failure as failure:
                await failure.abort(context)
            except asyncio.CancelledError:
                await _abort_unless_cancelled(context)
                raise

        return guarded

    def _stream(self, method: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Awaitable[None]]:
        async def guarded(request: Any, context: Context) -> None:
            """Each message is written before the next one is made: a slow reader slows the method, nothing piles up."""
            try:
                _check(request, context)
                async with aclosing(method(request, context)) as messages:
                    async for message in messages:
                        await context.write(message)
            except Failure as failure:
                await failure.abort(context)
            except asyncio.CancelledError:
                await _abort_unless_cancelled(context)
                raise

        return guarded


def _check(request: Any, context: Context) -> None:
    if isinstance(request, _Unreadable):
        raise Failure(grpc.StatusCode.INVALID_ARGUMENT, "UNREADABLE", "the message is not one of this method")
    left_s = context.time_remaining()
    if left_s is not None and left_s <= 0:
        raise Failure(
            grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED", "its deadline had passed: nothing was done"
        )


async def _abort_unless_cancelled(context: Context) -> None:
    """What was waited for was cancelled, and not this call: the loop that would have answered has ended."""
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        text = "the orchestrator's loop has ended; whether it was done is unknown"
        await Failure(grpc.StatusCode.UNAVAILABLE, "LOOP_ENDED", text).abort(context)


def _is_to_be_remembered(request: Message) -> bool:
    return bool(getattr(request, "request_id", "")) and not getattr(request, "validate_only", False)


def _lenient(handler: Handler) -> Callable[[bytes], Any]:
    """The handler's decoder, without the exception that gRPC would answer as INTERNAL."""

    def decode(encoded: bytes) -> Any:
        try:
            return handler.request_deserializer(encoded)
        except DecodeError:
            return _Unreadable()

    return decode


def _denied(handler: Handler) -> Handler:
    async def deny(_request: Any, context: Context) -> None:
        text = "the admin API wants its bearer token in the metadata `authorization`"
        await Failure(grpc.StatusCode.UNAUTHENTICATED, "BAD_TOKEN", text).abort(context)

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(deny)
    return (
        grpc.unary_stream_rpc_method_handler(deny)
        if handler.response_streaming
        else (grpc.unary_unary_rpc_method_handler(deny))
    )
