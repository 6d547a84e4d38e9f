"""What must the nccl carrier do besides what all do? Over fake links here; tests/gpu has the real ones."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams, open_receiver, open_sender
from migration.transports.links import make_in_time, wait_done
from migration.transports.nccl import why_unavailable
from migration.types import BlockRange, MigrationId
from tests.support.byte_store import ByteStore
from tests.support.carrier_link import KINDS, PARAMS, SOURCE_TABLE, TARGET_TABLE, TOKEN, Kind, Link, M
from tests.support.fake_link import FakeGpus, FakeLink, FakeLinkMaker, FakePair

NCCL_KINDS = {name: kind for name, kind in KINDS.items() if name.startswith("nccl")}


@pytest.fixture(params=list(NCCL_KINDS.values()), ids=list(NCCL_KINDS))
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    made = Link(request.param)
    yield made
    made.close()


def test_a_link_is_made_at_the_first_push_and_used_again(link: Link) -> None:
    assert not link.gpus.links
    link.receiver.open(M, TARGET_TABLE)
    link.push()
    link.push()
    assert len(link.gpus.links) == 2  # one end each
    assert not any(end.is_aborted for end in link.gpus.links)


def test_the_next_chunk_is_packed_while_one_is_being_written(link: Link) -> None:
    link.receiver.open(M, TARGET_TABLE)
    with link.held(link.push) as (pushing, go_on):
        while max(end.num_packed for end in link.gpus.links) < 2:
            threading.Event().wait(0.001)
        go_on.set()
        pushing.result(20)
    assert link.num_equal() == 40


def test_a_refused_push_aborts_its_own_link_and_no_other(link: Link) -> None:
    """1. Two pushes have made two pairs. 2. One of them is refused. 3. Its ends are aborted, the others' are not."""
    other = open_sender(link.here, TOKEN, PARAMS, link_maker=FakeLinkMaker(link.here, link.gpus))
    link.receiver.open(M, TARGET_TABLE)
    other.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 8), timeout_s=20)
    link.push(0, 8)
    kept, ended = link.gpus.links[:2], link.gpus.links[2:]
    with pytest.raises(CopyFailed, match="no open ticket"):
        link.push(migration_id=MigrationId("unknown"))
    while not all(end.is_aborted for end in ended):
        threading.Event().wait(0.001)
    assert not any(end.is_aborted for end in kept)
    other.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(8, 40), timeout_s=20)
    assert link.num_equal() == 40
    other.close()


def test_a_chunk_that_never_arrives_ends_the_push_and_leaves_the_ticket_closable() -> None:
    link = Link(Kind("nccl://127.0.0.1"), CarrierParams(chunk_bytes=512, link_chunks=1, stall_s=1.0))
    link.receiver.open(M, TARGET_TABLE)
    link.push(0, 4)
    for end in link.gpus.links:
        end.is_deaf = True  # as when the sender's process is gone: NCCL says nothing
    with pytest.raises(CopyFailed, match="the deadline passed while a chunk was on its way"):
        link.push(4, 40)
    link.receiver.close_ticket(M)
    assert len(link.there.scattered) == 1
    link.receiver.open(M, TARGET_TABLE)
    link.push()  # over a new link
    assert link.num_equal() == 40
    assert len(link.gpus.links) == 4
    link.close()


def test_a_link_that_does_not_come_up_is_given_up_and_aborted_when_it_does() -> None:
    go_on, is_done = threading.Event(), threading.Event()
    late = FakeLink(ByteStore(1), FakePair(512), 512, is_direct=False)

    def hang() -> FakeLink:
        go_on.wait(20)
        is_done.set()
        return late

    with pytest.raises(CopyFailed, match="not up after"):
        make_in_time(hang, 0.05)
    assert not late.is_aborted
    go_on.set()
    assert is_done.wait(20)
    while not late.is_aborted:
        threading.Event().wait(0.001)


def test_a_link_that_comes_up_in_time_is_handed_over() -> None:
    link = FakeLink(ByteStore(1), FakePair(512), 512, is_direct=False)
    assert make_in_time(lambda: link, 20) is link
    assert not link.is_aborted


def test_whatever_fails_in_making_a_link_fails_the_push_only(link: Link) -> None:
    def fail() -> None:
        raise RuntimeError("unhandled cuda error")

    link.receiver.open(M, TARGET_TABLE)
    assert link.maker is not None
    link.maker.before_link = fail
    with pytest.raises(CopyFailed, match="unhandled cuda error"):
        link.push()
    link.maker.before_link = lambda: None
    link.push()
    assert link.num_equal() == 40


def test_waiting_for_a_slot_ends_at_its_deadline_and_at_an_abort() -> None:
    link = FakeLink(ByteStore(1), FakePair(512), 512, is_direct=False)
    link.receive(0, 128)
    with pytest.raises(CopyFailed, match="deadline"):
        wait_done(link, 0, time.monotonic() + 0.05)
    link.abort()
    with pytest.raises(CopyFailed, match="aborted"):
        wait_done(link, 0, time.monotonic() + 20)


def test_checksums_are_refused_not_ignored(link: Link) -> None:
    summed = open_sender(link.here, TOKEN, CarrierParams(checksum=True), link_maker=FakeLinkMaker(link.here, link.gpus))
    link.receiver.open(M, TARGET_TABLE)
    with pytest.raises(CopyFailed, match="no checksums"):
        summed.push(M, link.receiver.url, SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    assert not link.there.scattered
    summed.close()


def test_a_peer_without_a_gpu_says_so() -> None:
    receiver = open_receiver(ByteStore(2), "tcp://127.0.0.1", TOKEN, PARAMS)
    sender = open_sender(ByteStore(1), TOKEN, PARAMS, link_maker=FakeLinkMaker(ByteStore(1), FakeGpus()))
    with pytest.raises(CopyFailed, match="makes no GPU link"):
        sender.push(M, receiver.url.replace("tcp", "nccl"), SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    without = open_sender(ByteStore(1), TOKEN, PARAMS)
    with pytest.raises(CopyFailed, match="no GPU link can be made here"):
        without.push(M, receiver.url.replace("tcp", "nccl"), SOURCE_TABLE, BlockRange(0, 4), timeout_s=20)
    for end in (sender, without, receiver):
        end.close()


def test_without_nccl_its_receiver_is_not_opened_and_the_reason_is_given() -> None:
    with pytest.raises(ValueError, match="no carrier nccl: the KV memory is not a GPU's"):
        open_receiver(ByteStore(2), "nccl://127.0.0.1", TOKEN, PARAMS)
    reason = why_unavailable()
    assert reason is None or reason.startswith(("torch", "CuPy", "there is no CUDA device"))


def test_the_gpu_part_imports_where_there_is_no_msgspec() -> None:
    ban = "import sys; [sys.modules.__setitem__(name, None) for name in ('msgspec', 'zmq', 'ray', 'vllm', 'rich')]; "
    fine = "import migration.transports.nccl, migration.transports.links, migration.transports.store"
    assert subprocess.run([sys.executable, "-c", ban + fine], check=False).returncode == 0
    sockets = subprocess.run(
        [sys.executable, "-c", ban + "import migration.transports.frames"], check=False, capture_output=True
    )
    assert sockets.returncode != 0  # the control: the ban holds
