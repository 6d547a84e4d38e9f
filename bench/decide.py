"""What does a decision cost, and how does that grow with the fleet?

    python -m bench.decide [--quick] [--json FILE]

*Dispatch*: one `DispatchBook.choose` and the accounting after it, at a gateway that 16 to 1,024 instances report to,
100 requests running on each. Each instance's report is taken in ten times a second of the story, between choices.
Beside each choice an empty loop that takes about as long is timed (*null*).
*Prefixes*: the same for prompts of 1,024 blocks, whose beginnings an eighth of the fleet has, to some length each,
and the taking in of what an instance's cache has changed in a quarter of a second.
*Rebalance*: one `plan_rebalance` over views of as many instances and requests, half of them short of memory.
*Attain*: one `plan_attain` over the same, every second request with a target, some of which every instance misses.
*Core*: a whole tick of the orchestrator's core that holds these instances and requests: drains, views of all records,
rebalance, attain (with targets as above: *targets*) and the effects, of which up to eight begin a move that ends
between two ticks.

Pure code of production, in this process, nothing else: no wire, no clock of its own. Times are of this machine.
"""

from __future__ import annotations

import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Callable

import msgspec
import numpy as np

from bench.report import Value, spread_of
from bench.sheet import options_of, result_of, show, table_of
from instance.lifecycle import State
from instance.messages import (
    ALL_CACHED,
    HASH_BYTES,
    CachedBlocks,
    LoadReport,
    RequestLoad,
    RequestReport,
    StepTotals,
)
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import StartMigration
from orchestrator.events import (
    InstanceStarted,
    MigrationEnded,
    MigrationFigures,
    ReportReceived,
    RequestsReceived,
    Ticked,
)
from orchestrator.policy.attain import plan_attain
from orchestrator.policy.dispatch import Choice, DispatchBook
from orchestrator.policy.moves import InstanceView
from orchestrator.policy.rebalance import RebalanceParams, Resting, plan_rebalance
from orchestrator.policy.standing import standing_of
from orchestrator.policy.targets import tightest_of
from orchestrator.state import CoreParams

SIZES = (16, 64, 256, 1_024)
REQUESTS_EACH = 100
"""Running on each instance: 100 thousand at 1,024."""
TOTAL_BLOCKS = 8_192
CHOICES, QUICK_CHOICES = 5_000, 500
TICKS, QUICK_TICKS = 20, 3
SEED = 7
NULL_TURNS = 2_500
"""Of an empty loop that takes about as long as a choice: its p99 is what the machine makes of something that always
takes the same."""
PROMPT_BLOCKS = 1_024
PROMPTS = 4
"""That many requests begin with."""
ONE_IN = 8
"""Instances have the beginning of one of these."""
NEWS_BLOCKS = 64
"""New in a cache in a quarter of a second (4,096 tokens a second), and as many gone."""
PREFIX_COLUMNS = ("instances", "hashes", "dispatch p50", "p99", "news p99", "worst", "index MiB")
COLUMNS = (
    "instances", "requests", "dispatch p50", "p99", "null p50", "p99", "report p99", "book MiB",
    "tick p50", "worst", "moves", "attain p50", "worst", "moves",
    "core p50", "worst", "targets p50", "worst",
)  # fmt: skip
SPEED = (8e-3, 3e-5, 2e-5, 2e-5, 1e-7, 3e-9)
"""Of every instance: the proportions of policy/steptime.py."""


def load(rng: random.Random, number: int, step: int, num_seen: int = 0) -> LoadReport:
    """Of an instance that is somewhere between a seventh full and full: half of them are short of memory."""
    free = rng.randint(0, TOTAL_BLOCKS * 6 // 7)
    waiting = 0 if free > TOTAL_BLOCKS // 20 else rng.randint(1, 400)
    return LoadReport(
        instance=f"instance-{number:04}",
        epoch=1,
        step=step,
        state=State.SERVING.value,
        block_size=16,
        total_blocks=TOTAL_BLOCKS,
        free_blocks=free,
        reserved_blocks=0,
        num_running=REQUESTS_EACH,
        num_waiting=waiting // 40,
        running_by_priority=((0, REQUESTS_EACH * 9 // 10), (1, REQUESTS_EACH // 10)),
        head_of_line_blocks=min(waiting, 40),
        waiting_blocks=waiting,
        step_time_s=0.03,
        num_preemptions=0,
        migrations_in=0,
        migrations_out=0,
        submits_seen=num_seen,
    )


def time_dispatch(num_instances: int, num_choices: int) -> tuple[list[float], list[float], list[float], float]:
    """(milliseconds of each choice, of each report, of each null loop, MiB of the book)."""
    rng = random.Random(SEED)
    tracemalloc.start()
    book = DispatchBook()
    book.set_members([(InstanceId(load(rng, number, 0).instance), Epoch(1)) for number in range(num_instances)])
    for number in range(num_instances):
        book.on_report(load(rng, number, 0), 0.0)
    size_mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    sent = dict.fromkeys(range(num_instances), 0)
    choices_ms, reports_ms, nulls_ms = [], [], []
    for turn in range(num_choices):
        now_s = turn * 0.1 / num_instances
        demand = rng.randint(1, 200)
        begun = time.perf_counter_ns()
        choice = book.choose(demand, now_s)
        assert isinstance(choice, Choice)
        sequence = book.on_dispatched(choice.instance, demand, now_s)
        choices_ms.append((time.perf_counter_ns() - begun) / 1e6)
        sent[int(choice.instance.removeprefix("instance-"))] = sequence
        number = turn % num_instances
        told = load(rng, number, turn, sent[number])
        begun = time.perf_counter_ns()
        book.on_report(told, now_s)
        reports_ms.append((time.perf_counter_ns() - begun) / 1e6)
        begun = time.perf_counter_ns()
        for _ in range(NULL_TURNS):
            pass
        nulls_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return choices_ms, reports_ms, nulls_ms, size_mib


def hashes_of(rng: random.Random, num_blocks: int) -> bytes:
    return rng.randbytes(HASH_BYTES * num_blocks)


def time_prefixes(num_instances: int, num_choices: int) -> tuple[list[float], list[float], int, float]:
    """(milliseconds of each choice, of each piece of news, hashes in the index, its MiB)."""
    rng = random.Random(SEED)
    reports = [load(rng, number, 0) for number in range(num_instances)]
    book = DispatchBook()
    book.set_members([(InstanceId(told.instance), Epoch(1)) for told in reports])
    for told in reports:
        book.on_report(told, 0.0)
    prompts = [hashes_of(rng, PROMPT_BLOCKS) for _ in range(PROMPTS)]
    prefixes = [tuple(np.frombuffer(prompt, dtype=">u8").tolist()) for prompt in prompts]
    tracemalloc.start()
    caches: list[bytes] = []
    for number, told in enumerate(reports):
        lengths = [rng.randint(1, PROMPT_BLOCKS) if (number + turn) % ONE_IN == 0 else 0 for turn in range(PROMPTS)]
        held = b"".join(prompt[: HASH_BYTES * length] for prompt, length in zip(prompts, lengths, strict=True))
        caches.append(hashes_of(rng, NEWS_BLOCKS))
        book.on_cached(CachedBlocks(told.instance, 1, 16, ALL_CACHED, 0, held + caches[-1]))
    num_hashes = book.prefixes.num_hashes
    size_mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    choices_ms, news_ms = [], []
    for turn in range(num_choices):
        begun = time.perf_counter_ns()
        choice = book.choose(PROMPT_BLOCKS + 1, 0.0, prefix=prefixes[turn % PROMPTS])
        assert isinstance(choice, Choice)
        sequence = book.on_dispatched(choice.instance, PROMPT_BLOCKS + 1, 0.0)
        choices_ms.append((time.perf_counter_ns() - begun) / 1e6)
        book.on_not_taken(choice.instance, choice.epoch, sequence)  # so that the fleet does not fill up
        number, number_of_news = turn % num_instances, turn // num_instances
        fresh, begin = hashes_of(rng, NEWS_BLOCKS), number_of_news * NEWS_BLOCKS
        news = CachedBlocks(reports[number].instance, 1, 16, begin, begin + NEWS_BLOCKS, fresh, caches[number])
        caches[number] = fresh
        begun = time.perf_counter_ns()
        book.on_cached(news)
        news_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return choices_ms, news_ms, num_hashes, size_mib


def views_of(num_instances: int) -> tuple[InstanceView, ...]:
    rng = random.Random(SEED)
    views = []
    for number in range(num_instances):
        told = load(rng, number, 1)
        held = (told.total_blocks - told.free_blocks) // REQUESTS_EACH
        requests = tuple(
            RequestLoad(
                f"r-{number}-{i}", f"x-{number}-{i}", "running", i % 10 == 0, held * 8, held * 8, 512, held, 1.0, True
            )
            for i in range(REQUESTS_EACH)
        )
        views.append(InstanceView(InstanceId(told.instance), told, requests, False, 2, 2, 0.1))
    return tuple(views)


def time_rebalance(num_instances: int, num_ticks: int) -> tuple[list[float], int]:
    """(milliseconds of each tick, moves of a tick). Every tick plans from the same views."""
    views, params = views_of(num_instances), RebalanceParams()
    ticks_ms, num_moves = [], 0
    for _ in range(num_ticks):
        begun = time.perf_counter_ns()
        moves = plan_rebalance(views, Resting(), params)
        ticks_ms.append((time.perf_counter_ns() - begun) / 1e6)
        num_moves = len(moves)
    return ticks_ms, num_moves


def wanting(views: tuple[InstanceView, ...]) -> tuple[InstanceView, ...]:
    """Every second request wants a token every so often: within 0.7 to 2 times of what its instance is predicted."""
    rng = random.Random(SEED)
    found = []
    for view in views:
        step_s = standing_of(view.load, SPEED).tpot_s()
        requests = tuple(
            msgspec.structs.replace(one, tpot_s=step_s * rng.choice((0.7, 0.9, 1.0, 1.2, 2.0))) if at % 2 else one
            for at, one in enumerate(view.requests)
        )
        found.append(msgspec.structs.replace(view, requests=requests, tightest=tightest_of(requests)))
    return tuple(found)


def time_attain(num_instances: int, num_ticks: int) -> tuple[list[float], int]:
    """(milliseconds of each tick, moves of a tick)."""
    views, params = wanting(views_of(num_instances)), RebalanceParams()
    ticks_ms, num_moves = [], 0
    for _ in range(num_ticks):
        begun = time.perf_counter_ns()
        moves = plan_attain(views, {view.instance: SPEED for view in views}, Resting(), params)
        ticks_ms.append((time.perf_counter_ns() - begun) / 1e6)
        num_moves = len(moves)
    return ticks_ms, num_moves


def time_core(views: tuple[InstanceView, ...], num_ticks: int) -> list[float]:
    """Milliseconds of each whole tick of a core that was told of these."""
    core, now_s = Orchestrator(CoreParams(max_instances=len(views))), 0.0
    for view in views:
        where = Incarnation(view.instance, Epoch(view.load.epoch), "tcp://here")
        core.on(InstanceStarted(where, view.instance, "model", view.load.block_size, TOTAL_BLOCKS), now_s)
        core.on(ReportReceived(with_steps(view.load)), now_s)
        core.on(RequestsReceived(RequestReport(view.instance, view.load.epoch, 1, view.requests)), now_s)
    ticks_ms = []
    for _ in range(num_ticks):
        begun = time.perf_counter_ns()
        effects = core.on(Ticked(), now_s)
        ticks_ms.append((time.perf_counter_ns() - begun) / 1e6)
        for effect in effects:
            if isinstance(effect, StartMigration):
                core.on(MigrationEnded(effect.number, Outcome.COMMITTED, "", MigrationFigures()), now_s)
    return ticks_ms


def with_steps(load: LoadReport) -> LoadReport:
    """A thousand decode steps as SPEED has them, so that the core has learned how fast it is."""
    num_steps, context = 1_000, (load.total_blocks - load.free_blocks) * load.block_size
    decoded = num_steps * load.num_running
    steps = StepTotals(
        num_steps=num_steps,
        num_decode_tokens=decoded,
        num_decoding=decoded,
        num_context_tokens=num_steps * context,
        busy_s=num_steps * standing_of(load, SPEED).tpot_s(),
    )
    return msgspec.structs.replace(load, steps=steps)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


def without_collection(work: Callable[[], None]) -> None:
    """The collector's pauses are of the whole process, not of the decision."""
    gc.collect()
    gc.disable()
    try:
        work()
    finally:
        gc.enable()


def main() -> int:
    options = options_of("decide", __doc__, f"{QUICK_CHOICES} choices and {QUICK_TICKS} ticks a size")
    num_choices, num_ticks = (QUICK_CHOICES, QUICK_TICKS) if options.quick else (CHOICES, TICKS)
    table = table_of("Milliseconds of a decision", COLUMNS)
    prefix_table = table_of("Milliseconds, with prompts of 1,024 blocks that are cached in part", PREFIX_COLUMNS)
    arms: dict[str, dict[str, Value]] = {}
    spread: dict[str, dict[str, float | int | None]] = {}

    def measure(size: int) -> None:
        choices, reports, nulls, size_mib = time_dispatch(size, num_choices)
        ticks, num_moves = time_rebalance(size, num_ticks)
        attaining, num_attained = time_attain(size, num_ticks)
        whole, wanted = (time_core(views, num_ticks) for views in (views_of(size), wanting(views_of(size))))
        arms[str(size)] = {
            "dispatch_p50_ms": percentile(choices, 50),
            "dispatch_p99_ms": percentile(choices, 99),
            "null_p50_ms": percentile(nulls, 50),
            "null_p99_ms": percentile(nulls, 99),
            "report_p99_ms": percentile(reports, 99),
            "book_mib": size_mib,
            "rebalance_p50_ms": percentile(ticks, 50),
            "rebalance_worst_ms": max(ticks),
            "moves": num_moves,
            "attain_p50_ms": percentile(attaining, 50),
            "attain_worst_ms": max(attaining),
            "attain_moves": num_attained,
            "core_p50_ms": percentile(whole, 50),
            "core_worst_ms": max(whole),
            "core_targets_p50_ms": percentile(wanted, 50),
            "core_targets_worst_ms": max(wanted),
        }
        spread[f"dispatch_ms_{size}"] = spread_of(choices)
        spread[f"rebalance_ms_{size}"] = spread_of(ticks)
        spread[f"attain_ms_{size}"] = spread_of(attaining)
        spread[f"core_ms_{size}"] = spread_of(whole)
        spread[f"core_targets_ms_{size}"] = spread_of(wanted)
        figures = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in arms[str(size)].values()]
        table.add_row(f"{size:,}", f"{size * REQUESTS_EACH:,}", *figures)

    def measure_prefixes(size: int) -> None:
        choices, news, num_hashes, size_mib = time_prefixes(size, num_choices)
        figures: dict[str, Value] = {
            "hashes": num_hashes,
            "dispatch_p50_ms": percentile(choices, 50),
            "dispatch_p99_ms": percentile(choices, 99),
            "news_p99_ms": percentile(news, 99),
            "news_worst_ms": max(news),
            "index_mib": size_mib,
        }
        arms[f"prefixes_{size}"] = figures
        spread[f"dispatch_prefixes_ms_{size}"] = spread_of(choices)
        texts = [f"{value:.3f}" if isinstance(value, float) else f"{value:,}" for value in figures.values()]
        prefix_table.add_row(f"{size:,}", *texts)

    for size in SIZES:
        without_collection(lambda size=size: measure(size))  # type: ignore[misc]
        without_collection(lambda size=size: measure_prefixes(size))  # type: ignore[misc]
    largest = arms[str(SIZES[-1])]
    result = result_of(
        "decide",
        figures={
            "dispatch_p99_ms_1024": float(largest["dispatch_p99_ms"] or 0.0),
            "null_p99_ms_1024": float(largest["null_p99_ms"] or 0.0),
            "rebalance_ms_1024": float(largest["rebalance_worst_ms"] or 0.0),
            "dispatch_prefixes_p99_ms_1024": float(arms[f"prefixes_{SIZES[-1]}"]["dispatch_p99_ms"] or 0.0),
            "attain_ms_1024": float(largest["attain_worst_ms"] or 0.0),
            "core_ms_1024": float(largest["core_worst_ms"] or 0.0),
            "core_targets_ms_1024": float(largest["core_targets_worst_ms"] or 0.0),
        },
        arms=arms,
        n={"choices": num_choices, "ticks": num_ticks},
        spread=spread,
    )
    show((table, prefix_table), result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
