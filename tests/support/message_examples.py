"""One of every message of the migration protocol."""

from __future__ import annotations

from migration import messages as msg
from migration.messages import Message

EXAMPLES: tuple[Message, ...] = (
    msg.Reserve("m", "r", "a", 1, "tcp://a", 2, b"\x00payload", 17, "print", 16, 0, 10.0),
    msg.Reserved("m", 32, 5, ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")),
    msg.Refused("m", "no blocks"),
    msg.Grow("m", 100),
    msg.Grown("m", 7),
    msg.Prepare("m"),
    msg.Prepared("m"),
    msg.Commit("m", b"state" * 1000),
    msg.Committed("m"),
    msg.Cancel("m", "preempted"),
    msg.Cancelled("m"),
)
