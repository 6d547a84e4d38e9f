"""How do tests write the reports of instances? Builders with round numbers."""

from __future__ import annotations

from instance.messages import LoadReport, RequestLoad, RequestReport

BLOCK_SIZE = 16


def load_report(
    instance: str = "instance-0",
    *,
    epoch: int = 1,
    step: int = 1,
    state: str = "serving",
    total_blocks: int = 1000,
    free_blocks: int = 1000,
    num_running: int = 0,
    num_waiting: int = 0,
    head_of_line_blocks: int = 0,
    reserved_blocks: int = 0,
    migrations_in: int = 0,
    migrations_out: int = 0,
    running_by_priority: tuple[tuple[int, int], ...] | None = None,
) -> LoadReport:
    return LoadReport(
        instance=instance,
        epoch=epoch,
        step=step,
        state=state,
        block_size=BLOCK_SIZE,
        total_blocks=total_blocks,
        free_blocks=free_blocks,
        reserved_blocks=reserved_blocks,
        num_running=num_running,
        num_waiting=num_waiting,
        running_by_priority=(
            running_by_priority if running_by_priority is not None else ((0, num_running),) if num_running else ()
        ),
        head_of_line_blocks=head_of_line_blocks,
        waiting_blocks=head_of_line_blocks,
        step_time_s=0.01,
        num_preemptions=0,
        migrations_in=migrations_in,
        migrations_out=migrations_out,
    )


def request_load(
    request_id: str,
    num_blocks: int = 10,
    *,
    external_id: str = "",
    status: str = "running",
    priority: int = 0,
    movable: bool = True,
    num_output_tokens: int = 1,
    max_tokens: int = 1000,
    tpot_s: float | None = None,
    ttft_s: float | None = None,
) -> RequestLoad:
    return RequestLoad(
        request_id=request_id,
        external_id=external_id or f"client-{request_id}",
        status=status,
        priority=priority,
        num_prompt_tokens=num_blocks * BLOCK_SIZE - 1,
        num_output_tokens=num_output_tokens,
        max_tokens=max_tokens,
        num_blocks=num_blocks,
        arrived_s=1.0,
        movable=movable,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def request_report(instance: str, *requests: RequestLoad, epoch: int = 1, step: int = 1) -> RequestReport:
    return RequestReport(instance, epoch, step, requests)
