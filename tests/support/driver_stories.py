"""How is a story of two drivers told? On a jumping clock, over in-memory ports, and checked at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from migration.messages import Message
from migration.types import MigrationReport, Outcome
from orchestrator.sim.jumping_loop import run_jumping
from tests.support.migration_kit import REQUEST, Pair


def run(story: Callable[[Pair], Awaitable[None]], pair: Callable[[], Pair] = Pair) -> None:
    async def main() -> None:
        async with pair() as made:
            await story(made)

    run_jumping(main(), limit_s=600.0)


def lose_first(kind: type, count: int) -> Callable[[Message], int]:
    seen = 0

    def rule(message: Message) -> int:
        nonlocal seen
        seen += isinstance(message, kind)
        return 0 if isinstance(message, kind) and seen <= count else 1

    return rule


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - the clock jumps, so this waits for nothing
            await asyncio.sleep(0.0005)


def expect_moved(pair: Pair, report: MigrationReport) -> None:
    assert report.outcome is Outcome.COMMITTED, report.reason
    assert pair.source.is_released
    assert pair.destination.num_commits == 1
    assert REQUEST in pair.destination.committed
    assert pair.is_clean


def expect_stayed(pair: Pair, report: MigrationReport, outcome: Outcome) -> None:
    assert report.outcome is outcome, report
    assert pair.source.is_there and not pair.source.is_stopped
    assert not pair.destination.committed
    assert pair.is_clean
