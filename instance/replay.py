"""Has this frame been said before? A sender numbers its frames, and an inbox remembers which of them it has taken.

As IPsec and DTLS do it (RFC 6479): per session the highest number taken, and a window of bits below it. Whoever calls
`admit` has made sure that a member wrote the stamp (`seal.py`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass

SESSION_BYTES = 8
STAMP_BYTES = SESSION_BYTES + 8
"""A session's random name, and the frame's number in it, from 0, big-endian."""
WINDOW_FRAMES = 1024
"""A frame may be overtaken by fewer than so many others of its session; one connection keeps order, two of the same
session (a broken one and the next) may not."""
MAX_SESSIONS = 4096
"""Remembered by an inbox; beyond it the one that has been silent longest is forgotten."""


class Session:
    """One sender's way to one inbox, for as long as it keeps it."""

    def __init__(self) -> None:
        self._name = secrets.token_bytes(SESSION_BYTES)
        self._num_stamped = 0

    def stamp(self) -> bytes:
        """STAMP_BYTES bytes, never the same ones again."""
        number = self._num_stamped
        self._num_stamped += 1
        return self._name + number.to_bytes(STAMP_BYTES - SESSION_BYTES, "big")


@dataclass(slots=True)
class _Heard:
    highest: int
    taken: int
    """Bit i: the frame `highest - i` was taken."""


class ReplayGuard:
    """What one inbox has taken."""

    def __init__(self, window_frames: int = WINDOW_FRAMES, max_sessions: int = MAX_SESSIONS) -> None:
        self._window_frames = window_frames
        self._mask = (1 << window_frames) - 1
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[bytes, _Heard] = OrderedDict()

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def admit(self, stamp: bytes | memoryview) -> bool:
        """True, once for each stamp of a session that is remembered. False: it was taken before, or is too old to tell.

        A session that is new, or was forgotten, is taken up with the frame that comes."""
        name, number = bytes(stamp[:SESSION_BYTES]), int.from_bytes(stamp[SESSION_BYTES:STAMP_BYTES], "big")
        heard = self._sessions.get(name)
        if heard is None:
            self._sessions[name] = _Heard(number, 1)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
            return True
        ahead = number - heard.highest
        if ahead > 0:
            # A number may be far ahead, and shifting by it would cost memory.
            heard.taken = (heard.taken << ahead | 1) & self._mask if ahead < self._window_frames else 1
            heard.highest = number
        elif -ahead >= self._window_frames or heard.taken >> -ahead & 1:
            return False
        else:
            heard.taken |= 1 << -ahead
        self._sessions.move_to_end(name)  # only by what is taken: a replay keeps nothing alive
        return True

    def check_integrity(self) -> None:
        assert len(self._sessions) <= self._max_sessions
        for heard in self._sessions.values():
            assert heard.taken & 1 and 0 < heard.taken <= self._mask
