"""Does a request that is moved put out exactly what it would have put out undisturbed, over thousands of requests?

    python -m bench.exactness [--requests 10000] [--quick] [--only KIND --seed N] [--control NAME] [--json FILE]

Two real instances in processes of their own (the small model, float32), with real agents, drivers and carriers; this
process is their gateway. Every request follows from its kind and its seed (exactness_kinds.py) and runs at least twice:

- unmoved, beside other requests: this is what the moved run must equal;
- moved in the same traffic: 1 to 4 hops at random points, live or blocking (re-prefill is a kind of its own), while
  others move to and fro between the same two instances, and some clients leave meanwhile;
- alone, with nothing else in its instance: every 8th request, and each one of which the two differ (it then decides).
  If unmoved and alone differ, that is vLLM's own: another batch beside a request may change float32 sums in their last
  bits. It is counted apart and never subtracted.

Compared are tokens, finish and stop reason, the number of prefill reports, and logprobs (ids, values, ranks) and
prompt logprobs byte for byte: on the CPU in float32 with one OpenMP thread vLLM's arithmetic does not depend on what
else is in the batch, so no tolerance is needed, and the unmoved arm shows whether that holds. Only re-prefill (no KV is
carried) is compared without logprobs. Stop strings and n > 1 belong to the gateway: their text is what vLLM's
OutputProcessor and ParentRequest make of the stream.

A request counts as migrated when at least one move committed and found it in the state its kind is about (half
computed, waiting, preempted ...). After every batch both instances must be idle, whole and without a block in use.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from vllm.tokenizers import get_tokenizer

from bench.exactness_compare import Compound, was_found
from bench.exactness_kinds import BY_NAME, ELSEWHERE, KINDS, NOT_MOVED, Kind, Plan, Vocabulary, plan_of
from bench.exactness_progress import (
    BatchRecord,
    HopRecord,
    Progress,
    ProgressError,
    RequestRecord,
    SessionRecord,
    Verdict,
    code_digest,
    result_of,
    table_of,
)
from bench.exactness_runs import NAMES, Runs
from bench.exactness_sabotage import CONTROLS
from bench.exactness_scenes import MODEL, SHARES, Scene, engine_argv, program_of
from bench.fleet import Fleet, FleetError
from bench.models.pictured import ImageFront
from bench.report import write_result

DEFAULT_PROGRESS = Path("bench-out/exactness.jsonl")
LOGS = DEFAULT_PROGRESS.parent
"""Where the instances print to."""
REQUESTS, QUICK_REQUESTS = 10_000, 300
BATCH = 24
BATCHES_A_LINE = 10
"""Where no bar can be drawn, progress is told this often."""
LIMITS = {"max_migrations_out": 4, "max_migrations_in": 4, "copy_bytes_per_s": 100e6}
"""Of each instance. At the budget that a machine without a GPU has by itself half of the requests end before they have
moved."""
MAX_TRIES = 10
"""A kind is given up when so many times its share (and some batches) did not find enough of it in its state."""
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def shares_of(kinds: Sequence[Kind], num_requests: int) -> dict[str, int]:
    """How many migrated requests of each kind are wanted; at least one."""
    whole = sum(SHARES[kind.scene] for kind in kinds)
    ends = [round(num_requests * end / whole) for end in accumulate(SHARES[kind.scene] for kind in kinds)]
    return {kind.name: max(1, end - begin) for kind, begin, end in zip(kinds, [0, *ends], ends, strict=False)}


class Bench:
    """One start of the bench."""

    def __init__(self, options: argparse.Namespace, progress: Progress, console: Console) -> None:
        self._options = options
        self._progress = progress
        self._console = console
        self._kinds = KINDS if not options.only else (BY_NAME[options.only],)
        self._shares = shares_of(self._kinds, options.requests)
        self._vocabulary = Vocabulary(get_tokenizer(str(MODEL)))

    async def run(self) -> None:
        """Scene by scene until every kind has its share. Raises FleetError when an instance does not start or dies."""
        with Bar(console=self._console, transient=True) as bar:
            task = bar.add_task("migrated", total=self._options.requests, completed=self._progress.num_migrated)
            for scene in Scene:
                while self._wanted(scene):
                    self._console.print(f"{scene.value}: starting two instances ...")
                    argv, program = engine_argv(scene), program_of(scene, self._options.control)
                    front = ImageFront(argv) if scene is Scene.PICTURED else None
                    async with Fleet.running(NAMES, argv, program, LOGS, **LIMITS) as fleet:
                        is_sound, num_batches = True, 0
                        while is_sound and self._wanted(scene):
                            is_sound = await self._batch(fleet, scene, front)
                            bar.update(task, completed=self._progress.num_migrated)
                            if not self._console.is_terminal and num_batches % BATCHES_A_LINE == 0:
                                self._say_where(scene)
                            num_batches += 1

    def _say_where(self, scene: Scene) -> None:
        figures = self._progress.figures()
        done, wrong = figures["migrated_requests"], figures["mismatched_requests"]
        rate = f"{figures['requests_per_s'] or 0.0:.1f} a second"
        self._console.print(f"{scene.value}: {done} of {self._options.requests} migrated, {wrong} mismatched, {rate}")

    def _tried(self, kind: Kind) -> int:
        return sum(record.kind == kind.name for record in self._progress.requests)

    def _missing(self, kind: Kind) -> int:
        have = sum(record.kind == kind.name for record in self._progress.migrated)
        missing = max(0, self._shares[kind.name] - have)
        if missing and self._tried(kind) >= MAX_TRIES * self._shares[kind.name] + 4 * BATCH:
            return 0
        return missing

    def _wanted(self, scene: Scene) -> list[Kind]:
        return [kind for kind in self._kinds if kind.scene is scene and self._missing(kind)]

    async def _batch(self, fleet: Fleet, scene: Scene, front: ImageFront | None) -> bool:
        """Run one batch and write it down. False: the instances cannot be used any more."""
        begun_s = time.monotonic()
        missing = {kind: self._missing(kind) for kind in self._wanted(scene)}
        tried = {kind: self._tried(kind) for kind in missing}
        plans: list[Plan] = []
        while len(plans) < BATCH and (scene.needs_crowd or any(count > 0 for count in missing.values())):
            kind = max(missing, key=lambda kind: missing[kind])
            plans.append(plan_of(kind, self._options.seed + tried[kind], self._vocabulary))
            missing[kind] -= 1
            tried[kind] += 1
        runs = Runs(fleet, Random(f"{self._options.seed} {len(self._progress.batches)}"), front)
        compounds = await runs.batch(plans)
        leaked, told = await runs.settle()
        records = [record_of(compound) for compound in compounds]
        batch = BatchRecord(scene.value, leaked, told, time.monotonic() - begun_s)
        self._progress.add(*records, batch)
        for compound, record in zip(compounds, records, strict=True):
            if record.difference or record.unmoved_difference:
                self._tell(compound, record)
            for fault in compound.moved.faults:
                self._console.print(f"broken off, and the request went on: {record.kind}, seed {record.seed}: {fault}")
        if told:
            self._console.print(f"LEAK after a batch of {scene.value}: {leaked} blocks; {told}", style="red")
        has_errors = any(ran.error for c in compounds for ran in (c.moved, c.unmoved))
        return not told and not has_errors

    def _tell(self, compound: Compound, record: RequestRecord) -> None:
        plan, control = compound.plan, f" --control {self._options.control}" if self._options.control else ""
        if record.unmoved_difference:
            self._console.print(f"unmoved in traffic, {plan.kind.name}, seed {plan.seed}: {record.unmoved_difference}")
        if not record.difference:
            return
        moves = ", ".join(
            f"{hop.mode_and_stages} {NAMES[hop.source]}->{NAMES[1 - hop.source]} at token {hop.tokens} "
            f"({hop.moved_tokens} settled, {hop.cached_tokens} cached)"
            for hop in record.hops
        )
        self._console.print(
            f"MISMATCH {plan.kind.name}, seed {plan.seed}: {record.difference}\n  moves: {moves or 'none committed'}\n"
            f"  sampling: {dict(plan.sampling)} {dict(plan.grammar or {})}\n  prompt: {list(plan.prompt)}\n"
            f'  again: python -m bench.exactness --requests 1 --only "{plan.kind.name}" --seed {plan.seed}{control}',
            style="red",
            highlight=False,
            soft_wrap=True,
        )


def record_of(compound: Compound) -> RequestRecord:
    plan, moved = compound.plan, compound.moved
    told = compound.difference or ""
    hops = tuple(
        HopRecord(
            hop.leg.sequence,
            hop.leg.source,
            f"{hop.leg.mode} {hop.summary.num_stages}+{hop.summary.tail_blocks}",
            hop.tokens,
            hop.summary.moved_tokens,
            hop.summary.cached_tokens,
            hop.summary.stopped_s,
        )
        for hop in moved.moves
    )
    if told:
        verdict = Verdict.MISMATCHED if hops else Verdict.NOT_MOVED
    elif not hops:
        verdict = Verdict.NOT_MOVED
    else:
        verdict = Verdict.EXACT if was_found(plan, moved) else Verdict.OTHER_STATE
    return RequestRecord(
        kind=plan.kind.name,
        seed=plan.seed,
        verdict=verdict,
        num_tokens=sum(len(seen.tokens) for seen in compound.unmoved.seen),
        hops=hops,
        num_refusals=len(moved.refusals),
        num_faults=len(moved.faults),
        difference=told,
        lost=moved.lost,
        doubled=moved.doubled,
        is_run_alone=compound.alone is not None,
        unmoved_difference=compound.unmoved_difference or "",
        prompt=plan.prompt if told else (),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.exactness", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"migrated requests (default {REQUESTS:,})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests, begun anew")
    parser.add_argument("--only", choices=[*BY_NAME], metavar="KIND", help="one kind of request")
    parser.add_argument("--seed", type=int, default=1, help="of the first request of each kind (default 1)")
    parser.add_argument("--control", choices=[*CONTROLS], help="let the instances forget something; must be noticed")
    parser.add_argument(
        "--progress",
        type=Path,
        help=f"file to go on from (default {DEFAULT_PROGRESS}; none with --quick, --only and --control)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget the progress file")
    parser.add_argument("--json", type=Path, help="write the result here")
    options: argparse.Namespace = parser.parse_args()
    if options.quick:
        options.requests = QUICK_REQUESTS
    if options.requests < 1:
        parser.error("--requests must be at least 1")
    if options.progress is None and not (options.quick or options.only or options.control):
        options.progress = DEFAULT_PROGRESS
    return options


def report(options: argparse.Namespace, progress: Progress, console: Console) -> int:
    """Print (and write) what came of it; the exit status."""
    command = " ".join(["python", "-m", "bench.exactness", *sys.argv[1:]])
    result = result_of(progress, command)
    console.print(table_of(progress))
    console.print("refused, not moved: " + "; ".join(NOT_MOVED), highlight=False)
    console.print("not in this run, but in tests/integration: " + "; ".join(ELSEWHERE), highlight=False)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    if options.control:
        console.print(f"control {options.control}: {CONTROLS[options.control]}", highlight=False)
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}", highlight=False)
    is_complete = progress.num_migrated >= options.requests
    if not is_complete:
        console.print(f"only {progress.num_migrated} of {options.requests} could be moved in the state of their kind")
    return 0 if is_complete and progress.is_clean() else FAILED


async def until_interrupted(work: Coroutine[Any, Any, None]) -> bool:
    """False: Ctrl-C (or SIGTERM) came first; instances are stopped by then. Pressed again, it hurries nothing."""
    task = asyncio.create_task(work)
    stopping = asyncio.Event()

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


def main() -> int:
    options = arguments()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    LOGS.mkdir(exist_ok=True)
    session = SessionRecord(options.seed, options.control or "", code_digest())
    try:
        progress = Progress(options.progress, session, options.fresh)
    except ProgressError as error:
        console.print(f"bench.exactness: {error}", style="red")
        return BAD_INPUT
    if progress.num_resumed:
        console.print(f"going on after {progress.num_resumed:,} migrated requests in {options.progress}")
    try:
        is_whole = asyncio.run(until_interrupted(Bench(options, progress, console).run()))
    except FleetError as error:
        console.print(f"bench.exactness: {error}", style="red")
        report(options, progress, console)
        return FAILED
    finally:
        progress.close()
    if not is_whole:
        kept = f"run the same command again to go on ({options.progress})" if options.progress else "nothing is kept"
        console.print(f"stopped after {progress.num_migrated:,} of {options.requests:,}: {kept}", soft_wrap=True)
        return INTERRUPTED
    return report(options, progress, console)


if __name__ == "__main__":
    sys.exit(main())
