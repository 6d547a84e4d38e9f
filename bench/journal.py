"""What does the journal cost: bytes on the disk, and time in the orchestrator's loop?

    python -m bench.journal [--quick] [--json FILE]

A story of instances that decode: each reports its load ten times a second and its requests four times a second, as
`instance/report.py` has it; requests begin, grow and end; the core ticks twice a second and moves some. The production
core, writer and reader; the clock is the story's. "full" is what the same reports would take if each were whole.
A *checkpoint* is the state of the core: the loop takes a snapshot when a part is turned over, the thread writes it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.report import Value, spread_of
from bench.sheet import options_of, result_of, show, table_of
from instance.messages import LoadReport, RequestLoad, RequestReport
from instance.report import REPORT_INTERVAL_S, REQUEST_REPORT_INTERVAL_S
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import StartMigration
from orchestrator.events import (
    Event,
    InstanceStarted,
    MigrationEnded,
    MigrationFigures,
    ReportReceived,
    RequestsReceived,
    Ticked,
)
from orchestrator.journal.reader import JournalFiles
from orchestrator.journal.replay import Replay
from orchestrator.journal.values import core_snapshot, finished, plain
from orchestrator.runtime.journal import Journal, JournalParams
from orchestrator.state import CoreParams

NUM_INSTANCES, LARGE = 4, 256
BATCH = 50
"""Requests on each instance that is not idle."""
TOTAL_BLOCKS = 4_096
STORY_S, QUICK_STORY_S = 600.0, 60.0
STEP_S = 0.03
TICK_S = 0.5
CHECKPOINTS = 5
SEED = 7
HOUR_S = 3600.0
COLUMNS = (
    *("requests", "load report", "full", "request report", "full"),
    *("MB an hour", "us in the loop", "replay"),
)


class Instance:
    """What an instance would say of itself."""

    def __init__(self, number: int, batch: int, rng: random.Random) -> None:
        self.name, self.batch, self.rng = f"instance-{number}", batch, rng
        self.step, self.num_requests, self.now_s = 0, 0, 0.0
        self.step_time_s = STEP_S
        self.requests: list[RequestLoad] = []
        self.begun_s: dict[str, float] = {}
        while len(self.requests) < batch:
            self._admit()

    def _admit(self) -> None:
        self.num_requests += 1
        name = f"cmpl-{self.rng.getrandbits(128):032x}-0-{self.rng.getrandbits(32):08x}"
        tokens = self.rng.randint(50, 900), self.rng.randint(0, 300)
        self.begun_s[name] = self.now_s
        self.requests.append(RequestLoad(name, name[:41], "running", 0, *tokens, 512, -(-sum(tokens) // 16), 0.0, True))

    def go_on_until(self, now_s: float) -> None:
        """Every step gives each request a token; what is at its end is replaced."""
        self.now_s = now_s
        num_steps = int(now_s / STEP_S) - self.step
        self.step += num_steps
        if not self.batch:
            return
        self.step_time_s += 0.1 * (STEP_S * self.rng.uniform(0.9, 1.1) - self.step_time_s)
        grown = []
        for item in self.requests:
            num_output = item.num_output_tokens + num_steps
            age_s = (round(now_s * 1000) - round(self.begun_s[item.request_id] * 1000)) / 1000
            num_blocks = -(-(item.num_prompt_tokens + num_output) // 16)
            if num_output < item.max_tokens:
                grown.append(
                    msgspec.structs.replace(item, num_output_tokens=num_output, arrived_s=age_s, num_blocks=num_blocks)
                )
        self.requests = grown
        while len(self.requests) < self.batch:
            self._admit()

    def load(self) -> LoadReport:
        held = sum(item.num_blocks for item in self.requests)
        return LoadReport(
            instance=self.name,
            epoch=1,
            step=self.step,
            state="serving",
            block_size=16,
            total_blocks=TOTAL_BLOCKS,
            free_blocks=TOTAL_BLOCKS - held,
            reserved_blocks=0,
            num_running=len(self.requests),
            num_waiting=0,
            running_by_priority=((0, len(self.requests)),) if self.requests else (),
            head_of_line_blocks=0,
            waiting_blocks=0,
            step_time_s=self.step_time_s,
            num_preemptions=0,
            migrations_in=0,
            migrations_out=0,
        )

    def request_report(self) -> RequestReport:
        return RequestReport(self.name, 1, self.step, tuple(self.requests))


def a_story(batch: int, length_s: float) -> Iterator[tuple[float, Event]]:
    rng = random.Random(SEED)
    instances = [Instance(number, batch, rng) for number in range(NUM_INSTANCES)]
    for item in instances:
        incarnation = Incarnation(InstanceId(item.name), Epoch(1), "tcp://127.0.0.1:40000")
        yield 0.0, InstanceStarted(incarnation, f"kvferry-{item.name}-1", "a/model", 16, TOTAL_BLOCKS, 4711)
    due = [(number * 0.011, "load", item) for number, item in enumerate(instances)]
    due += [(0.05 + number * 0.013, "requests", item) for number, item in enumerate(instances)]
    next_tick_s = TICK_S
    while True:
        due.sort(key=lambda one: one[0])
        now_s, kind, item = due.pop(0)
        if now_s > length_s:
            return
        while next_tick_s <= now_s:
            yield next_tick_s, Ticked()
            next_tick_s += TICK_S
        item.go_on_until(now_s)
        if kind == "load":
            yield now_s, ReportReceived(item.load())
        else:
            yield now_s, RequestsReceived(item.request_report())
        interval_s = REPORT_INTERVAL_S if kind == "load" else REQUEST_REPORT_INTERVAL_S
        due.append((now_s + interval_s + rng.uniform(0.0, 0.003), kind, item))


@dataclass(slots=True)
class Cost:
    """Of one story."""

    bytes_by_event: dict[str, list[int]]
    full_by_event: dict[str, list[int]]
    queue_us: list[float]
    """Time that the loop spends on the journal for an event."""
    num_bytes: int
    replayed_events: int
    replay_s: float


def cost_of(batch: int, length_s: float, folder: Path) -> Cost:
    core, path = Orchestrator(CoreParams()), folder / f"journal-{batch}"
    journal = Journal(path, core, 0.0, JournalParams(max_part_bytes=4 << 30, max_queued=1 << 22))
    queue_us: list[float] = []
    full: dict[str, list[int]] = defaultdict(list)
    for now_s, event in a_story(batch, length_s):
        for effect in _timed(core, event, 1e5 + now_s + 1e-7, journal, queue_us):
            if isinstance(effect, StartMigration):
                ended = MigrationEnded(effect.number, Outcome.COMMITTED, "", MigrationFigures(stopped_s=0.012))
                _timed(core, ended, 1e5 + now_s + 0.2, journal, queue_us)
        if isinstance(event, ReportReceived | RequestsReceived):
            full[type(event).__name__].append(len(msgspec.json.encode(plain(event))))
    journal.close()
    by_event: dict[str, list[int]] = defaultdict(list)
    for text in path.read_bytes().splitlines():
        line = msgspec.json.decode(text)
        by_event[line.get("on", "checkpoint")].append(len(text) + 1)
    replay = Replay()
    begun = time.perf_counter()
    with JournalFiles(path) as files:
        for place, read in files.lines():
            replay.take(read, str(place))
    replay_s = time.perf_counter() - begun
    assert replay.divergence is None and not replay.num_lost, "the journal says what happened"
    return Cost(by_event, full, queue_us, path.stat().st_size, replay.num_verified, replay_s)


def _timed(core: Orchestrator, event: Event, now_s: float, journal: Journal, queue_us: list[float]) -> list[object]:
    effects = core.on(event, now_s)
    begun = time.perf_counter_ns()
    journal.write(event, effects, now_s)
    queue_us.append((time.perf_counter_ns() - begun) / 1e3)
    return list(effects)


def checkpoint_ms(num_instances: int) -> tuple[list[float], int]:
    """(milliseconds that the loop spends on each snapshot of a large core, bytes of the state)."""
    core, rng = Orchestrator(CoreParams()), random.Random(SEED)
    for number in range(num_instances):
        item = Instance(number, BATCH, rng)
        incarnation = Incarnation(InstanceId(item.name), Epoch(1), "tcp://127.0.0.1:40000")
        core.on(InstanceStarted(incarnation, f"kvferry-{item.name}-1", "a/model", 16, TOTAL_BLOCKS, 4711), 0.0)
        core.on(ReportReceived(item.load()), 0.1)
        core.on(RequestsReceived(item.request_report()), 0.1)
    took_ms = []
    for _ in range(CHECKPOINTS):
        begun = time.perf_counter_ns()
        snapshot = core_snapshot(core)
        took_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return took_ms, len(msgspec.json.encode(finished(snapshot)))


def mean(values: list[int]) -> float:
    return sum(values) / max(1, len(values))


def main() -> int:
    options = options_of("journal", __doc__, f"{QUICK_STORY_S:.0f} s of the story")
    length_s = QUICK_STORY_S if options.quick else STORY_S
    table = table_of(f"Bytes of a journal, {NUM_INSTANCES} instances", COLUMNS)
    arms: dict[str, dict[str, Value]] = {}
    spread: dict[str, dict[str, float | int | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (0, BATCH):
            cost = cost_of(batch, length_s, Path(folder))
            loads, requests = (cost.bytes_by_event[kind] for kind in ("ReportReceived", "RequestsReceived"))
            full_loads, full_requests = (cost.full_by_event[kind] for kind in ("ReportReceived", "RequestsReceived"))
            mb_per_hour = cost.num_bytes / length_s * HOUR_S / 1e6
            arm: dict[str, Value] = {
                "load_report_bytes": mean(loads),
                "load_report_full_bytes": mean(full_loads),
                "request_report_bytes": mean(requests),
                "request_report_full_bytes": mean(full_requests),
                "mb_per_hour": mb_per_hour,
                "queue_us": sorted(cost.queue_us)[len(cost.queue_us) // 2],
                "replayed_events_per_s": cost.replayed_events / cost.replay_s,
            }
            arms[f"{NUM_INSTANCES * batch} requests"] = arm
            spread[f"queue_us_{batch}"] = spread_of(cost.queue_us)
            spread[f"request_report_bytes_{batch}"] = spread_of([float(size) for size in requests])
            table.add_row(str(NUM_INSTANCES * batch), *(f"{value:,.0f}" for value in arm.values() if value is not None))
        took_ms, state_bytes = checkpoint_ms(LARGE)
    spread["checkpoint_ms"] = spread_of(took_ms)
    busy = arms[f"{NUM_INSTANCES * BATCH} requests"]
    result = result_of(
        "journal",
        figures={
            "journal_mb_per_hour": float(busy["mb_per_hour"] or 0.0),
            "journal_load_report_bytes": float(busy["load_report_bytes"] or 0.0),
            "journal_request_report_bytes": float(busy["request_report_bytes"] or 0.0),
            "journal_checkpoint_worst_ms_256": max(took_ms),
            "journal_checkpoint_mb_256": state_bytes / 1e6,
        },
        arms=arms,
        n={"story_s": int(length_s), "checkpoints": CHECKPOINTS},
        spread=spread,
    )
    show((table,), result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
