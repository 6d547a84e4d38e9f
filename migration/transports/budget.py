"""When may the next chunk go? One budget of bytes a second for everything that leaves a rank, or arrives at it, and is
not urgent.
"""

from __future__ import annotations

import threading


class Budget:
    """Thread-safe. Concurrent pushes share it, so that two of them cost those who decode no more than one does.

    Fair: turns are given in the order in which they are asked for, and a push asks for its next one only after the last
    has come. Each of n pushes so gets one chunk in n.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        """None: as fast as it goes."""
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    @property
    def is_bounded(self) -> bool:
        return self._bytes_per_s is not None

    def take(self, num_bytes: int, now_s: float) -> float:
        """Book these bytes; returns when they may go (time.monotonic()), which is now if nothing was booked lately."""
        if self._bytes_per_s is None:
            return now_s
        with self._lock:
            turn_s = max(now_s, self._free_s)
            self._free_s = turn_s + num_bytes / self._bytes_per_s
        return turn_s
