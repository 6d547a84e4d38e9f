"""Does every message survive the wire, and is everything else refused?"""

from __future__ import annotations

import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration import messages as msg
from migration import wire
from migration.errors import MalformedMessage
from migration.messages import Message
from tests.support.message_examples import EXAMPLES


def test_the_examples_are_all_the_messages() -> None:
    assert {type(example) for example in EXAMPLES} == set(get_args(Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert wire.decode(wire.encode(message)) == message
    assert wire.decode(memoryview(wire.encode(message))) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_cut_short_is_malformed(message: Message) -> None:
    data = wire.encode(message)
    for end in {0, 1, 2, 3, len(data) // 2, len(data) - 1}:
        with pytest.raises(MalformedMessage):
            wire.decode(data[:end])
    with pytest.raises(MalformedMessage):
        wire.decode(data + b"\x00")


def test_another_version_is_refused() -> None:
    data = bytearray(wire.encode(msg.Prepare("m")))
    data[1] += 1
    with pytest.raises(MalformedMessage, match="version"):
        wire.decode(bytes(data))


@pytest.mark.parametrize(
    "body",
    [
        {"type": "Prepare"},
        {"type": "Prepare", "migration_id": 7},
        {"type": "Prepare", "migration_id": "m", "more": 1},
        {"type": "Nonsense", "migration_id": "m"},
        ["Prepare", "m"],
        None,
    ],
)
def test_other_content_is_malformed(body: object) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode(wire.PREFIX + msgspec.msgpack.encode(body))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lease_s", value) for value in (math.nan, -1.0, -math.inf)),
        *(("settled_tokens", value) for value in (-1, 2**31, 2**64 - 1)),
        *(("block_size", value) for value in (0, -1)),
        ("num_preemptions", -1),
    ],
)
def test_a_number_nobody_can_reckon_with_is_malformed(field: str, value: float) -> None:
    reserve = next(example for example in EXAMPLES if isinstance(example, msg.Reserve))
    with pytest.raises(MalformedMessage, match=field):
        wire.decode(wire.encode(msgspec.structs.replace(reserve, **{field: value})))


@pytest.mark.parametrize("message", [msg.Prepare("mm"), msg.Refused("m", "mm"), msg.Cancel("m", "mm")])
def test_text_that_is_no_utf_8_is_malformed(message: Message) -> None:
    with pytest.raises(MalformedMessage, match="utf-8"):
        wire.decode(wire.encode(message).replace(b"mm", b"\xff\x99"))


def test_too_large_a_message_is_neither_sent_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(MalformedMessage, match="at most 100"):
        wire.encode(msg.Commit("m", b"x" * 100))
    with pytest.raises(MalformedMessage, match="at most 100"):
        wire.decode(b"x" * 101)


@given(st.binary(max_size=64))
def test_random_bytes_are_malformed_and_nothing_else(data: bytes) -> None:
    for candidate in (data, wire.PREFIX + data):
        try:
            message = wire.decode(candidate)
        except MalformedMessage:
            continue
        assert wire.decode(wire.encode(message)) == message
