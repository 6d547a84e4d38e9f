"""How does a valid frame become a hostile one? Seeded: bytes turned, cut, spliced, lied about, and values replaced."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec

MARKERS = bytes((0xC0, 0xC4, 0xC5, 0xC6, 0xCA, 0xCB, 0xCF, 0xD3, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF))
"""First bytes of msgpack's nil, bytes, floats, 64-bit integers, strings, arrays and maps that say their length."""
LENGTHS = (b"\x00", b"\xff", b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", bytes(4), b"\x80\x00\x00\x00")
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63), -(2**31)),
    *(0.0, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", "m", "\0", "tcp://", "tcp://127.0.0.1:1", "ipc:///x", "../x", "\u202e\U0001f600", "x" * 5000),
    *(b"", b"\0", b"\xff" * 300, [], {}, [[]], [None], [0], ["m", "m"], {"type": "Abort"}),
)


class Mutator:
    """The same seed gives the same frames."""

    def __init__(self, seed: int, frames: Sequence[bytes], prefix: int = 0) -> None:
        """`frames`: valid ones, to start from and to splice. `prefix`: their first bytes, which are no msgpack."""
        self.rng = random.Random(seed)
        self._frames = frames
        self._prefix = prefix

    def frame(self) -> bytes:
        """A tenth is as it was (but nobody has asked for it), half says something else, the rest is damaged."""
        whole, lot = self.rng.choice(self._frames), self.rng.random()
        if lot < 0.1:
            return whole
        frame = self._replaced(whole) if lot < 0.7 else whole
        for _ in range(self.rng.choice((1, 1, 2, 4)) if lot > 0.6 else 0):
            frame = self.damaged(frame)
        return frame

    def damaged(self, frame: bytes) -> bytes:
        """One thing is done to its bytes."""
        rng, data = self.rng, bytearray(frame)
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(9):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
            case 5:
                data[at:at] = data[at:end]
            case 6:
                other = rng.choice(self._frames)
                data[at:] = other[rng.randint(0, len(other)) :]
            case 7:
                lie = bytes((rng.choice(MARKERS),)) + rng.choice(LENGTHS)
                data[at : at + len(lie)] = lie
            case _:
                lie = rng.choice(LENGTHS)
                data[at : at + len(lie)] = lie
        return bytes(data)

    def _replaced(self, frame: bytes) -> bytes:
        """One value anywhere in it is another one, all else as it was: this passes the parser and meets the machine."""
        value = msgspec.msgpack.decode(frame[self._prefix :])
        return frame[: self._prefix] + msgspec.msgpack.encode(self.another(value))

    def another(self, value: Any) -> Any:
        """The same, but for one value in it."""
        rng = self.rng
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            match rng.randrange(10):
                case 0:
                    return {name: one for name, one in value.items() if name != key}
                case 1:
                    return {**value, "more": rng.choice(VALUES)}
            return {**value, key: self.another(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.7:
            index = rng.randrange(len(value))
            return [*value[:index], self.another(value[index]), *value[index + 1 :]]
        same_kind = [one for one in VALUES if type(one) is type(value)] if rng.random() < 0.85 else []
        return rng.choice(same_kind or VALUES)
