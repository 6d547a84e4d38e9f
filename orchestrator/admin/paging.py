"""Where does the next page begin? Tokens with the last key, which fit only the question they came from (AIP-158)."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
from google.protobuf.message import Message

from orchestrator.admin.failures import invalid

MAX_PAGE = 10_000
MAX_PAGE_BYTES = 2 << 20
"""A page ends early at this size, so that it fits into one message."""
_MAC_BYTES = 12
_MAX_TOKEN_CHARS = 2048

Cursor = tuple[str | int, ...]
Item = TypeVar("Item", bound=Message)


class Pager:
    """Tokens are sealed with a key of this process: nobody else makes them, and a restart ends them."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def size(self, asked: int, default: int) -> int:
        """Raises Failure when it is negative."""
        if asked < 0:
            raise invalid("page_size", f"it is {asked}, it cannot be negative")
        return min(asked or default, MAX_PAGE)

    def cursor(self, question: Message, kind: type[Cursor]) -> Cursor | None:
        """The key after which the page begins; None: the first page. Raises Failure for a token of another question."""
        token: str = getattr(question, "page_token")  # noqa: B009 - every list request has one
        if not token:
            return None
        wrong = invalid("page_token", "it is none that the same question got: ask for the first page again")
        if len(token) > _MAX_TOKEN_CHARS:
            raise wrong
        try:
            sealed = base64.urlsafe_b64decode(token.encode())
            seal, body = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
            if not secrets.compare_digest(seal, self._seal(question, body)):
                raise wrong
            return msgspec.json.decode(body, type=kind)
        except (ValueError, msgspec.DecodeError):
            raise wrong from None

    def page(
        self, question: Message, found: Iterable[tuple[Cursor, Callable[[], Item]]], size: int
    ) -> tuple[list[Item], str]:
        """At most `size` of what is found, in its order, and the token of what follows (empty: nothing does)."""
        items: list[Item] = []
        num_bytes, last = 0, None
        for key, make in found:
            if last is not None and (len(items) == size or num_bytes >= MAX_PAGE_BYTES):
                return items, self._token(question, last)
            items.append(make())
            num_bytes += items[-1].ByteSize()
            last = key
        return items, ""

    def _token(self, question: Message, last: Cursor) -> str:
        body = msgspec.json.encode(last)
        return base64.urlsafe_b64encode(self._seal(question, body) + body).decode()

    def _seal(self, question: Message, body: bytes) -> bytes:
        """Of the question without the fields that may differ from page to page."""
        same = type(question)()
        same.CopyFrom(question)
        for field in ("page_token", "page_size"):
            same.ClearField(field)
        asked = same.DESCRIPTOR.full_name.encode() + b"\0" + same.SerializeToString(deterministic=True)
        digest = hashlib.blake2b(asked, key=self._key, digest_size=32).digest()
        return hashlib.blake2b(body, key=digest, digest_size=_MAC_BYTES).digest()
