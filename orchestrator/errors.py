"""Which errors can cross the orchestrator's boundary, and why may it say no?"""

from __future__ import annotations

from enum import Enum


class OrchestratorError(Exception):
    """Base of the errors a caller of this package may meet; its text is one clear line saying what to do."""


class ConfigError(OrchestratorError):
    """A setting is malformed or contradicts another one."""


class StartUpError(OrchestratorError):
    """The cluster cannot be started; nothing of it is left running."""


class Unreachable(OrchestratorError):
    """Nothing answers at the admin address."""


class JournalError(OrchestratorError):
    """A file is no journal, or a journal cannot be read."""


class LimitExceeded(OrchestratorError):
    """A named bound of the core would be passed. Nothing has changed."""


class RefusalKind(Enum):
    """Why the orchestrator declines a command. News for the caller, not an error of ours."""

    NOT_FOUND = "not_found"
    INVALID = "invalid"
    """What is asked for cannot be read."""
    AMBIGUOUS = "ambiguous"
    """The name fits several requests."""
    PRECONDITION = "precondition"
    """The state of the cluster does not allow it."""
    EXHAUSTED = "exhausted"
    """A bound is reached; later it may work."""
    OVERTAKEN = "overtaken"
    """Another command or a loss ended what was asked for."""
    UNAVAILABLE = "unavailable"
    """The instance did not carry it out; trying again is safe."""


class ActorGone(OrchestratorError):
    """The process behind a call has died; the call may or may not have been carried out."""


class CallFailed(OrchestratorError):
    """The process is there, but the call ended with an error or not in time: whether it was carried out is unknown."""
