"""What must every engine do? The shared suite of the Engine port; a test module subclasses it with a fixture `pair`.

It yields an `EnginePair` over two idle engines (they may outlive a test) and calls `drain()` after it. There must be
room for 40 % of the blocks in one prompt, and for 4 sequences at a time.
"""

from __future__ import annotations

from tests.contract.engine_suite_ends import EndsContract
from tests.contract.engine_suite_headroom import HeadroomContract
from tests.contract.engine_suite_migrations import MigrationContract
from tests.contract.engine_suite_priorities import PriorityContract
from tests.contract.engine_suite_requests import RequestContract
from tests.contract.engine_suite_revivals import RevivalContract


class EngineContract(
    RequestContract, PriorityContract, HeadroomContract, EndsContract, MigrationContract, RevivalContract
):
    """Subclass as `class TestSomething(EngineContract)` with a fixture `pair`."""
