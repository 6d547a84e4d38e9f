"""Do messages arrive, and does rubbish do no harm?"""

from __future__ import annotations

import asyncio

import pytest
import zmq

from instance.errors import MalformedFleetMessage
from instance.mailbox import WIRE_VERSION, Mailbox, decode, encode
from instance.messages import MAX_MESSAGE_BYTES, Abort, FleetMessage, OwnerChanged, Submit, Subscribe

MESSAGES: list[FleetMessage] = [
    Submit("r", "client", "tcp://h:1", 1, 2, 0, 10, 20, b"\x00payload"),
    Abort(("a", "b")),
    Subscribe("tcp://h:1", 5.0, True),
    OwnerChanged("r", "i0", 3, 17),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_encoded_is_decoded(message: FleetMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes((WIRE_VERSION,)),
        bytes((WIRE_VERSION + 1,)) + encode(Abort(()))[1:],
        encode(Abort(("a",)))[:-1],
        encode(Abort(("a",))) + b"\x00",
        b"\x01\x81\xa4type\xa7NoSuch!",
        b"\x01\x82\xa4type\xa5Abort\xabrequest_ids\x91\xa2\xff\xfe",
        b"\x01" + b"\x91" * 5000,
    ],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFleetMessage):
        decode(data)


def test_a_message_over_the_bound_is_malformed() -> None:
    with pytest.raises(MalformedFleetMessage, match="more than"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


async def test_rubbish_is_counted_and_passed_over() -> None:
    mailbox, context = Mailbox(), zmq.Context()
    await mailbox.open()
    stranger = context.socket(zmq.PUSH)
    stranger.connect(mailbox.address)
    for data in (b"", b"rubbish", encode(Abort(("a",)))):
        stranger.send(data)
    async with asyncio.timeout(5):
        assert await mailbox.receive() == Abort(("a",))
    assert (mailbox.counts.malformed, mailbox.counts.received) == (2, 1)
    stranger.close(linger=0)
    context.term()
    mailbox.close()


async def test_messages_to_one_peer_arrive_in_order() -> None:
    here, there = Mailbox(), Mailbox()
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
    mailbox = Mailbox(peer_queue_messages=8)
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
    mailbox = Mailbox()
    await mailbox.open()
    assert mailbox.send(address, Abort(())) is False
    assert mailbox.counts.dropped == 1
    mailbox.close()
    assert mailbox.send("tcp://127.0.0.1:1", Abort(())) is False
