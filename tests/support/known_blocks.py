"""What does a subscriber know of one instance's prefix cache? The plain reading of `CachedBlocks`."""

from __future__ import annotations

from instance.messages import ALL_CACHED, HASH_BYTES, CachedBlocks


class KnownBlocks:
    """Takes messages in any order, and says what the next `Subscribe` would."""

    def __init__(self) -> None:
        self.hashes: set[bytes] = set()
        self.cached_from = ALL_CACHED

    def hear(self, message: CachedBlocks) -> None:
        added, removed = split(message.added), split(message.removed)
        if message.begin == ALL_CACHED:
            self.hashes = set(added)
        elif self.cached_from == ALL_CACHED or message.begin > self.cached_from:
            return  # a gap
        elif message.end < self.cached_from:
            return  # late: more is known than it says
        else:
            self.hashes = (self.hashes | set(added)) - set(removed)
        self.cached_from = message.end


def split(hashes: bytes) -> list[bytes]:
    assert len(hashes) % HASH_BYTES == 0
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
