"""(of copy_rate) And from GPU to GPU? Two processes, on two GPUs or on one, over `migration.transports.nccl`.

The raw rate is that of the link alone. Through NCCL: the same bytes in the same pieces, contiguous, nothing packed and
nothing said meanwhile. Through CUDA IPC on one GPU: a copy into and a copy out of the shared slots by both processes at
once. Runs with torch and CuPy; the whole carrier, and so the share, needs msgspec too. tests/gpu uses the same ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.copy_rate_memory import KVMemory, Lines, Shape, order_of
from migration.errors import CopyFailed
from migration.transports.links import NUM_SLOTS, Link, LinkAnswer, LinkOffer, make_in_time, wait_done
from migration.transports.nccl import NcclMaker, why_unavailable
from migration.types import BlockRange, MigrationId

SLOT_BYTES = 32 << 20
LINK_S = 60.0
CHUNK_S = 60.0


def why_skipped() -> str | None:
    return why_unavailable() or (None if importlib.util.find_spec("msgspec") else "msgspec is not installed")


def run(story: str, way: str, shape: Shape, num_bytes: int, rounds: int = 0) -> dict[str, Any]:
    """Both ends of a story (see `_End`), each in a process of its own; what the sender found. `way`: ``ipc``, ``nccl``.
    Raises `ChildProcessError` with its reason."""
    ends = socket.socketpair()
    processes = []
    for role, sock in enumerate(ends):
        settings = {"way": way, "shape": order_of(shape), "num_bytes": num_bytes, "rounds": rounds, "story": story}
        argv = [sys.executable, "-m", "bench.copy_rate_gpu", str(role), str(sock.fileno()), json.dumps(settings)]
        # Two ranks on one GPU: NCCL takes them for two hosts, and then goes through sockets.
        alone = (
            {"NCCL_HOSTID": f"copy_rate-{role}", "NCCL_SOCKET_IFNAME": "lo"} if torch.cuda.device_count() < 2 else {}
        )
        pipe = subprocess.PIPE if role == 0 else None
        processes.append(
            subprocess.Popen(argv, pass_fds=(sock.fileno(),), env=os.environ | alone, stdout=pipe, text=True)
        )
    for sock in ends:
        sock.close()
    try:
        output, _ = processes[0].communicate(timeout=10 * LINK_S)
        processes[1].wait(LINK_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if processes[0].returncode or not output.strip():
        raise ChildProcessError(f"the sending process ended {processes[0].returncode}: {output}")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


class _End:
    """One of the two processes. The other is told what is needed in JSON lines."""

    def __init__(self, role: int, sock: socket.socket, settings: dict[str, Any]) -> None:
        self.is_sender = role == 0
        self._sock, self._lines = sock, Lines(sock)
        self._shape = Shape(**settings["shape"])
        self._rounds: int = settings["rounds"]
        device = role % torch.cuda.device_count()
        torch.cuda.set_device(device)
        self._device = f"cuda:{device}"
        self._memory = KVMemory(KVMemory.make(settings["num_bytes"], seed=role + 1).raw.to(self._device))
        self._store = self._memory.store(self._shape)
        self._table = self._memory.table(self._shape, seed=role + 1)
        self._maker = NcclMaker(self._store, prefers_ipc=settings["way"] == "ipc")
        self._slot_blocks = max(1, SLOT_BYTES // self._shape.block_bytes)

    def links(self) -> dict[str, Any]:
        """Every block through a bare link; equal when each page of the receiver is what the sender's memory has."""
        link = self._link()
        self._through(link)
        torch.cuda.synchronize()
        if self.is_sender:
            answer = self._hear()
            link.abort()
            return answer
        sent = KVMemory(KVMemory.make(self._memory.raw.numel(), seed=1).raw.to(self._device))
        expected = self._packed(sent, sent.table(self._shape, seed=1))
        is_equal = torch.equal(self._packed(self._memory, self._table), expected)
        untouched = KVMemory(KVMemory.make(self._memory.raw.numel(), seed=2).raw.to(self._device))
        was_equal = torch.equal(self._packed(untouched, self._table), expected)
        self._lines.say(is_equal=is_equal, was_equal=was_equal, is_direct=link.is_direct)
        self._lines.hear()
        link.abort()
        return {}

    def deaf(self) -> dict[str, Any]:
        """The receiver comes up and takes nothing: the sender's deadline passes, and its abort returns."""
        link = self._link()
        if not self.is_sender:
            self._lines.hear()  # until the sender is gone
            return {}
        link.pack(0, self._ids(0))
        link.ship(0, len(self._ids(0)[0]) * self._shape.block_bytes)
        try:
            wait_done(link, 0, time.monotonic() + 2.0)
        except CopyFailed as error:
            link.abort()
            return {"failure": str(error)}
        return {"failure": None}

    def alone(self) -> dict[str, Any]:
        """The receiver never comes: the watchdog ends the wait."""
        if not self.is_sender:
            return {}
        offer = self._maker.offer(SLOT_BYTES)
        begun_s = time.monotonic()
        try:
            make_in_time(lambda: self._maker.connect(offer, LinkAnswer(())), 3.0)
        except CopyFailed as error:
            return {"failure": str(error), "took_s": time.monotonic() - begun_s}
        return {"failure": None}

    def rates(self) -> dict[str, Any]:
        """The whole carrier and the raw link in turns: bytes a second of each, by round; the first is not counted."""
        from migration.transports import CarrierParams, open_receiver, open_sender  # noqa: PLC0415 - msgspec

        raw, params, moved = self._link(), CarrierParams(), MigrationId("copy_rate")
        if not self.is_sender:
            receiver = open_receiver(self._store, "nccl://127.0.0.1", b"copy_rate", params, None, self._maker)
            receiver.open(moved, self._table)
            self._lines.say(url=receiver.url)
            for _ in range(self._rounds + 1):
                self._raw(raw)
            self._lines.hear()
            return {}
        url = self._hear()["url"]
        sender = open_sender(self._store, b"copy_rate", params, None, self._maker)
        blocks = BlockRange(0, len(self._table[0]))
        rates: dict[str, list[float]] = {"push": [], "raw": []}
        arms: dict[str, Callable[[], object]] = {
            "push": lambda: sender.push(moved, url, self._table, blocks, timeout_s=CHUNK_S, urgent=True),
            "raw": lambda: self._raw(raw),
        }
        for _ in range(self._rounds + 1):
            for name, arm in arms.items():
                begun_s = time.perf_counter()
                arm()
                rates[name].append(self._memory.raw.numel() / (time.perf_counter() - begun_s))
        sender.close()
        return {"is_direct": raw.is_direct, **{name: values[1:] for name, values in rates.items()}}

    def _link(self) -> Link:
        slot_bytes = self._slot_blocks * self._shape.block_bytes
        if self.is_sender:
            offer = self._maker.offer(slot_bytes)
            self._lines.say(unique_id=offer.unique_id.hex(), gpu=offer.gpu.hex(), slot_bytes=slot_bytes)
            answer = LinkAnswer(tuple(bytes.fromhex(handle) for handle in self._hear()["handles"]))
            return make_in_time(lambda: self._maker.connect(offer, answer), LINK_S)
        said = self._hear()
        offer = LinkOffer(bytes.fromhex(said["unique_id"]), bytes.fromhex(said["gpu"]), said["slot_bytes"])
        answer, make = self._maker.answer(offer)
        self._lines.say(handles=[handle.hex() for handle in answer.slot_handles])
        return make_in_time(make, LINK_S)

    def _through(self, link: Link) -> None:
        """Chunk by chunk, one at a time: what is shown is that it is right, not that it is fast."""
        for number in range(-(-len(self._table[0]) // self._slot_blocks)):
            slot, ids = number % NUM_SLOTS, self._ids(number)
            num_bytes = len(ids[0]) * self._shape.block_bytes
            if self.is_sender:
                link.pack(slot, ids)
                if link.is_direct:
                    wait_done(link, slot, time.monotonic() + CHUNK_S)
                self._lines.say(chunk=number)
                link.ship(slot, num_bytes)
                self._hear()
            else:
                self._hear()
                link.receive(slot, num_bytes)
                wait_done(link, slot, time.monotonic() + CHUNK_S)
                link.unpack(slot, ids)
                self._lines.say(landed=number)

    def _raw(self, link: Any) -> None:
        piece = self._slot_blocks * self._shape.block_bytes
        starts = range(0, self._memory.raw.numel() // piece * piece, piece)
        for number, start in enumerate(starts):
            slot = number % NUM_SLOTS
            if not link.is_direct:
                (link.ship if self.is_sender else link.receive)(slot, piece)
                continue
            if not self.is_sender or number >= NUM_SLOTS:
                self._sock_recv()
            here, there = self._memory.raw[start : start + piece].view(torch.uint8), link._slots[slot]
            (there if self.is_sender else here).copy_(here if self.is_sender else there)
            torch.cuda.current_stream().synchronize()
            self._sock.sendall(b".")
        if link.is_direct and self.is_sender:
            for _ in range(min(len(starts), NUM_SLOTS)):
                self._sock_recv()
        if not link.is_direct:
            for slot in range(NUM_SLOTS):
                wait_done(link, slot, time.monotonic() + CHUNK_S)

    def _sock_recv(self) -> None:
        if not self._sock.recv(1):
            raise ConnectionResetError("the other process is gone")

    def _ids(self, number: int) -> tuple[tuple[int, ...], ...]:
        return (self._table[0][number * self._slot_blocks : (number + 1) * self._slot_blocks],)

    def _packed(self, memory: KVMemory, table: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        out = torch.empty(len(table[0]) * self._shape.block_bytes, dtype=torch.uint8, device=self._device)
        memory.store(self._shape).gather_on_device(table, out)
        return out

    def _hear(self) -> dict[str, Any]:
        said = self._lines.hear()
        if said is None:
            raise ConnectionResetError("the other process is gone")
        return said


def measure(shape: Shape, num_bytes: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(carrier's rate, raw rate) in bytes a second of each round, by way: through NCCL, and on one GPU through CUDA IPC
    too."""
    ways = ("nccl",) if torch.cuda.device_count() > 1 else ("ipc", "nccl")
    found = {way: run("rates", way, shape, num_bytes, rounds) for way in ways}
    return {way: list(zip(rates["push"], rates["raw"], strict=True)) for way, rates in found.items()}


def share_of(measured: dict[str, list[tuple[float, float]]]) -> float:
    """Of the fast path: CUDA IPC where both ends are on one GPU."""
    return median(rate / raw for rate, raw in measured.get("ipc", measured["nccl"]))


def main(argv: list[str]) -> None:
    if not argv:
        reason = why_skipped()
        if reason is not None:
            print(f"skipped: {reason}")
            return
        measured = measure(Shape("Llama-3-8B: 16-token blocks", 64 << 10, 32), 1 << 30, 9)
        for way, rates in measured.items():
            print(way, " ".join(f"{rate / 1e9:.2f}/{raw / 1e9:.2f}" for rate, raw in rates), "GB/s, carrier/raw")
        print(f"nccl_share {share_of(measured):.4g}")
        return
    role, fd, settings = int(argv[0]), int(argv[1]), json.loads(argv[2])
    end = _End(role, socket.socket(fileno=fd), settings)
    found = _story_of(end, settings["story"])()
    print(json.dumps(found), flush=True)
    os._exit(0)  # an NCCL that waits for a peer must not hold the process


def _story_of(end: _End, name: str) -> Callable[[], dict[str, Any]]:
    return {"links": end.links, "deaf": end.deaf, "alone": end.alone, "rates": end.rates}[name]


if __name__ == "__main__":
    main(sys.argv[1:])
