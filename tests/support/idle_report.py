"""What does an idle instance of a hundred blocks report? The base that tests of dispatch change field by field."""

from __future__ import annotations

from typing import Any

import msgspec

from instance.messages import LoadReport

IDLE = LoadReport(
    instance="a",
    epoch=1,
    step=0,
    state="serving",
    block_size=16,
    total_blocks=100,
    free_blocks=100,
    reserved_blocks=0,
    num_running=0,
    num_waiting=0,
    running_by_priority=(),
    head_of_line_blocks=0,
    waiting_blocks=0,
    step_time_s=0.0,
    num_preemptions=0,
    migrations_in=0,
    migrations_out=0,
)


def report(instance: str = "a", **changes: Any) -> LoadReport:
    return msgspec.structs.replace(IDLE, instance=instance, **changes)
