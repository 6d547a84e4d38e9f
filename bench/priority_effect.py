"""How soon does raising a running request take effect, and does the journal say why?

    python -m bench.priority_effect [--quick] [--json FILE]

Two real vLLM instances on this machine, served as `kvferry serve` does. Each round: three streams run, so that one
instance has two or more; one of those is raised to a level that wants its instance almost for itself. Measured from
before the call of the admin API: until it answers (the engine has the new priority), until the orchestrator's list
shows it, and until the first less urgent neighbour has moved away. The highest of the last is held against the bar of
2 s; then the journal is read: each change must stand there with who asked, what it does, and the moves it caused.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from rich.console import Console

from bench.report import Result, spread_of, this_machine, write_result
from orchestrator.admin.client import AdminClient
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.config import ServeConfig
from orchestrator.demo.cluster import MODEL_NAME, NUM_BLOCKS, demo_config, running_cluster, start_ray
from orchestrator.demo.options import DemoOptions
from orchestrator.effects import Answer, Reprioritised, StartMigration
from orchestrator.events import PriorityAnswered, PriorityRequested
from orchestrator.journal.lines import Entry
from orchestrator.journal.reader import JournalFiles
from orchestrator.runtime.ray_cluster import RayCluster

BAR_S = 2.0
ROUNDS, QUICK_ROUNDS = 15, 3
NUM_STREAMS = 3
NUM_TOKENS = 3_000
"""Of each stream: it is ended when its round is over, long before."""
TICK_S = 0.5
"""The orchestrator's default."""
POLL_S = 0.02
PATIENCE_S = 30.0
LEVELS = f"high:-10:{NUM_BLOCKS - 20},normal:0"
MODEL = Path(__file__).parent / "models" / "tiny"

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """Seconds since the call."""

    answered_s: float
    shown_s: float
    neighbour_left_s: float


async def until(look: Callable[[], Found | None]) -> Found:
    """What `look` finds, asked again and again. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while True:  # another process: there is no event to wait for
            found = await asyncio.to_thread(look)
            if found is not None:
                return found
            await asyncio.sleep(POLL_S)


async def one_round(base_url: str, admin: AdminClient, number: int) -> Round:
    async with httpx.AsyncClient(base_url=base_url, timeout=None) as http:
        body = {"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        streams = [
            asyncio.create_task(http.post("/completions", json=body, headers={"x-request-id": f"round-{number}-{n}"}))
            for n in range(NUM_STREAMS)
        ]
        try:
            return await raise_one(admin)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await until(lambda: True if not admin.requests() else None)


async def raise_one(admin: AdminClient) -> Round:
    def all_running() -> list[pb.Request] | None:
        found = admin.requests()
        return found if [item.status for item in found] == ["running"] * NUM_STREAMS else None

    running = await until(all_running)
    ((crowded, _),) = Counter(item.instance for item in running).most_common(1)
    raised, *neighbours = [item.name for item in running if item.instance == crowded]
    began_s = time.monotonic()
    await asyncio.to_thread(admin.set_priority, raised.removeprefix("requests/"), "high")
    answered_s = time.monotonic() - began_s

    def is_shown() -> bool | None:
        return True if any(item.name == raised and item.priority == -10 for item in admin.requests()) else None

    def neighbour_left() -> pb.Migration | None:
        return next(
            (
                item
                for item in admin.migrations()
                if item.request in neighbours and item.outcome == pb.MIGRATION_OUTCOME_COMMITTED
            ),
            None,
        )

    await until(is_shown)
    shown_s = time.monotonic() - began_s
    await until(neighbour_left)
    return Round(answered_s, shown_s, time.monotonic() - began_s)


def explained(journal: Path) -> int:
    """Changes that the journal tells whole: who asked, what was done, and a move that it caused before the next one."""
    told = 0
    asked, done = False, False
    with JournalFiles(journal) as files:
        for _, line in files.lines():
            if not isinstance(line, Entry):
                continue
            effects = line.effect_values()
            if isinstance(line.event, PriorityRequested):
                asked, done = bool(line.event.asked_by), False
            elif isinstance(line.event, PriorityAnswered):
                results = [effect.result for effect in effects if isinstance(effect, Answer)]
                done = asked and any(isinstance(result, Reprioritised) and result.effect for result in results)
            elif done and any(
                isinstance(effect, StartMigration) and effect.reason.startswith("isolate: ") for effect in effects
            ):
                told, asked, done = told + 1, False, False
    return told


async def measure(ray: RayCluster, config: ServeConfig, num_rounds: int, console: Console) -> list[Round]:
    rounds: list[Round] = []
    async with running_cluster(ray, config, console) as cluster:
        with AdminClient(cluster.composition.admin_address) as admin:
            for number in range(num_rounds):
                rounds.append(await one_round(f"{cluster.base_url}/v1", admin, number))
                console.print(f"round {number + 1} of {num_rounds}: {rounds[-1]}", highlight=False)
    return rounds


def run(quick: bool, console: Console) -> tuple[list[Round], int]:
    """The rounds, and how many of them the journal explains. With a Ray of its own."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        config = dataclasses.replace(
            demo_config(str(MODEL), DemoOptions()),
            priority_levels=LEVELS,
            journal=str(journal),
            tick_s=TICK_S,
        )
        ray = start_ray(config, console)
        try:
            rounds = asyncio.run(measure(ray, config, QUICK_ROUNDS if quick else ROUNDS, console))
        finally:
            ray.shutdown()
        return rounds, explained(journal)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.priority_effect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    rounds, num_explained = run(options.quick, console)
    spread = {
        field.name: spread_of([getattr(one, field.name) for one in rounds]) for field in dataclasses.fields(Round)
    }
    effect_s = spread["neighbour_left_s"]["highest"]
    result = Result(
        name="priority_effect",
        command=" ".join(["python", "-m", "bench.priority_effect", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={"priority_effect_s": effect_s, "changes_explained": num_explained},
        arms={},
        n={"rounds": len(rounds)},
        spread=spread,
        machine=this_machine(),
    )
    for name, values in spread.items():
        console.print(f"{name}: median {values['median']}, highest {values['highest']}, n = {values['n']}")
    console.print(f"priority_effect_s {effect_s} (bar {BAR_S}); the journal explains {num_explained} of {len(rounds)}")
    if options.json:
        write_result(options.json, result)
    return 0 if effect_s is not None and effect_s <= BAR_S and num_explained == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
