"""How is the demo played? Start, run with moves, run undisturbed, compare, tell: the shell around the pure parts."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

from rich.console import Console

from orchestrator.config import ServeConfig
from orchestrator.demo.client import Run, Tally, send_all
from orchestrator.demo.cluster import Cluster, demo_config, running_cluster, start_ray
from orchestrator.demo.drains import DrainPlan, conduct
from orchestrator.demo.options import DemoOptions, OptionError, small_model
from orchestrator.demo.picture import draw
from orchestrator.demo.result import Result, spread_of, this_machine, write_result
from orchestrator.demo.screen import Scene, shown
from orchestrator.demo.summary import Passed, Summary, failures, summarise
from orchestrator.demo.tables import summary_table
from orchestrator.demo.trace import TraceError, read_trace
from orchestrator.demo.warmup import warm_up
from orchestrator.demo.watch import History, watch
from orchestrator.demo.workload import Limits, PlannedRequest, from_trace, generate, shape_for
from orchestrator.errors import OrchestratorError, StartUpError
from orchestrator.runtime.ray_cluster import RayCluster

MAX_IN_FLIGHT = 22
"""So many answers fit into one instance while the other is drained, with room to grow."""
LATE_SHARE = 1.05
"""What could not be sent within this share of the duration (a slow machine) is left out of both runs."""
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def play(options: DemoOptions) -> int:
    """The whole demo; returns the exit code."""
    console = Console()
    try:
        options.check()
        plan = _make_plan(options)
        config = demo_config(options.model or small_model(), options)
    except (OptionError, TraceError) as error:
        return _refuse(error)
    ray: RayCluster | None = None
    signal.signal(signal.SIGTERM, _interrupt)  # until the event loop takes both signals over
    try:
        ray = start_ray(config, console)
        return asyncio.run(_session(ray, options, config, plan, console))
    except StartUpError as error:
        return _refuse(error)
    except OrchestratorError as error:
        sys.stderr.write(f"kvferry demo: {error}\n")
        return EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped; nothing is left running")
        return EXIT_INTERRUPTED
    finally:
        if ray is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the rest takes a few seconds at most
            ray.shutdown()


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"kvferry demo: {error}\n")
    return EXIT_BAD_INPUT


def _make_plan(options: DemoOptions) -> tuple[PlannedRequest, ...]:
    rng = Random(options.seed)
    limits = Limits()
    if options.trace is not None:
        return from_trace(rng, read_trace(options.trace), options.duration_s, limits)
    return generate(rng, shape_for(options.duration_s), limits)


def _cancel_on_signals() -> None:
    """The first SIGINT or SIGTERM cancels the session, which stops everything on its way out; more change nothing."""
    task = asyncio.current_task()
    assert task is not None
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


@dataclass(frozen=True, slots=True)
class _Pass:
    """How one run differs from the other."""

    name: str
    title: str
    has_drains: bool
    send_until_s: float


async def _session(
    ray: RayCluster, options: DemoOptions, config: ServeConfig, plan: tuple[PlannedRequest, ...], console: Console
) -> int:
    _cancel_on_signals()
    stamp = f"{time.time_ns() // 1_000_000:x}"
    first = _Pass(f"demo{stamp}a", "uneven load, requests move", True, options.duration_s * LATE_SHARE)
    second = _Pass(f"demo{stamp}b", "the same requests, undisturbed", False, float("inf"))
    async with running_cluster(ray, config, console) as cluster:
        await warm_up(cluster.base_url, cluster.model, f"warm{stamp}", console)
        history, moved = await _run(cluster, plan, first, options, console)
        await cluster.stop_rebalancing()
        sent = {answer.index for answer in moved.answers}
        again = tuple(request for request in plan if request.index in sent)
        _, undisturbed = await _run(cluster, again, second, options, console)
    summary = summarise(moved, undisturbed)
    reasons = failures(summary, options.bars)
    console.print(summary_table(summary))
    draw(history, _title(summary), options.out / "moves.png")
    write_result(options.out / "result.json", _result(summary))
    console.print(f"wrote {options.out / 'result.json'} and {options.out / 'moves.png'}", highlight=False)
    for reason in reasons:
        console.print(f"[bold red]FAILED[/]: {reason}", highlight=False, soft_wrap=True)
    if not reasons:
        console.print("[bold green]Every bar holds.[/]")
    return EXIT_FAILED if reasons else 0


async def _run(
    cluster: Cluster, plan: tuple[PlannedRequest, ...], kind: _Pass, options: DemoOptions, console: Console
) -> tuple[History, Passed]:
    """One pass over the plan, watched, drained if wanted."""
    run = Run(kind.name, cluster.base_url, cluster.model, kind.name, MAX_IN_FLIGHT, kind.send_until_s)
    tally = Tally(num_planned=len(plan))
    history = History(run_name=kind.name, started_s=time.monotonic())
    try:
        async with asyncio.TaskGroup() as group, shown(console, Scene(kind.title, tally, history)):
            watcher = group.create_task(watch(cluster.fleet, history))
            drains = group.create_task(_drains(cluster, history, options.duration_s, kind))
            answers = await send_all(plan, run, tally)
            await drains
            watcher.cancel()
    except* OrchestratorError as errors:
        raise errors.exceptions[0] from None
    took_s = time.monotonic() - history.started_s
    history.note(await cluster.fleet.observe(), time.monotonic())
    return history, Passed(answers, tuple(history.moves.values()), tuple(history.drains), took_s)


async def _drains(cluster: Cluster, history: History, duration_s: float, kind: _Pass) -> None:
    if kind.has_drains:
        await conduct(cluster.fleet, history, duration_s, DrainPlan())


def _title(summary: Summary) -> str:
    return (
        f"kvferry demo: {summary.num_requests} requests, {summary.num_running_moves} live moves, "
        f"{summary.comparison.mismatched_tokens} mismatched tokens, {len(summary.errors)} errors"
    )


def _result(summary: Summary) -> Result:
    return Result(
        name="demo",
        command=shlex.join(["kvferry", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=summary.figures(),
        arms={
            "moved": {
                "requests": summary.num_requests,
                "tokens": summary.num_tokens,
                "took_s": round(summary.moved_s, 2),
                "blocks_moved": summary.num_blocks,
                "bytes_moved": summary.num_bytes,
                **{f"migrations_{outcome}": count for outcome, count in summary.outcomes},
            },
            "undisturbed": {
                "requests": summary.comparison.num_answers,
                "took_s": round(summary.undisturbed_s, 2),
                "migrations_committed": summary.num_replay_moves,
            },
        },
        n={
            "requests": summary.num_requests,
            "compared_answers": summary.comparison.num_answers,
            "hand_overs": len(summary.hand_overs),
            "drains": len(summary.drains),
        },
        spread={
            "downtime_ms": spread_of([hand_over.gap_s * 1e3 for hand_over in summary.hand_overs]),
            "downtime_steps": spread_of([hand_over.num_steps for hand_over in summary.hand_overs]),
            "stopped_ms": spread_of([stopped_s * 1e3 for stopped_s in summary.stopped_s]),
            "drain_s": spread_of([drain.drain_s for drain in summary.drains if drain.drain_s is not None]),
        },
        machine=this_machine(),
    )
