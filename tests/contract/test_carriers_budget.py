"""Who pays for a copy? Budgets at both ends, and how they are shared among pushes."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Callable

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams, open_sender
from migration.transports.budget import Budget
from migration.transports.frames import _HEADER, MAGIC, VERSION, Begin, FrameKind, FrameSocket
from migration.types import BlockRange, MigrationId
from tests.support.byte_store import ByteStore
from tests.support.carrier_link import (
    INDEX_BYTES,
    KINDS,
    SOCKET_KINDS,
    SOURCE_TABLE,
    TARGET_TABLE,
    TOKEN,
    Kind,
    Link,
    M,
)

CHUNK_BYTES = 512
"""4 block indexes."""
PACED = CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, bytes_per_s=20_000)
UNPACED = CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, burst_chunks=1, in_place_chunks=1)
CHUNK_S = CHUNK_BYTES / 20_000


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_a_receiver_paces_senders_that_do_not_pace_themselves(kind: Kind) -> None:
    """Two of them together get what one would; an urgent push does not wait, and is not counted."""
    link = Link(kind, PACED)
    tables = {M: SOURCE_TABLE, MigrationId("other"): SOURCE_TABLE}
    for migration_id in tables:
        link.receiver.open(migration_id, TARGET_TABLE)
    senders = [open_sender(ByteStore(3), TOKEN, UNPACED) for _ in tables]

    def push(number: int, migration_id: MigrationId) -> None:
        senders[number].push(
            migration_id, link.receiver.url, SOURCE_TABLE, BlockRange(0, 12), timeout_s=20, urgent=False
        )

    threads = [threading.Thread(target=push, args=pair) for pair in enumerate(tables)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 5 * CHUNK_S  # six chunks: the last may be taken after five others
    for sender in senders:
        sender.close()
    link.close()


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_an_urgent_push_does_not_wait_for_the_receivers_budget(kind: Kind) -> None:
    hour = CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, bytes_per_s=CHUNK_BYTES / 3600)
    link = Link(kind, hour)
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 40, urgent=True, timeout_s=20)
    assert link.num_equal() == 40
    link.close()


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_a_receiver_closes_at_once_though_a_push_waits_for_its_turn(kind: Kind) -> None:
    hour = CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, bytes_per_s=CHUNK_BYTES / 3600)
    link = Link(kind, hour)
    link.receiver.open(M, TARGET_TABLE)
    sender = open_sender(link.here, TOKEN, UNPACED)
    failures: list[BaseException] = []

    def push() -> None:
        try:
            sender.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 40), timeout_s=600, urgent=False)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    pushing = threading.Thread(target=push)
    pushing.start()
    link.wait_for_blocks(0, 4)  # the first chunk has its turn at once, the second in an hour
    link.receiver.close_ticket(M)
    link.receiver.close()
    pushing.join(20)
    assert len(failures) == 1
    sender.close()
    link.close()


WRONG: dict[str, tuple[str, Callable[[FrameSocket], None]]] = {
    "of an unknown migration": ("unknown", lambda frames: _announce_chunk(frames, 4 * INDEX_BYTES)),
    "too short": ("m", lambda frames: _announce_chunk(frames, 1)),
    "of another kind": ("m", lambda frames: frames.announce(FrameKind.SLOT_CHUNK, 0, 4)),
}


def _announce_chunk(frames: FrameSocket, num_bytes: int) -> None:
    frames._sock.sendall(_HEADER.pack(MAGIC, VERSION, FrameKind.CHUNK, num_bytes, 0, 4, 0))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_chunk_that_will_be_refused_books_none_of_the_budget(wrong: str) -> None:
    migration_id, say = WRONG[wrong]
    hour = CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, bytes_per_s=CHUNK_BYTES / 3600)
    link = Link(KINDS["tcp"], hour)
    link.receiver.open(M, TARGET_TABLE)
    frames = link.shake_hands()
    frames.send(FrameKind.BEGIN, Begin(migration_id, 0, 4, 4, has_checksum=False))
    say(frames)
    with pytest.raises((CopyFailed, OSError)):
        frames.set_deadline(time.monotonic() + 5)
        frames.expect(FrameKind.LANDED)
    frames.close()
    sender = open_sender(link.here, TOKEN, UNPACED)
    sender.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=5)  # a chunk: it has its turn at once
    assert link.num_equal(0, 4) == 4
    sender.close()
    link.close()


@pytest.mark.parametrize("kind", SOCKET_KINDS.values(), ids=SOCKET_KINDS)
def test_waiting_for_a_turn_is_no_stall(kind: Kind) -> None:
    link = Link(kind, CarrierParams(chunk_bytes=CHUNK_BYTES, num_slots=2, bytes_per_s=CHUNK_BYTES / 0.5, stall_s=0.3))
    link.receiver.open(M, TARGET_TABLE)
    sender = open_sender(link.here, TOKEN, UNPACED)
    sender.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 12), timeout_s=20)
    assert link.num_equal(0, 12) == 12
    sender.close()
    link.close()


@pytest.mark.parametrize("seed", range(20))
def test_pushes_that_share_a_budget_get_equal_parts_of_it(seed: int) -> None:
    """In made-up time: each asks for its next turn when its last chunk has gone, which takes each its own time."""
    rng = random.Random(seed)
    budget, num_pushes = Budget(1e6), rng.randint(2, 6)
    took_s = [rng.uniform(0.0, 0.4e-3) for _ in range(num_pushes)]
    served = [0] * num_pushes
    asking = [(0.0, push) for push in range(num_pushes)]
    for _ in range(num_pushes * 50):
        now_s, push = heapq.heappop(asking)
        turn_s = budget.take(1000, now_s)
        served[push] += 1
        heapq.heappush(asking, (turn_s + took_s[push], push))
        assert max(served) - min(served) <= 1
    assert sum(served) == num_pushes * 50


def test_a_budget_is_kept_however_many_share_it() -> None:
    budget = Budget(1e6)
    turns_s = [budget.take(1000, 0.0) for _ in range(100)]
    assert turns_s == pytest.approx([number * 1e-3 for number in range(100)])
