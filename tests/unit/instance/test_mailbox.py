"""Do messages arrive, do strangers stay outside, and does rubbish do no harm?"""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest
import zmq

from instance.errors import MalformedFleetMessage, ReplayedMessage, StrangerMessage
from instance.mailbox import WIRE_VERSION, Mailbox, decode, encode
from instance.messages import (
    ALL_CACHED,
    MAX_MESSAGE_BYTES,
    Abort,
    CachedBlocks,
    FleetMessage,
    OwnerChanged,
    Submit,
    Subscribe,
)
from instance.replay import STAMP_BYTES, ReplayGuard, Session
from instance.seal import MAC_BYTES, Seal, carrier_token
from tests.support.reports import load_report

TOKEN = "secret"
SEAL = Seal(TOKEN)
HERE = "tcp://127.0.0.1:1"
VERSION = bytes((WIRE_VERSION,))

MESSAGES: list[FleetMessage] = [
    Submit("r", "client", "tcp://h:1", 1, 2, 0, 10, 20, b"\x00payload"),
    Abort(("a", "b")),
    Subscribe("tcp://h:1", 5.0, True),
    Subscribe("tcp://h:1", 5.0, cached_from=ALL_CACHED),
    Subscribe("tcp://h:1", 5.0, headroom=((-10, 64), (0, 0))),
    CachedBlocks("i0", 3, 16, 7, 9, b"\x00" * 8, b"\xff" * 8),
    OwnerChanged("r", "i0", 3, 17),
]


def frame_of(message: FleetMessage, seal: Seal = SEAL, address: str = HERE) -> bytes:
    """The first of a new sender."""
    return encode(message, seal, address, Session())


def read(data: bytes) -> FleetMessage:
    """At an inbox that has heard nothing yet."""
    return decode(data, SEAL, HERE, ReplayGuard())


def sealed(body: bytes) -> bytes:
    """What a member with a broken encoder would send."""
    stamped = Session().stamp() + body
    return VERSION + SEAL.mac(HERE, stamped) + stamped


def body_of(message: FleetMessage) -> bytes:
    return frame_of(message)[1 + MAC_BYTES + STAMP_BYTES :]


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_encoded_is_decoded(message: FleetMessage) -> None:
    assert read(frame_of(message)) == message
    assert read(sealed(body_of(message))) == message  # the control: `sealed` is what `encode` does


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes((WIRE_VERSION - 1,)) + frame_of(Abort(()))[1:],
        sealed(b""),
        VERSION + SEAL.mac(HERE, b""),
        VERSION + SEAL.mac(HERE, bytes(STAMP_BYTES - 1)) + bytes(STAMP_BYTES - 1),
        sealed(body_of(Abort(("a",)))[:-1]),
        sealed(body_of(Abort(("a",))) + b"\x00"),
        sealed(b"\x81\xa4type\xa7NoSuch!"),
        sealed(b"\x82\xa4type\xa5Abort\xabrequest_ids\x91\xa2\xff\xfe"),
        sealed(b"\x91" * 5000),
        sealed(body_of(msgspec.structs.replace(load_report("a"), block_size=0))),
    ],
    ids=(
        *("empty", "older", "nothing-stamped", "nothing-sealed", "half-a-stamp"),
        *("cut", "longer", "unknown", "no-text", "nested"),  # by name: stamps are random
        "blocks of no tokens",
    ),
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFleetMessage):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        VERSION,
        VERSION + body_of(Abort(("a",))),
        VERSION + bytes(MAC_BYTES) + body_of(Abort(("a",))),
        frame_of(Abort(("a",)), Seal("guessed")),
        frame_of(Abort(("a",)), Seal(TOKEN + " ")),
        frame_of(Abort(("a",)), address="tcp://127.0.0.1:2"),
        frame_of(Abort(("a",)))[:-1],
        frame_of(Abort(("a",))) + b"\x00",
        sealed(body_of(Abort(("a",))))[:MAC_BYTES],
    ],
    ids=["empty", "none", "zeros", "guessed", "nearly", "other-inbox", "cut", "longer", "half-a-mac"],
)
def test_without_the_fleets_mac_nothing_is_read(data: bytes) -> None:
    with pytest.raises(StrangerMessage):
        read(data)


def test_no_bit_of_a_frame_can_be_turned() -> None:
    frame = frame_of(MESSAGES[0])
    for bit in range(8 * len(frame)):
        turned = bytearray(frame)
        turned[bit // 8] ^= 1 << bit % 8
        with pytest.raises((StrangerMessage, MalformedFleetMessage)):
            read(bytes(turned))


def test_an_empty_token_is_no_secret() -> None:
    with pytest.raises(ValueError, match="token"):
        Mailbox("")


def test_the_carriers_token_is_not_the_inboxes_and_is_the_same_everywhere() -> None:
    assert carrier_token(TOKEN) == carrier_token(TOKEN) != carrier_token("guessed")
    assert TOKEN not in carrier_token(TOKEN)
    with pytest.raises(StrangerMessage):
        read(frame_of(Abort(()), Seal(carrier_token(TOKEN))))


def test_a_message_over_the_bound_is_malformed() -> None:
    with pytest.raises(MalformedFleetMessage, match="more than"):
        read(bytes(MAX_MESSAGE_BYTES + 1))


async def test_rubbish_and_strangers_are_counted_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    mailbox, context = Mailbox(TOKEN), zmq.Context()
    await mailbox.open()
    stranger = context.socket(zmq.PUSH)
    stranger.connect(mailbox.address)
    guessed = frame_of(Abort(("b",)), Seal("guessed"), mailbox.address)
    with caplog.at_level(logging.DEBUG):
        for data in (b"", b"rubbish", guessed, guessed, frame_of(Abort(("a",)), address=mailbox.address)):
            stranger.send(data)
        async with asyncio.timeout(5):
            assert await mailbox.receive() == Abort(("a",))
    counts = mailbox.counts
    assert (counts.malformed, counts.strangers, counts.received) == (2, 2, 1)
    assert caplog.text.count("without this fleet's MAC") == 1, "said once, then counted: a flood fills no log"
    assert TOKEN not in caplog.text and TOKEN not in repr(vars(mailbox)) and SEAL.mac("", b"").hex() not in caplog.text
    stranger.close(linger=0)
    context.term()
    mailbox.close()


def test_a_frame_is_taken_once_by_each_inbox_that_it_is_for() -> None:
    guard, frame = ReplayGuard(), frame_of(MESSAGES[0])
    assert decode(frame, SEAL, HERE, guard) == MESSAGES[0]
    with pytest.raises(ReplayedMessage):
        decode(frame, SEAL, HERE, guard)
    assert read(frame) == MESSAGES[0], "the control: it is sound"


def test_a_strangers_frame_uses_up_no_stamp() -> None:
    """Else anybody could silence a member by sending what it is about to send."""
    guard, frame = ReplayGuard(), frame_of(MESSAGES[0])
    with pytest.raises(StrangerMessage):
        decode(frame[:-1] + bytes((frame[-1] ^ 1,)), SEAL, HERE, guard)
    assert guard.num_sessions == 0
    assert decode(frame, SEAL, HERE, guard) == MESSAGES[0]


async def test_what_was_overheard_and_is_said_again_is_counted_and_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mailbox, context, session = Mailbox(TOKEN), zmq.Context(), Session()
    await mailbox.open()
    overheard = [encode(Abort((name,)), SEAL, mailbox.address, session) for name in "abc"]
    enemy = context.socket(zmq.PUSH)
    enemy.connect(mailbox.address)
    for data in (*overheard[:2], *overheard, *overheard, encode(Abort(("d",)), SEAL, mailbox.address, session)):
        enemy.send(data)
    async with asyncio.timeout(5):
        assert [await mailbox.receive() for _ in "abcd"] == [Abort((name,)) for name in "abcd"]
    assert (mailbox.counts.replays, mailbox.counts.received) == (5, 4)
    assert caplog.text.count("came before") == 1, "said once, then counted"
    enemy.close(linger=0)
    context.term()
    mailbox.close()


async def test_a_sender_that_comes_back_after_it_forgot_the_peer_is_heard() -> None:
    here, there = Mailbox(TOKEN), Mailbox(TOKEN)
    await here.open()
    await there.open()
    async with asyncio.timeout(5):
        for name in "abc":
            assert here.send(there.address, Abort((name,)))
            assert await there.receive() == Abort((name,))
            here.forget(there.address)
    assert there.counts.replays == 0
    here.close()
    there.close()


async def test_messages_to_one_peer_arrive_in_order() -> None:
    here, there = Mailbox(TOKEN), Mailbox(TOKEN)
    await here.open()
    await there.open()
    sent = [Abort((str(number),)) for number in range(500)]
    assert all(here.send(there.address, message) for message in sent)
    async with asyncio.timeout(5):
        assert [await there.receive() for _ in sent] == sent
    here.close()
    there.close()
    here.close()


async def test_a_peer_that_does_not_read_costs_its_messages_and_nothing_else() -> None:
    mailbox = Mailbox(TOKEN, peer_queue_messages=8)
    await mailbox.open()
    kept = [mailbox.send("tcp://127.0.0.1:1", Abort(("a",))) for _ in range(50)]
    assert kept.count(True) == 8 and mailbox.counts.dropped == 42
    mailbox.forget("tcp://127.0.0.1:1")
    mailbox.forget("tcp://127.0.0.1:1")
    assert mailbox.send("tcp://127.0.0.1:1", Abort(("a",))), "a forgotten peer starts with an empty queue"
    mailbox.forget("tcp://127.0.0.1:1")
    mailbox.close()


@pytest.mark.parametrize(
    "address", ["", "nonsense", "ipc:///x", "inproc://x", "tcp://nobody", "tcp://127.0.0.1:notaport"]
)
async def test_an_address_that_is_none_is_a_dropped_message(address: str) -> None:
    mailbox = Mailbox(TOKEN)
    await mailbox.open()
    assert mailbox.send(address, Abort(())) is False
    assert mailbox.counts.dropped == 1
    mailbox.close()
    assert mailbox.send("tcp://127.0.0.1:1", Abort(())) is False
