"""What share of its path's raw rate does each carrier reach?

    python -m bench.copy_rate [--quick] [--json FILE]

Two processes on this machine, each with a KV memory laid out as a model's would be; every block of one goes to another
place in the other, unpaced. Beside each push, in random order, the raw rate of the same path for the same bytes: for
tcp a loop of sendall and recv_into between two contiguous memories, for shm a copy into and a copy out of a shared
mapping by two processes at once, for nccl see copy_rate_gpu.py. A share is the ratio of two neighbours in one round.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import copy_rate_gpu
from bench.copy_rate_ends import MOVED, TOKEN, WAIT_S, Peer
from bench.copy_rate_memory import KVMemory, Shape, crc_of, order_of
from bench.copy_rate_raw import send_by_mapping, send_by_socket
from bench.report import Result, Value, spread_of, this_machine, write_result
from migration.transports import CarrierParams, open_sender
from migration.types import BlockRange
from orchestrator.demo.result import quantile

SERVED = Shape("Llama-3-8B: 16-token blocks", 64 << 10, 32)
"""What the figures are for: 32 layers, 8 KV heads of 128 in 16 bits; layers outermost, as vLLM lays them on a CPU."""
SHAPES = (
    SERVED,
    Shape("the same, blocks outermost", 64 << 10, 32, is_layers_outermost=False),
    Shape("the same, one rank of TP=4", 16 << 10, 32),
    Shape("the same, 128-token blocks", 512 << 10, 32),
    Shape("8 layers of 2 MiB pages", 2 << 20, 8),
)
MEMORY_BYTES = 256 << 20


class Variant(Enum):
    """What is compared with the raw loop of the same path."""

    PLAIN = "as it is"
    CHECKSUM = "with a checksum"
    LOOP = "no carrier: the raw loop, and a gather and a scatter"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    carrier: str
    shape: Shape
    variant: Variant = Variant.PLAIN

    @property
    def name(self) -> str:
        return f"{self.carrier}, {self.variant.value}, {self.shape.name}"


ROWS = (
    *(Row(carrier, shape) for shape in SHAPES for carrier in ("tcp", "shm")),
    Row("tcp", SERVED, Variant.CHECKSUM),
    Row("shm", SERVED, Variant.CHECKSUM),
    Row("tcp", SERVED, Variant.LOOP),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One push and the raw loop beside it, in bytes a second."""

    row: Row
    rate: float
    raw_rate: float

    @property
    def share(self) -> float:
        return self.rate / self.raw_rate


class Bench:
    """The sending process."""

    def __init__(self, peer: Peer, num_bytes: int) -> None:
        self._peer = peer
        self._memory = KVMemory.make(num_bytes, seed=1)

    def measure(self, rounds: int, rng: random.Random, say: Progress) -> list[Trial]:
        """Every row once a round, in another order each time; a first round warms up and is not counted."""
        pushes = {row: self._prepared(row) for row in ROWS}
        task = say.add_task("pushing", total=len(ROWS) * (rounds + 1))
        trials: list[Trial] = []
        for number in range(rounds + 1):
            for row in rng.sample(ROWS, len(ROWS)):
                trial = self._pair(row, pushes[row], rng)
                say.advance(task)
                if number:
                    trials.append(trial)
        return trials

    def _prepared(self, row: Row) -> Callable[[], object]:
        """Connected; for a carrier, after a first push that shows that every page arrives. Raises
        `ChildProcessError`."""
        if row.variant is Variant.LOOP:
            return partial(self._gather_and_send, row.shape)
        params = CarrierParams(checksum=row.variant is Variant.CHECKSUM)
        store, table = self._memory.store(row.shape), self._memory.table(row.shape, seed=1)
        order = order_of(row.shape)
        url = self._peer.ask("open", shape=order, url=f"{row.carrier}://127.0.0.1", checksum=params.checksum)
        sender = open_sender(store, TOKEN, params)
        push = partial(sender.push, MOVED, url, table, BlockRange(0, len(table[0])), timeout_s=WAIT_S, urgent=True)
        self._peer.ask("wipe")
        push()
        if self._peer.ask("crc", shape=order) != crc_of(store, table):
            raise ChildProcessError(f"{row.name}: the pages that arrived are not those that were sent")
        return push

    def _pair(self, row: Row, push: Callable[[], object], rng: random.Random) -> Trial:
        raw = self._raw_mapping if row.carrier == "shm" else self._raw_socket
        took_s = {}
        for name, arm in rng.sample((("push", push), ("raw", raw)), 2):
            begun_s = time.perf_counter()
            arm()
            took_s[name] = time.perf_counter() - begun_s
        num_bytes = self._memory.raw.numel()
        return Trial(row, num_bytes / took_s["push"], num_bytes / took_s["raw"])

    def _raw_socket(self) -> None:
        self._peer.start("receive_by_socket")
        send_by_socket(self._peer.sock, self._memory.view)
        self._peer.finish()

    def _raw_mapping(self) -> None:
        self._peer.start("receive_by_mapping")
        send_by_mapping(self._peer.ticks, self._peer.mapping, self._memory.view)
        self._peer.finish()

    def _gather_and_send(self, shape: Shape) -> None:
        """The raw loop with a gather before each block's sendall and a scatter after each block's recv_into."""
        store, (ids,) = self._memory.store(shape), self._memory.table(shape, seed=1)
        self._peer.start("receive_and_scatter", shape=order_of(shape))
        data = memoryview(bytearray(shape.block_bytes))
        for block in ids:
            store.gather(((block,),), data)
            self._peer.sock.sendall(data)
        self._peer.sock.recv(1)
        self._peer.finish()


def share_of(trials: Sequence[Trial], carrier: str) -> float:
    return median(trial.share for trial in trials if trial.row == Row(carrier, SERVED))


GpuRates = dict[str, list[tuple[float, float]]]


def figures(trials: Sequence[Trial], gpu: GpuRates) -> dict[str, float | int | None]:
    """Shares at `SERVED`; `nccl_share` is null without a GPU."""
    return {
        "shm_share": share_of(trials, "shm"),
        "tcp_share": share_of(trials, "tcp"),
        "nccl_share": copy_rate_gpu.share_of(gpu) if gpu else None,
    }


def table_of(trials: Sequence[Trial]) -> Table:
    table = Table(title="each carrier's share of the raw rate beside it", title_justify="left")
    for heading in ("carrier", "KV memory", "page KiB", "GB/s", "raw GB/s", "share: median (p10 .. p90)"):
        table.add_column(heading)
    for row in ROWS:
        own = [trial for trial in trials if trial.row == row]
        shares = [trial.share for trial in own]
        table.add_row(
            f"{row.carrier}, {row.variant.value}" if row.variant is not Variant.PLAIN else row.carrier,
            row.shape.name,
            str(row.shape.page_bytes >> 10),
            f"{median(trial.rate for trial in own) / 1e9:.2f}",
            f"{median(trial.raw_rate for trial in own) / 1e9:.2f}",
            f"{median(shares):.3f} ({quantile(shares, 10):.3f} .. {quantile(shares, 90):.3f})",
        )
    return table


def result_of(trials: Sequence[Trial], gpu: GpuRates, why_no_nccl: str | None) -> Result:
    arms: dict[str, dict[str, Value]] = {} if why_no_nccl is None else {"nccl": {"skipped": why_no_nccl}}
    spread: dict[str, dict[str, float | int | None]] = {}
    for way, rates in gpu.items():
        arms[f"nccl by {way}"] = {
            "median_bytes_per_s": median(rate for rate, _ in rates),
            "median_raw_bytes_per_s": median(raw for _, raw in rates),
        }
        spread[f"nccl by {way}"] = spread_of([rate / raw for rate, raw in rates])
    for row in ROWS:
        own = [trial for trial in trials if trial.row == row]
        arms[row.name] = {
            "page_bytes": row.shape.page_bytes,
            "block_bytes": row.shape.block_bytes,
            "median_bytes_per_s": median(trial.rate for trial in own),
            "median_raw_bytes_per_s": median(trial.raw_rate for trial in own),
            "median_share": median(trial.share for trial in own),
        }
        spread[row.name] = spread_of([trial.share for trial in own])
    return Result(
        name="copy_rate",
        command=shlex.join(["python", "-m", "bench.copy_rate", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures(trials, gpu),
        arms=arms,
        n={row.name: sum(trial.row == row for trial in trials) for row in ROWS},
        spread=spread,
        machine=this_machine(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.copy_rate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the memory, 3 rounds")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rounds", type=int, default=0, help="pushes a row (default 40; 3 with --quick)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 40)
    peer = Peer(num_bytes := MEMORY_BYTES // (4 if options.quick else 1))
    try:
        with Progress(console=console, transient=True) as say:
            trials = Bench(peer, num_bytes).measure(rounds, random.Random(options.seed), say)
    finally:
        peer.close()
    console.print(table_of(trials))
    why_no_nccl = copy_rate_gpu.why_skipped()
    gpu = copy_rate_gpu.measure(SERVED, num_bytes, rounds) if why_no_nccl is None else {}
    console.print(f"nccl: skipped: {why_no_nccl}" if why_no_nccl else f"nccl, (carrier, raw) in bytes a second: {gpu}")
    result = result_of(trials, gpu, why_no_nccl)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    for name, value in result.figures.items():
        console.print(f"{name} {'null' if value is None else format(value, '.4g')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
