"""What may the admin API answer besides what was asked for?"""

from __future__ import annotations

from orchestrator.errors import OrchestratorError


class Declined(OrchestratorError):
    """The orchestrator answered, and said no."""
