"""What may the admin API answer besides what was asked for?"""

from __future__ import annotations

from orchestrator.errors import OrchestratorError


class Declined(OrchestratorError):
    """The orchestrator answered, and said no. `reason` is for programs: that of the answer's google.rpc.ErrorInfo."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason


class NotAdmitted(OrchestratorError):
    """The admin API wants another token, or none can be spoken to with this certificate."""
