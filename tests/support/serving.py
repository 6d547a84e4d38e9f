"""How does a test run `kvferry serve` as a user does? A process, its output, the other commands, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from orchestrator.admin.client import AdminClient
from orchestrator.cli_status import as_values
from tests.support.fleet import TOKEN

KVFERRY = (sys.executable, "-c", "from orchestrator.cli import main; main()")
READY_LINE = "serving; Ctrl-C stops everything"
STOP_S = 20.0
"""`serve` itself needs at most about 10 s; a loaded machine gets twice that."""


def free_port() -> int:
    """Below those that the system gives out by itself: nobody is given it in the seconds until it is bound for good."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str


def kvferry(*arguments: str, timeout_s: float = 60.0, environment: dict[str, str] | None = None) -> Done:
    """Run one command to its end."""
    done = subprocess.run(
        [*KVFERRY, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Serving:
    """A running `kvferry serve` with its ports."""

    def __init__(self, *arguments: str, num_gateways: int, environment: dict[str, str] | None = None) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.admin = f"127.0.0.1:{self.admin_port}"
        self.lines: list[str] = []
        ports = ("--port", str(self.port), "--admin-port", str(self.admin_port), "--gateways", str(num_gateways))
        self.process = subprocess.Popen(
            [*KVFERRY, "serve", *arguments, *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env={**os.environ, "KVFERRY_TOKEN": TOKEN, **(environment or {})},
        )

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_ready(self, timeout_s: float) -> None:
        """Read its output until it serves. Raises AssertionError with all it said when it ends or takes too long."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while READY_LINE not in self.lines:
                left_s = deadline_s - time.monotonic()
                data = os.read(self.process.stdout.fileno(), 65536) if selector.select(max(0.0, left_s)) else b""
                assert data, f"it does not serve after {timeout_s} s or has ended:\n" + "\n".join(self.lines)
                *lines, pending = (pending + data).split(b"\n")
                self.lines += [line.decode(errors="replace").rstrip() for line in lines]

    def command(self, *arguments: str, timeout_s: float = 60.0) -> Done:
        """Another kvferry command against this one."""
        return kvferry(*arguments, "--admin", self.admin, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What `kvferry status --json` prints, without the second that starting a process takes."""
        with AdminClient(self.admin) as client:
            values: dict[str, Any] = json.loads(json.dumps(as_values(client)))
        return values

    def instance(self, name: str) -> dict[str, Any]:
        """The status of one instance."""
        (found,) = [item for item in self.status()["instances"] if item["name"] == f"instances/{name}"]
        values: dict[str, Any] = found
        return values

    def descendants(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = STOP_S) -> tuple[int, str]:
        """Send the signal and wait; returns its exit status and what it said from then on."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out.decode(errors="replace")

    def end(self) -> None:
        """Whatever state it is in: leave nothing behind."""
        if self.process.poll() is None:
            left = self.descendants()
            self.process.terminate()
            try:
                self.process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
            for process in left:
                if process.is_running():
                    process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[str]:
    """Names of those that are still there after that long."""
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    return [f"{process.pid} {process.name()}" for process in left if process.is_running()]
