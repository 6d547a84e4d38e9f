"""How does a control message cross a wire? Two prefix bytes (protocol, version), then msgpack by the message's own
tag.
"""

from __future__ import annotations

import msgspec

from migration.errors import MalformedMessage
from migration.messages import Message

PREFIX = b"\xf7\x01"
"""0xf7: this protocol; 0x01: its version. Another version is refused, never guessed at."""

MAX_MESSAGE_BYTES = 64 << 20
"""Payload and state carry prompts and outputs (and encoder inputs), so they may be large; more than this is refused."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Raises `MalformedMessage` when the message is larger than `MAX_MESSAGE_BYTES`."""
    encoded = PREFIX + _ENCODER.encode(message)
    if len(encoded) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(
            f"{type(message).__name__} of {len(encoded)} bytes, at most {MAX_MESSAGE_BYTES} are sent"
        )
    return encoded


def decode(data: bytes | memoryview) -> Message:
    """Raises `MalformedMessage` for anything but one message of this version."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(data)} bytes, at most {MAX_MESSAGE_BYTES} are read")
    if bytes(data[: len(PREFIX)]) != PREFIX:
        raise MalformedMessage("not a migration message of this version")
    try:
        return _DECODER.decode(memoryview(data)[len(PREFIX) :])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec lets the latter through as it is
        raise MalformedMessage(str(error)) from error
