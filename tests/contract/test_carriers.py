"""Do all carriers keep the same promises? One suite over memory, tcp (with a buffer and in place) and shm."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams, RankMover
from migration.types import BlockRange, CopyReceipt, MigrationId
from tests.support.byte_store import GROUP_BLOCK_BYTES, ByteStore
from tests.support.carrier_link import INDEX_BYTES, KINDS, SOURCE_TABLE, TARGET_TABLE, Kind, Link, M


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


def test_blocks_land_at_the_receivers_own_ids_in_every_group(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    assert link.num_equal() == 0  # the control: before the push nothing is equal
    receipt = link.push()
    assert receipt == CopyReceipt(40, 40 * INDEX_BYTES)
    assert link.num_equal() == 40


def test_a_part_of_the_range_lands_and_nothing_else_is_written(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    untouched = ByteStore(2)
    link.push(7, 18)
    assert link.num_equal(7, 18) == 11
    written = {block for ids in link.there.scattered for block in ids[0]}
    assert written == set(TARGET_TABLE[0][7:18])
    for block in set(range(256)) - written:
        assert link.there.blocks[0][block] == untouched.blocks[0][block]


def test_chunks_are_written_in_order(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(3, 40)
    assert [block for ids in link.there.scattered for block in ids[0]] == list(TARGET_TABLE[0][3:40])


def test_pushes_follow_each_other_and_the_last_one_wins(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 20)
    link.push(20, 39)
    link.here.blocks[0][SOURCE_TABLE[0][38]][:] = b"\xff" * GROUP_BLOCK_BYTES[0]
    link.push(38, 40)
    assert link.num_equal() == 40


def test_an_empty_range_moves_nothing(link: Link) -> None:
    assert link.push(5, 5) == CopyReceipt(0, 0)


def test_without_a_ticket_nothing_is_written(link: Link) -> None:
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push()
    assert not link.there.scattered


def test_a_closed_ticket_is_closed(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 4)
    link.receiver.close_ticket(M)
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push(4, 8)
    assert link.num_equal(4, 8) == 0
    link.receiver.close_ticket(M)  # again: nothing to do


def test_blocks_outside_the_ticket_are_refused_until_it_has_grown(link: Link) -> None:
    link.receiver.open(M, tuple(group[:20] for group in TARGET_TABLE))
    with pytest.raises(CopyFailed, match="outside the ticket"):
        link.push(16, 21)
    link.receiver.open(M, TARGET_TABLE)
    link.push(16, 21)
    assert link.num_equal(16, 21) == 5


def test_a_ticket_cannot_name_blocks_that_do_not_exist(link: Link) -> None:
    with pytest.raises(ValueError, match="block ids"):
        link.receiver.open(M, ((0, 256), (0, 1)))
    with pytest.raises(ValueError, match="groups"):
        link.receiver.open(M, ((0, 1),))


def test_closing_waits_for_the_scatter_that_is_under_way(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    with link.held(link.push) as (pushing, go_on), ThreadPoolExecutor(1) as threads:
        assert link.receiver.try_close_ticket(M) is False
        closing = threads.submit(link.receiver.close_ticket, M)
        assert not closing.done()
        go_on.set()
        closing.result(20)
        num_scattered = len(link.there.scattered)
        with pytest.raises(CopyFailed):
            pushing.result(20)
    assert len(link.there.scattered) == num_scattered == 1  # nothing more after the close


def test_concurrent_migrations_do_not_mix(link: Link) -> None:
    ids = [MigrationId(f"m{number}") for number in range(4)]
    for number, migration_id in enumerate(ids):
        part = slice(number * 10, number * 10 + 10)
        link.receiver.open(migration_id, tuple(group[part] for group in TARGET_TABLE))

    def push(number: int) -> None:
        part = tuple(group[number * 10 : number * 10 + 10] for group in SOURCE_TABLE)
        for _ in range(5):
            link.sender.push(ids[number], link.receiver.url, part, BlockRange(0, 10), timeout_s=20, urgent=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(push, range(4)))
    assert link.num_equal() == 40
    link.receiver.tickets.check_integrity()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_wrong_token_is_refused(kind: Kind) -> None:
    link = Link(kind, sender_token=b"guess")
    link.receiver.open(M, TARGET_TABLE)
    with pytest.raises(CopyFailed, match="token"):
        link.push()
    assert not link.there.scattered
    link.close()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_budget_paces_a_push_but_not_an_urgent_one(kind: Kind) -> None:
    params = CarrierParams(chunk_bytes=512, num_slots=2, bytes_per_s=20_000)
    link = Link(kind, params)
    link.receiver.open(M, TARGET_TABLE)
    started = time.monotonic()
    link.push(0, 12, urgent=False)  # three chunks: the third may start after 1,024 / 20,000 s
    assert time.monotonic() - started >= 0.05
    with pytest.raises(CopyFailed, match="deadline"):
        link.push(0, 40, urgent=False, timeout_s=0.1)
    link.push(0, 40, urgent=True)
    assert link.num_equal() == 40
    link.close()


def test_breaking_off_ends_a_push_at_once(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(20)

    link.there.before_scatter = hold
    with ThreadPoolExecutor(1) as threads:
        pushing = threads.submit(link.push)
        assert entered.wait(20)
        link.sender.break_off(M)
        go_on.set()
        with pytest.raises(CopyFailed, match="broken off"):
            pushing.result(20)
    link.there.before_scatter = lambda: None
    link.push()  # the next one is not harmed
    assert link.num_equal() == 40


def test_nobody_at_the_url_fails(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.receiver.close()
    with pytest.raises(CopyFailed):
        link.push()


def test_a_slow_receiver_gets_everything_in_order_within_the_deadline(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.there.before_scatter = lambda: threading.Event().wait(0.005)
    link.push()
    assert link.num_equal() == 40
    written = [block for ids in link.there.scattered for block in ids[0]]
    assert written == list(TARGET_TABLE[0])
    assert len(link.there.scattered) > 1  # the control: it was slow more than once


def test_a_deadline_passes_during_a_slow_push(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    link.there.before_scatter = lambda: threading.Event().wait(0.05)
    with pytest.raises(CopyFailed):
        link.push(timeout_s=0.12)  # ten chunks
    assert len(link.there.scattered) < 10
    link.receiver.close_ticket(M)
    num_scattered = len(link.there.scattered)
    with pytest.raises(CopyFailed):
        link.push()
    assert len(link.there.scattered) == num_scattered


def test_a_store_that_raises_anything_fails_the_push_and_nothing_else(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    link.receiver.open(M, TARGET_TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(link.here, "views" if link.kind.is_mapped else "gather", fail)
        with pytest.raises(CopyFailed, match="illegal memory access"):
            link.push()
    assert not link.there.scattered
    link.push()
    assert link.num_equal() == 40


def test_the_mover_pushes_and_closes_from_asyncio(link: Link) -> None:
    mover = RankMover(link.sender, link.receiver, push_timeout_s=20.0, num_threads=2)

    async def story() -> None:
        await mover.open(M, TARGET_TABLE)
        receipt = await mover.push(M, mover.endpoints(), SOURCE_TABLE, BlockRange(0, 40), urgent=True)
        assert receipt.num_blocks == 40
        await mover.close(M)
        with pytest.raises(CopyFailed):
            await mover.push(M, mover.endpoints(), SOURCE_TABLE, BlockRange(0, 4), urgent=True)

    asyncio.run(story())
    assert link.num_equal() == 40
    mover.shut_down()
