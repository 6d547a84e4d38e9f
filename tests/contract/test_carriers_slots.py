"""What does a receiver make of a sender that fills shared slots otherwise than it said? Nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migration.transports.frames import Begin, FrameKind, FrameSocket
from migration.transports.shm import OfferedSegment
from tests.support.byte_store import ByteStore
from tests.support.carrier_link import INDEX_BYTES, KINDS, TARGET_TABLE, Link, M

SLOT_BLOCKS = 4
PAYLOAD = (memoryview(bytes(SLOT_BLOCKS * INDEX_BYTES)),)
Said = Callable[[FrameSocket], None]


def announce(first: int, count: int) -> Said:
    return lambda frames: frames.announce(FrameKind.SLOT_CHUNK, first, count)


WRONG: dict[str, tuple[int, Said]] = {
    "a later chunk first": (SLOT_BLOCKS, announce(SLOT_BLOCKS, SLOT_BLOCKS)),
    "fewer blocks": (SLOT_BLOCKS, announce(0, SLOT_BLOCKS - 1)),
    "more blocks": (SLOT_BLOCKS, announce(0, SLOT_BLOCKS + 1)),
    "chunks larger than a slot": (SLOT_BLOCKS + 1, announce(0, SLOT_BLOCKS + 1)),
    "another kind": (SLOT_BLOCKS, lambda frames: frames.send_chunk(FrameKind.CHUNK, 0, SLOT_BLOCKS, 0, PAYLOAD)),
    "a payload": (SLOT_BLOCKS, lambda frames: frames.send_chunk(FrameKind.SLOT_CHUNK, 0, SLOT_BLOCKS, 0, PAYLOAD)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_slots_filled_otherwise_than_said_end_the_connection_and_nothing_else(wrong: str) -> None:
    chunk_blocks, say = WRONG[wrong]
    link = Link(KINDS["shm"])
    link.receiver.open(M, TARGET_TABLE)
    offered = OfferedSegment(2, SLOT_BLOCKS * INDEX_BYTES)
    frames = link.shake_hands(offered)
    offered.close()
    frames.send(FrameKind.BEGIN, Begin("m", 0, 3 * SLOT_BLOCKS, chunk_blocks, has_checksum=False))
    with pytest.raises(ConnectionError):  # some are over at their beginning
        say(frames)
        frames.expect(FrameKind.LANDED)
    frames.close()
    assert not link.there.scattered and link.there.blocks == ByteStore(2).blocks
    link.receiver.tickets.check_integrity()
    link.push()
    assert link.num_equal() == 40
    link.close()


def test_the_last_chunk_may_be_shorter_than_a_slot() -> None:
    """The control, too: said as it is, it lands."""
    link = Link(KINDS["shm"])
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 2 * SLOT_BLOCKS + 3)
    assert [len(block_ids[0]) for block_ids in link.there.scattered] == [SLOT_BLOCKS, SLOT_BLOCKS, 3]
    assert link.num_equal(0, 2 * SLOT_BLOCKS + 3) == 2 * SLOT_BLOCKS + 3
    link.close()
