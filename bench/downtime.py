"""How long does a request stand still when it moves, and what do the others feel?

    python -m bench.downtime [--quick] [--json FILE] [--picture FILE] [--only MODEL]

Two real instances on this machine. A request of the wanted length decodes at the source, is moved in one of three ways
(live; blocking: stop, copy all; re-prefill: stop, copy nothing, compute again) and goes on at the destination. The
arms are interleaved in one run. Downtime is the gap between the end of the last step that gave a token at the source
and the end of the first one at the destination, both on this machine's clock.

The second part lets other requests decode on both sides while one is moved there and back, with prefix caches off so
that each move copies all of it, and compares their token gaps during a copy with those just before it, and those with
the gaps before them: what two spans without a move differ by.

Both are done with three models (bench/models/README.md): `wide`, whose KV beside its weights is what served models of 8
billion parameters have, at all lengths; `wider`, as with 70 billion, and `tiny`, the demo's, whose step at 8k tokens is
mostly reading KV, at the shortest and the longest.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.progress import Progress

from bench.downtime_picture import draw
from bench.downtime_report import MODES, NAMES, Arm, Slowdown, result_of, slow_table, table_of
from bench.fleet import Fleet, FleetError, Stream
from bench.report import Result, write_result

MODELS = Path(__file__).parent / "models"
MODEL, ALSO = "wide", ("wider", "tiny")
NO_WEIGHTS = ("--load-format", "dummy", "--skip-tokenizer-init")
"""A configuration only: the weights are random, which no time here depends on."""
MODEL_FLAGS = {"wide": NO_WEIGHTS, "wider": NO_WEIGHTS, "tiny": ()}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QUICK_LENGTHS = (256, 2048, 8192)
SETTLE_TOKENS = 24
"""Tokens decoded at the source before the move, and what the step time is taken from."""
AFTER_TOKENS = 4
OTHERS_LENGTH = 200
SPAN_S = 0.5
"""Gaps of the others are compared with those of this long before the copy began, and those with as long before."""
PAUSE_S = 0.2
"""Between a move and the first of these spans."""
FRESH_TOKENS, MAX_TOKENS = 1300, 2000
"""After so many of its tokens all are submitted anew; and what each may put out, which leaves room for a last move."""


def engine_argv(longest: int, model: str) -> tuple[str, ...]:
    """Room for one request of the longest kind beside the others on each side."""
    return (
        str(MODELS / model),
        *MODEL_FLAGS[model],
        "--dtype",
        "float32",
        "--max-model-len",
        str(longest + 2048),
        "--kv-cache-memory-bytes",
        str(192 << 20),
        "--max-num-seqs",
        "16",
    )


def prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids that no earlier request began with, so that no prefix cache spares the copy."""
    return [rng.randrange(16, 512) for _ in range(num_tokens)]


async def move_once(fleet: Fleet, rng: random.Random, model: str, mode: str, length: int) -> Arm:
    """Decode at the source, move, decode at the destination. Raises FleetError when the move did not commit."""
    stream = fleet.submit("source", prompt(rng, length - SETTLE_TOKENS), max_tokens=1024)
    await stream.wait_tokens(SETTLE_TOKENS)
    summary = await fleet.migrate(stream, "source", "destination", mode)
    if summary.outcome != "committed":
        raise FleetError(f"a {mode} migration of {length} tokens ended {summary.outcome}: {summary.reason}")
    num_moved = sum(token.instance == "source" for token in stream.tokens)
    await stream.wait_tokens(num_moved + AFTER_TOKENS)
    fleet.abort(stream)
    source = [token.at_s for token in stream.tokens if token.instance == "source"]
    destination = [token.at_s for token in stream.tokens if token.instance == "destination"]
    gaps = [after - before for before, after in pairwise(source[2:])]
    return Arm(model, mode, length, destination[0] - source[-1], median(gaps), summary)


async def downtimes(
    fleet: Fleet, rng: random.Random, model: str, lengths: Sequence[int], trials: int, say: Progress
) -> list[Arm]:
    """Every length and mode, `trials` times, in shuffled order within each round; the first round warms up."""
    arms: list[Arm] = []
    task = say.add_task(f"{model}: downtime", total=(trials + 1) * len(lengths) * len(MODES))
    for trial in range(trials + 1):
        plan = [(mode, length) for length in lengths for mode in MODES]
        rng.shuffle(plan)
        for mode, length in plan:
            arm = await move_once(fleet, rng, model, mode, length)
            say.advance(task)
            if trial:
                arms.append(arm)
    return arms


def gaps_between(streams: Sequence[Stream], first_s: float, end_s: float) -> list[float]:
    """Gaps between neighbouring tokens that overlap the span."""
    gaps: list[float] = []
    for stream in streams:
        times = [token.at_s for token in stream.tokens]
        gaps += [after - before for before, after in pairwise(times) if after > first_s and before < end_s]
    return gaps


async def slowdowns(
    fleet: Fleet, rng: random.Random, model: str, length: int, options: argparse.Namespace, say: Progress
) -> list[Slowdown]:
    """Live moves of one request there and back beside `options.others` requests that decode on each side."""
    found: list[Slowdown] = []
    wanted = 4 * max(3, trials_of(options))
    task = say.add_task(f"{model}: slow-down of others", total=wanted)
    is_warm = False
    while len(found) < wanted:
        beside = {
            name: [fleet.submit(name, prompt(rng, OTHERS_LENGTH), MAX_TOKENS) for _ in range(options.others)]
            for name in fleet.instances
        }
        moved = fleet.submit("source", prompt(rng, length - SETTLE_TOKENS), MAX_TOKENS)
        everyone = [moved, *(stream for streams in beside.values() for stream in streams)]
        for stream in everyone:
            await stream.wait_tokens(SETTLE_TOKENS)
        way = ("source", "destination")
        while len(found) < wanted and max(len(stream.tokens) for stream in everyone) < FRESH_TOKENS:
            rows = await _slowdown_once(fleet, model, moved, way, beside)
            way = way[::-1]
            found += rows if is_warm else []
            is_warm = True
            say.update(task, completed=len(found))
        fleet.abort(*everyone)
    return found


def trials_of(options: argparse.Namespace) -> int:
    return options.trials or (3 if options.quick else 9)


async def _slowdown_once(
    fleet: Fleet, model: str, moved: Stream, way: tuple[str, str], beside: dict[str, list[Stream]]
) -> list[Slowdown]:
    """One row an instance. Raises FleetError when the move did not commit."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(PAUSE_S)
    earlier_s = loop.time()
    await asyncio.sleep(2 * SPAN_S)
    before_s, begun_s = earlier_s + SPAN_S, loop.time()
    summary = await fleet.migrate(moved, *way)
    if summary.outcome != "committed":
        raise FleetError(f"a live migration beside others ended {summary.outcome}: {summary.reason}")
    # The copy, without the stop: what is asked is what copying costs those who decode meanwhile.
    end_s = begun_s + summary.duration_s - summary.stopped_s
    for streams in beside.values():
        for stream in streams:
            await stream.wait_tokens(len(stream.tokens) + 2)
    rows: list[Slowdown] = []
    for name, streams in beside.items():
        spans = ((earlier_s, before_s), (before_s, begun_s), (begun_s, end_s))
        earlier, before, during = (gaps_between(streams, *span) for span in spans)
        if earlier and before and during:
            role = "source" if name == way[0] else "destination"
            rows.append(Slowdown(model, role, summary.moved_tokens, fmean(earlier), fmean(before), fmean(during)))
    return rows


async def run(options: argparse.Namespace, console: Console) -> Result:
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    rng = random.Random(options.seed)
    arms: list[Arm] = []
    slow: list[Slowdown] = []
    models = (options.only,) if options.only else (MODEL, *ALSO)
    for model in models:
        at = lengths if model == MODEL else (lengths[0], lengths[-1])
        console.print(f"{model}: starting two instances ...")
        async with Fleet.running(("source", "destination"), engine_argv(max(lengths), model)) as fleet:
            with Progress(console=console, transient=True) as say:
                arms += await downtimes(fleet, rng, model, at, trials_of(options), say)
        whole_copies = (*engine_argv(max(lengths), model), "--no-enable-prefix-caching")
        async with Fleet.running(("source", "destination"), whole_copies) as fleet:
            with Progress(console=console, transient=True) as say:
                slow += await slowdowns(fleet, rng, model, max(lengths), options, say)
        console.print(table_of(arms, model))
    console.print(slow_table(slow))
    if options.picture and MODEL in models:
        points = {
            (NAMES[mode], length): [arm.downtime_s * 1e3 for arm in arms if _is_of(arm, mode, length)]
            for mode in MODES
            for length in lengths
        }
        draw(points, options.picture)
        console.print(f"picture: {options.picture}")
    return result_of(arms, slow, MODEL, models)


def _is_of(arm: Arm, mode: str, length: int) -> bool:
    return (arm.model, arm.mode, arm.length) == (MODEL, mode, length)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.downtime", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="three lengths, three trials")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--picture", type=Path, default=Path("bench-out/downtime.png"))
    parser.add_argument("--trials", type=int, default=0, help="moves an arm (default 9; 3 with --quick)")
    parser.add_argument("--others", type=int, default=2, help="requests that decode beside it on each side (default 2)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=(MODEL, *ALSO), help="one model")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        result = asyncio.run(run(options, console))
    except FleetError as error:
        console.print(f"bench.downtime: {error}", style="red")
        return 2
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
