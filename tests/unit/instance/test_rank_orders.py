"""Does a rank's server outlive an order that fails in a way nobody foresaw?"""

from __future__ import annotations

from typing import Any

import pytest

from migration.errors import CopyFailed
from migration.types import MigrationId

pytest.importorskip("vllm", reason="instance.vllm needs vLLM")

from instance.vllm.rank import NUM_ORDER_THREADS, RankServer, RemoteRank


class BrokenEndpoint:
    """As torch fails when its memory is gone."""

    def open(self, migration_id: MigrationId, block_table: object) -> None:
        raise RuntimeError("no memory")

    def close(self, migration_id: MigrationId) -> None:
        return None


def test_an_order_that_raises_anything_is_answered_and_the_next_one_served() -> None:
    endpoint: Any = BrokenEndpoint()
    address = "ipc://@kvferry-test-rank-orders"
    server = RankServer(endpoint, address, "token")
    rank = RemoteRank("tcp://127.0.0.1:1", address, "token")
    for _ in range(NUM_ORDER_THREADS + 1):
        with pytest.raises(CopyFailed, match="no memory"):
            rank.open(MigrationId("m"), ((1,),))
    rank.close(MigrationId("m"))
    rank.shut_down()
    server.close()
