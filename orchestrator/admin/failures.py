"""What is a caller told when the answer is no? A gRPC status with google.rpc details that programs can read."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from orchestrator.effects import PolicyRefused, Refused, Result
from orchestrator.errors import RefusalKind

DOMAIN = "kvferry"
DETAILS = "grpc-status-details-bin"
"""The trailer in which every gRPC library looks for google.rpc.Status."""
MAX_TEXT_BYTES = 400
"""Trailers are bounded (8 KiB, what is in them escaped or in base64); what a caller sent comes back cut."""
MAX_ETAG_CHARS = 64
"""Of one that is asked for; ours have 16."""
MAX_VIOLATIONS = 16
MAX_FIELD_BYTES = 60
MAX_WHAT_BYTES = 150
RETRY_AFTER_S = 1

STATUS_CODES = {
    RefusalKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    RefusalKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalKind.AMBIGUOUS: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalKind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalKind.OVERTAKEN: grpc.StatusCode.ABORTED,
    RefusalKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
_COME_BACK = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE})


class Failure(Exception):
    """Ends a call. `reason` is for programs (UPPER_SNAKE, never changed), the text one line for people."""

    def __init__(
        self, code: grpc.StatusCode, reason: str, text: str, violations: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """`violations`: (field, what is wrong with it)."""
        super().__init__(text)
        self.code = code
        self.reason = reason
        self.text = cut(text)
        self.violations = violations

    def details(self) -> bytes:
        """google.rpc.Status, encoded."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)
        packed: list[Message] = [info]
        if self.violations:
            rows = [
                error_details_pb2.BadRequest.FieldViolation(
                    field=cut(field, MAX_FIELD_BYTES), description=cut(what, MAX_WHAT_BYTES)
                )
                for field, what in self.violations[:MAX_VIOLATIONS]
            ]
            packed.append(error_details_pb2.BadRequest(field_violations=rows))
        if self.code in _COME_BACK:
            packed.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=RETRY_AFTER_S)))
        status = status_pb2.Status(code=self.code.value[0], message=self.text)
        for message in packed:
            status.details.append(_any(message))
        encoded: bytes = status.SerializeToString()
        return encoded

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """End the call with it."""
        await context.abort(self.code, self.text, trailing_metadata=((DETAILS, self.details()),))
        raise AssertionError("abort raises")


def invalid(field: str, what: str) -> Failure:
    """INVALID_ARGUMENT for one field."""
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", f"{field}: {what}", ((field, what),))


def declined(result: Result) -> Failure:
    """What the core's no means to a caller."""
    if isinstance(result, PolicyRefused):
        rows = tuple((violation.field, violation.reason) for violation in result.violations)
        text = "; ".join(f"{field}: {what}" for field, what in rows)
        return Failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", text, rows)
    assert isinstance(result, Refused), "the core answers a command with its own kind of result, or refuses"
    rows = (("name", result.reason),) if result.kind is RefusalKind.AMBIGUOUS else ()
    return Failure(STATUS_CODES[result.kind], result.kind.name, result.reason, rows)


def cut(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """One bounded line."""
    line = " ".join(text.split()).encode(errors="replace")
    return line.decode() if len(line) <= max_bytes else f"{line[: max_bytes - 3].decode(errors='ignore')}..."


def asked_etag(text: str) -> str:
    """What a client says it knows, bounded: it is written to the journal. One that is too long is no etag of ours, nor
    is its beginning."""
    return text[:MAX_ETAG_CHARS]


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
