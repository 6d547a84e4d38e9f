"""Which carrier does a rank open, with which settings? Over byte stores and stand-ins for GPUs."""

from __future__ import annotations

import zlib

import pytest

from migration.errors import CopyFailed
from migration.transports import CarrierParams
from migration.types import BlockRange, MigrationId
from tests.support.byte_store import ByteStore
from tests.support.fake_link import FakeGpus, FakeLinkMaker

pytest.importorskip("vllm", reason="instance.vllm needs vLLM")

from instance.spec import Carrier
from instance.vllm import rank as module
from instance.vllm.rank import CPU_BYTES_PER_S, Carriage, RankEndpoint

TABLE = ((3, 1, 2), (7, 9, 8))
BLOCKS = BlockRange(0, 3)
M = MigrationId("m")


def push(here: ByteStore, there: ByteStore, carrier: str, params: CarrierParams) -> int:
    """Bytes that landed."""
    carriage = Carriage(Carrier(carrier), "127.0.0.1", "token")
    source = RankEndpoint(here, carriage, params)
    destination = RankEndpoint(there, carriage, params)
    try:
        assert destination.url.startswith(f"{carrier}://")
        destination.open(M, TABLE)
        return source.push(M, destination.url, TABLE, BLOCKS, urgent=True).num_bytes
    finally:
        source.shut_down()
        destination.shut_down()


@pytest.mark.parametrize("carrier", ["tcp", "shm"])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_rank_sums_what_it_sends_when_it_is_told_to(
    carrier: str, checksum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(range(100))
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: next(sums))  # never the same at both ends
    here, there = ByteStore(1), ByteStore(2)
    if checksum:
        with pytest.raises(CopyFailed, match="checksum"):
            push(here, there, carrier, CarrierParams(checksum=True))
    else:
        assert push(here, there, carrier, CarrierParams()) > 0


def test_a_rank_opens_both_ends_of_nccl_over_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus()
    monkeypatch.setattr(module, "nccl_maker", lambda store: FakeLinkMaker(store, gpus))
    here, there = ByteStore(1), ByteStore(2)
    assert push(here, there, "nccl", CarrierParams()) > 0
    for group, ids in enumerate(TABLE):
        assert [there.blocks[group][i] for i in ids] == [here.blocks[group][i] for i in ids]


def test_nccl_over_memory_that_is_no_gpus_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="not a GPU's"):
        RankEndpoint(ByteStore(1), Carriage(Carrier.NCCL, "127.0.0.1", "token"), CarrierParams())


@pytest.mark.parametrize(
    ("bytes_per_s", "is_cpu", "expected"),
    [(None, True, CPU_BYTES_PER_S), (None, False, None), (0.0, True, None), (5e6, True, 5e6), (5e6, False, 5e6)],
)
def test_copies_are_paced_as_told_else_as_suits_the_machine(
    bytes_per_s: float | None, is_cpu: bool, expected: float | None
) -> None:
    carriage = Carriage(Carrier.TCP, "127.0.0.1", "token", bytes_per_s=bytes_per_s)
    assert carriage.params(is_cpu=is_cpu).bytes_per_s == expected
    assert "token" not in repr(carriage).replace("token=", "")
