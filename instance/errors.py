"""Which errors can cross the instance package's boundary?"""

from __future__ import annotations


class InstanceError(Exception):
    """Base of the errors a caller of this package may meet."""


class StartError(InstanceError):
    """The instance cannot start; the text is one line that says what to do about it."""


class EngineFailed(InstanceError):
    """The engine raised while it ran (or was already closed): it is never used again."""


class MalformedFleetMessage(InstanceError):
    """Bytes from an inbox are no fleet message of this version."""


class ReplayedMessage(InstanceError):
    """Bytes from an inbox that a member sent, and that came before (or so long ago that nobody can tell)."""


class StrangerMessage(InstanceError):
    """Bytes from an inbox whose MAC is missing or wrong: not from a member of this fleet, or not for this inbox."""
