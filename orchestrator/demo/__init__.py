"""Does it really work here? Two instances under uneven load, requests moving between them, and every answer checked."""

from __future__ import annotations

from orchestrator.demo.options import DemoOptions

__all__ = ["DemoOptions", "run"]


def run(options: DemoOptions) -> int:
    """Play the demo; returns the exit code: 0 the bars hold, 1 one does not, 2 bad input, 130 interrupted."""
    # Imported here: the benches write their results with this package's result.py and need no client and no pictures.
    from orchestrator.demo.session import play  # noqa: PLC0415

    return play(options)
