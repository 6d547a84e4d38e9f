"""What does a checksum per chunk promise? A byte turned on the way is refused with its reason, and no page has it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams, open_sender
from migration.transports.frames import Begin, FrameKind, FrameSocket, Hello, Landed, Welcome
from migration.transports.shm import OfferedSegment
from migration.types import BlockRange
from tests.support.byte_store import ByteStore, MappedByteStore
from tests.support.carrier_link import (
    INDEX_BYTES,
    SOCKET_KINDS,
    SOURCE_TABLE,
    TARGET_TABLE,
    TOKEN,
    Kind,
    Link,
    M,
    StrangeReceiver,
)

SUMMED = CarrierParams(chunk_bytes=512, num_slots=2, burst_chunks=1, in_place_chunks=1, link_chunks=1, checksum=True)
CHUNK = bytes(range(256)) * 2
NUM_BLOCKS = len(CHUNK) // INDEX_BYTES


@pytest.fixture(params=list(SOCKET_KINDS.values()), ids=list(SOCKET_KINDS))
def socket_link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


def push_by_hand(link: Link, *, has_checksum: bool, turned_at: int | None) -> None:
    """One chunk with its sum, of which one byte is turned on the way, after it was summed."""
    offered = OfferedSegment(2, len(CHUNK)) if link.kind.url.startswith("shm") else None
    frames = link.shake_hands(offered)
    data = bytearray(CHUNK)
    crc32 = zlib.crc32(data)
    if turned_at is not None:
        data[turned_at] ^= 1
    frames.send(FrameKind.BEGIN, Begin("m", 0, NUM_BLOCKS, NUM_BLOCKS, has_checksum))
    if offered is None:
        frames.send_chunk(FrameKind.CHUNK, 0, NUM_BLOCKS, crc32, (memoryview(data),))
    else:
        offered.segment.slot(0, len(data))[:] = data
        frames.send_chunk(FrameKind.SLOT_CHUNK, 0, NUM_BLOCKS, crc32, ())
        offered.close()
    try:
        frames.receive_control(frames.expect(FrameKind.LANDED), Landed)
    finally:
        frames.close()


@pytest.mark.parametrize("turned_at", [0, 300, len(CHUNK) - 1])
def test_a_turned_byte_is_refused_and_no_page_is_written(socket_link: Link, turned_at: int) -> None:
    link = socket_link
    link.receiver.open(M, TARGET_TABLE)
    with pytest.raises(CopyFailed, match="checksum of a chunk does not match"):
        push_by_hand(link, has_checksum=True, turned_at=turned_at)
    assert not link.there.scattered
    assert link.there.blocks == ByteStore(2).blocks
    link.receiver.tickets.check_integrity()
    link.push()  # the ticket is as good as before
    assert link.num_equal() == 40


def test_the_same_chunk_unturned_lands(socket_link: Link) -> None:
    socket_link.receiver.open(M, TARGET_TABLE)
    push_by_hand(socket_link, has_checksum=True, turned_at=None)
    assert len(socket_link.there.scattered) == 1


def test_without_a_sum_a_turned_byte_is_not_noticed(socket_link: Link) -> None:
    """The control: it is the sum that refuses."""
    socket_link.receiver.open(M, TARGET_TABLE)
    push_by_hand(socket_link, has_checksum=False, turned_at=300)
    assert len(socket_link.there.scattered) == 1


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_sums_do_not_disturb_a_sound_push(kind: Kind) -> None:
    link = Link(kind, SUMMED)
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    assert link.num_equal() == 40
    link.close()


@pytest.mark.parametrize("store", [ByteStore, MappedByteStore], ids=["with a buffer", "in place"])
def test_a_sender_sums_every_chunk(store: type[ByteStore]) -> None:
    heard: list[tuple[int, int]] = []

    def story(frames: FrameSocket) -> None:
        frames.receive_control(frames.expect(FrameKind.HELLO), Hello)
        frames.send(FrameKind.WELCOME, Welcome(has_segment=False))
        assert frames.receive_control(frames.expect(FrameKind.BEGIN), Begin).has_checksum
        for _ in range(2):
            frame = frames.expect(FrameKind.CHUNK)
            data = bytearray(frame.num_bytes)
            frames.receive_into(memoryview(data))
            heard.append((frame.crc32, zlib.crc32(data)))
        frames.send(FrameKind.LANDED, Landed(8, 8 * INDEX_BYTES))

    receiver, sender = StrangeReceiver(story), open_sender(store(1), TOKEN, SUMMED)
    sender.push(M, receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20)
    assert len(heard) == 2
    assert all(said == found for said, found in heard)
    receiver.join()
    sender.close()
