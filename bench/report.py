"""How does a bench write its result down? In the demo's JSON shape, with its writer (orchestrator/demo/result.py)."""

from __future__ import annotations

from orchestrator.demo.result import Machine, Result, Value, finite, read_result, spread_of, this_machine, write_result

__all__ = ["Machine", "Result", "Value", "finite", "read_result", "spread_of", "this_machine", "write_result"]
