"""Who ends Ray's processes when the one that started them is killed? A small process that waits for its pipe to close.

Linux ends the raylet and the GCS with us, but the raylet's agents then try for a minute to report that to the dead
GCS. The reaper is told who is there ("pid create_time" a line), and "done" when all have been stopped in order.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

import psutil

DONE = "done"


class Reaper:
    """The starting process's end of the pipe."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C in a terminal must not end it before it has done its work.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.runtime.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def note(self, processes: Iterable[psutil.Process]) -> None:
        """These are to be killed, with their descendants, if we die."""
        for process in processes:
            if process.pid != self._process.pid:
                with suppress(psutil.NoSuchProcess):
                    self._say(f"{process.pid} {process.create_time()}")

    def dismiss(self) -> None:
        """All have ended in order."""
        self._say(DONE)
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        if self._process.stdin is not None and self._process.poll() is None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()


def watch(pipe: TextIO) -> None:
    """Read until the pipe closes, then kill everybody named, unless the last word was DONE."""
    noted: dict[int, float] = {}
    for line in pipe:
        if line.strip() == DONE:
            return
        pid, create_time = line.split()
        noted[int(pid)] = float(create_time)
    kill(noted)


def kill(noted: dict[int, float]) -> None:
    """Kill these processes and their descendants; a number that another process has by now is left alone."""
    doomed: list[psutil.Process] = []
    for pid, create_time in noted.items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == create_time:
                doomed += [process, *process.children(recursive=True)]
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    watch(sys.stdin)
