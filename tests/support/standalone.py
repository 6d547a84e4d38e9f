"""Instances in processes of their own, without Ray: `python -m instance.standalone`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from instance.spec import InstanceSpec, InstanceStarted
from instance.standalone import StartFailed, told
from orchestrator.gateway.spec import Member

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 10.0


class InstanceProcess:
    """Started at once; `wait` for it, then `stop` or `kill` it."""

    def __init__(self, spec: InstanceSpec, log: Path) -> None:
        argument, environment = told(spec)
        command = [sys.executable, "-m", "instance.standalone", argument]
        self.spec = spec
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self._started: InstanceStarted | None = None

    def wait(self) -> Member:
        """Raises AssertionError with the instance's own line when it could not start."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told = msgspec.json.decode(line or b"{}", type=dict)
        if "address" not in told:
            failed = msgspec.convert(told or {"error": "it said nothing"}, StartFailed)
            raise AssertionError(f"{self.spec.instance} did not start: {failed.error}")
        self._started = msgspec.convert(told, InstanceStarted)
        return self.member

    @property
    def member(self) -> Member:
        assert self._started is not None
        return Member(self._started.instance, self._started.epoch, self._started.address)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(STOP_S)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def start_instances(specs: Sequence[InstanceSpec], logs: Path) -> list[InstanceProcess]:
    """All at once; each is waited for. None is left running when one fails."""
    processes = [InstanceProcess(spec, logs / f"{spec.instance}.log") for spec in specs]
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.stop()
        raise
    return processes
