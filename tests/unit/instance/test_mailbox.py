"""Do messages arrive, do strangers stay outside, and does rubbish do no harm?"""

from __future__ import annotations

import asyncio
import logging

import pytest
import zmq

from instance.errors import MalformedFleetMessage, StrangerMessage
from instance.mailbox import WIRE_VERSION, Mailbox, decode, encode
from instance.messages import MAX_MESSAGE_BYTES, Abort, FleetMessage, OwnerChanged, Submit, Subscribe
from instance.seal import MAC_BYTES, Seal, carrier_token

TOKEN = "secret"
SEAL = Seal(TOKEN)
HERE = "tcp://127.0.0.1:1"
VERSION = bytes((WIRE_VERSION,))

MESSAGES: list[FleetMessage] = [
    Submit("r", "client", "tcp://h:1", 1, 2, 0, 10, 20, b"\x00payload"),
    Abort(("a", "b")),
    Subscribe("tcp://h:1", 5.0, True),
    OwnerChanged("r", "i0", 3, 17),
]


def sealed(body: bytes) -> bytes:
    """What a member with a broken encoder would send."""
    return VERSION + SEAL.mac(HERE, body) + body


def body_of(message: FleetMessage) -> bytes:
    return encode(message, SEAL, HERE)[1 + MAC_BYTES :]


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_encoded_is_decoded(message: FleetMessage) -> None:
    assert decode(encode(message, SEAL, HERE), SEAL, HERE) == message
    assert decode(sealed(body_of(message)), SEAL, HERE) == message  # the control: `sealed` is what `encode` does


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes((WIRE_VERSION - 1,)) + encode(Abort(()), SEAL, HERE)[1:],
        sealed(b""),
        sealed(body_of(Abort(("a",)))[:-1]),
        sealed(body_of(Abort(("a",))) + b"\x00"),
        sealed(b"\x81\xa4type\xa7NoSuch!"),
        sealed(b"\x82\xa4type\xa5Abort\xabrequest_ids\x91\xa2\xff\xfe"),
        sealed(b"\x91" * 5000),
    ],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFleetMessage):
        decode(data, SEAL, HERE)


@pytest.mark.parametrize(
    "data",
    [
        VERSION,
        VERSION + body_of(Abort(("a",))),
        VERSION + bytes(MAC_BYTES) + body_of(Abort(("a",))),
        encode(Abort(("a",)), Seal("guessed"), HERE),
        encode(Abort(("a",)), Seal(TOKEN + " "), HERE),
        encode(Abort(("a",)), SEAL, "tcp://127.0.0.1:2"),
        encode(Abort(("a",)), SEAL, HERE)[:-1],
        encode(Abort(("a",)), SEAL, HERE) + b"\x00",
        VERSION + SEAL.mac(HERE, body_of(Abort(("a",))))[:-1],
    ],
    ids=["empty", "none", "zeros", "guessed", "nearly", "other-inbox", "cut", "longer", "half-a-mac"],
)
def test_without_the_fleets_mac_nothing_is_read(data: bytes) -> None:
    with pytest.raises(StrangerMessage):
        decode(data, SEAL, HERE)


def test_no_bit_of_a_frame_can_be_turned() -> None:
    frame = encode(MESSAGES[0], SEAL, HERE)
    for bit in range(8 * len(frame)):
        turned = bytearray(frame)
        turned[bit // 8] ^= 1 << bit % 8
        with pytest.raises((StrangerMessage, MalformedFleetMessage)):
            decode(bytes(turned), SEAL, HERE)


def test_an_empty_token_is_no_secret() -> None:
    with pytest.raises(ValueError, match="token"):
        Mailbox("")


def test_the_carriers_token_is_not_the_inboxes_and_is_the_same_everywhere() -> None:
    assert carrier_token(TOKEN) == carrier_token(TOKEN) != carrier_token("guessed")
    assert TOKEN not in carrier_token(TOKEN)
    with pytest.raises(StrangerMessage):
        decode(encode(Abort(()), Seal(carrier_token(TOKEN)), HERE), SEAL, HERE)


def test_a_message_over_the_bound_is_malformed() -> None:
    with pytest.raises(MalformedFleetMessage, match="more than"):
        decode(bytes(MAX_MESSAGE_BYTES + 1), SEAL, HERE)


async def test_rubbish_and_strangers_are_counted_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    mailbox, context = Mailbox(TOKEN), zmq.Context()
    await mailbox.open()
    stranger = context.socket(zmq.PUSH)
    stranger.connect(mailbox.address)
    guessed = encode(Abort(("b",)), Seal("guessed"), mailbox.address)
    with caplog.at_level(logging.DEBUG):
        for data in (b"", b"rubbish", guessed, guessed, encode(Abort(("a",)), SEAL, mailbox.address)):
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
