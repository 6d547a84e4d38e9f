"""How much of a fleet's memory is free, wanted, and of no use because it is spread over the instances? Pure.

After Llumnix (OSDI'24), which counts at a moment the free memory that the heads of the queues could have had if all
free memory were in one place. Here: an instance's head of line is *blocked* when the blocks it lacks are more than are
free there. Blocked heads are given blocks out of the free blocks of all instances together, those that lack least
first, until the next one no longer fits; the blocks given are the fragmented ones, their share of all blocks the
fragmentation. A head that waits for something else (a slot of the batch, headroom of the more urgent) is not blocked;
behind a head nobody is looked at, as in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable


def fragmented_blocks(free_and_lacking: Iterable[tuple[int, int]]) -> int:
    """Of instances as (free blocks, blocks that its head of line lacks; 0: nobody waits)."""
    instances = list(free_and_lacking)
    left = whole = sum(free for free, _ in instances)
    for lacking in sorted(lacking for free, lacking in instances if lacking > free):
        if lacking > left:
            break
        left -= lacking
    return whole - left
