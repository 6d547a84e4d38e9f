"""Which blocks does an instance keep free beside urgent requests? The headroom of their levels, as the fleet was told.

A level of priority may have headroom: on an instance that runs a request of it, so many blocks are kept free of less
urgent ones, so that its batch keeps its speed and it need not preempt anybody as it grows.
"""

from __future__ import annotations

from collections.abc import Iterable

Headroom = tuple[tuple[int, int], ...]
"""(rank of a level, blocks kept free beside a request of it) of all levels. Lower ranks are more urgent; a priority
belongs to the most urgent level whose rank it reaches."""


def level_of(headroom: Headroom, priority: int) -> int | None:
    """Rank of the most urgent level that this priority reaches; None: it reaches none."""
    return min((rank for rank, _ in headroom if priority <= rank), default=None)


def kept_from(headroom: Headroom, priority: int, running: Iterable[int]) -> int:
    """Blocks that a request of this priority must leave free when it begins beside requests of these priorities: the
    headroom of each more urgent level that runs, once."""
    if not any(blocks for _, blocks in headroom):
        return 0
    own = level_of(headroom, priority)
    levels = {level_of(headroom, other) for other in set(running)}
    return sum(blocks for rank, blocks in headroom if rank in levels and (own is None or rank < own))
