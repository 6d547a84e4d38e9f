"""What do hostile frames do to an inbox, and to the instance behind it? Nothing: counted, dropped, and it serves on.

Two kinds of enemy: a stranger, who has no token, and a member gone mad, whose frames carry the right MAC.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from instance.errors import MalformedFleetMessage, ReplayedMessage, StrangerMessage
from instance.fake import FakeEngine
from instance.fake_model import FakeMove, FakeRequest, encode_fake, expected_output
from instance.fake_scheduler import FakeConfig
from instance.mailbox import WIRE_VERSION, decode, encode
from instance.messages import (
    Abort,
    CachedBlocks,
    FleetMessage,
    Frame,
    MigrationEnvelope,
    OutputEntry,
    OwnerChanged,
    PriorityChanged,
    RequestReport,
    Submit,
    SubmitAnswer,
    Subscribe,
)
from instance.replay import STAMP_BYTES, ReplayGuard, Session
from instance.seal import MAC_BYTES, Seal
from migration import wire
from migration.messages import Reserve
from migration.transports import CarrierParams, KVStore, MemoryHub, RankMover, open_receiver, open_sender
from tests.support.fleet import TOKEN, a_request, fleet_of
from tests.support.idle_report import report
from tests.support.message_examples import EXAMPLES
from tests.support.mutate import Mutator
from tests.support.reports import request_load

SEAL = Seal(TOKEN)
HERE = "tcp://127.0.0.1:1"
HEADER_BYTES = 1 + MAC_BYTES + STAMP_BYTES

LOAD = report("i0", epoch=1, step=7, state="serving", num_running=1, free_blocks=9, submits_seen=3)
PAYLOAD = encode_fake(a_request(3, 20, 5))
MESSAGES: tuple[FleetMessage, ...] = (
    Submit("r", "client", HERE, 1, 1, 0, 20, 5, PAYLOAD),
    SubmitAnswer("r", "i0", 1, "no", True),
    Abort(("a", "b", "c")),
    Subscribe(HERE, 5.0, True),
    Subscribe(HERE, 5.0, cached_from=3),
    Subscribe(HERE, 5.0, headroom=((-10, 64), (0, 0))),
    CachedBlocks("i0", 1, 16, 0, 2, b"\x01" * 8, b"\x02" * 8),
    LOAD,
    Frame("i0", 1, 8, 0.5, (OutputEntry("r", 0, (1, 2, 3)), OutputEntry("s", 9, (4,), 1, "stop", (b"x",))), LOAD),
    RequestReport("i0", 1, 8, (request_load("r"),)),
    OwnerChanged("r", "i1", 1, 17),
    PriorityChanged("r", "i1", 1, -10),
    *(MigrationEnvelope("i1", 1, HERE, 1, wire.encode(one)) for one in EXAMPLES),
)
FRAMES = tuple(encode(message, SEAL, HERE, Session()) for message in MESSAGES)


def sealed(frame: bytes, session: Session, address: str = HERE) -> bytes:
    """As a member would have sent it."""
    body = session.stamp() + frame[HEADER_BYTES:]
    return bytes((WIRE_VERSION,)) + SEAL.mac(address, body) + body


def what_it_is(frame: bytes, guard: ReplayGuard) -> str:
    """Whatever else `decode` raises is a failure."""
    try:
        message = decode(frame, SEAL, HERE, guard)
    except StrangerMessage:
        return "stranger"
    except ReplayedMessage:
        return "replay"
    except MalformedFleetMessage:
        return "malformed"
    assert type(message) in {type(one) for one in MESSAGES}
    return "message"


def count(num_frames: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Half of them as a stranger sends them, half as a member gone mad."""
    mutator = Mutator(seed, FRAMES, HEADER_BYTES)
    of_strangers: Counter[str] = Counter()
    of_members: Counter[str] = Counter()
    guard, session = ReplayGuard(), Session()
    for _ in range(num_frames // 2):
        frame = mutator.frame()
        of_strangers[what_it_is(frame, guard)] += frame not in FRAMES
        of_members[what_it_is(sealed(mutator.frame(), session), guard)] += 1
    guard.check_integrity()
    return of_strangers, of_members


def test_the_frames_that_are_changed_are_sound() -> None:
    guard, session = ReplayGuard(), Session()
    assert [what_it_is(frame, guard) for frame in FRAMES] == ["message"] * len(FRAMES)
    assert [what_it_is(frame, guard) for frame in FRAMES] == ["replay"] * len(FRAMES)
    assert [what_it_is(sealed(frame, session), guard) for frame in FRAMES] == ["message"] * len(FRAMES)


def test_sixty_thousand_hostile_frames_are_told_from_messages() -> None:
    of_strangers, of_members = count(60_000, seed=1)
    assert of_strangers["message"] == 0, "no changed frame passes without the token"
    assert of_strangers["stranger"] > 20_000
    # The control: with the token many reach the parser, and what is well-formed passes it.
    assert (
        of_members["stranger"] == of_members["replay"] == 0
        and of_members["malformed"] > 10_000
        and of_members["message"] > 500
    )


def reserve_of(request: FakeRequest) -> Reserve:
    """What a member gone mad would say to have blocks held for a request nobody has."""
    move = msgspec.msgpack.encode(FakeMove(request, "client", 0, (1, 2, 3)))
    kind = FakeEngine(FakeConfig(), no_mover).facts.kv_fingerprint
    return Reserve("mad", "r", "mad", 1, HERE, 1, move, 32, kind, 16, 0, 0.5)


@pytest.mark.timeout(60)
async def test_an_instance_serves_on_while_members_gone_mad_and_strangers_send_to_it() -> None:
    """1. A request decodes. 2. 5,000 hostile frames arrive, most with the right MAC. 3. It ends as if alone, and so
    does another one that is moved to and fro afterwards."""
    request, moved = a_request(21, 60, 300), a_request(22, 90, 1000)
    async with fleet_of(2, "--max-model-len", "1200") as fleet:
        member, service = fleet.members["i0"], fleet.services["i0"]
        messages = (
            *MESSAGES,
            Subscribe(fleet.gateway.mailbox.address, 5.0),
            MigrationEnvelope("mad", 1, HERE, 1, wire.encode(reserve_of(a_request(3, 40, 60)))),
        )
        mutator = Mutator(5, [encode(message, SEAL, member.address, Session()) for message in messages], HEADER_BYTES)
        mad = Session()
        await fleet.run("i0", "mine", request, 3)
        with push_socket(member.address) as enemy:
            for number in range(5_000):
                frame = mutator.frame()
                enemy.send(frame if number % 4 == 0 else sealed(frame, mad, member.address))
                if number % 50 == 0:
                    await service.loop.call(lambda engine: engine.check_integrity())
            fleet.gateway.submit(member, "last", a_request(23, 10, 3))
            await fleet.finish("mine", "last")
        assert fleet.gateway.tokens("mine") == expected_output(request)
        counts = service.mailbox.counts
        assert counts.strangers > 500 and counts.malformed > 500 and counts.received > 100, counts
        await fleet.run("i0", "moved", moved, 3)
        assert (await service.migrate("moved", fleet.members["i1"])).outcome == "committed"
        await fleet.finish("moved")
        assert fleet.gateway.tokens("moved") == expected_output(moved)
        await service.loop.call(lambda engine: engine.check_integrity())


@contextlib.contextmanager
def push_socket(address: str) -> Iterator[zmq.Socket[bytes]]:
    """Never waits, however much is queued."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    enemy = context.socket(zmq.PUSH)
    enemy.setsockopt(zmq.SNDHWM, 0)
    enemy.connect(address)
    try:
        yield enemy
    finally:
        enemy.close(linger=0)
        context.term()


def no_mover(store: KVStore) -> RankMover:
    hub = MemoryHub()
    params = CarrierParams()
    receiver = open_receiver(store, "memory://nobody", b"", params, hub)
    return RankMover(open_sender(store, b"", params, hub), receiver, push_timeout_s=1.0, num_threads=1)
