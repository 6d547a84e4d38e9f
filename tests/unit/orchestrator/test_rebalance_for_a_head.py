"""Which running request makes room for the head of a queue that has none?"""

from __future__ import annotations

import msgspec
import pytest

from migration.types import InstanceId
from orchestrator.policy.moves import InstanceView
from orchestrator.policy.rebalance import RebalanceParams, Resting, plan_rebalance
from tests.support.reports import load_report, request_load


@pytest.mark.parametrize(
    ("head_blocks", "expected"),
    [
        (0, "r05"),  # the shortest
        (21, "r60"),  # 20 are missing (one is free): one move is enough, and the smallest that does
        (41, "r60"),
        (61, "r60"),
        (62, "r90"),
        (92, "r90"),  # nobody alone makes room enough: the largest first
    ],
)
def test_for_a_head_without_room_the_smallest_moves_that_makes_it_by_itself(head_blocks: int, expected: str) -> None:
    sizes = [(f"r{size:02}", size) for size in (5, 10, 15, 60, 90)]
    rest = [request_load(f"fixed{number}", 73, movable=False) for number in range(3)]
    requests = (*(request_load(*size) for size in sizes), *rest)
    used = sum(one.num_blocks for one in requests)
    load = load_report("a", total_blocks=used + 1, free_blocks=1, num_running=len(requests))
    load = msgspec.structs.replace(load, num_waiting=int(head_blocks > 0), head_of_line_blocks=head_blocks)
    here = InstanceView(InstanceId("a"), load, requests, False, 4, 4, 0.1)
    empty = load_report("b", total_blocks=used + 1, free_blocks=used + 1)
    there = InstanceView(InstanceId("b"), empty, (), False, 4, 4, 0.1)
    moves = plan_rebalance((here, there), Resting(), RebalanceParams())
    assert moves[0].request_id == expected
    assert moves[0].reason.startswith("defragment" if head_blocks else "rebalance")
