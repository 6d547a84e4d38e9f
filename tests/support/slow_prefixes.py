"""Which instances hold the beginning of a prompt? The index of orchestrator/policy/prefixes.py, as a set for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from instance.messages import ALL_CACHED, HASH_BYTES, CachedBlocks


def hashes_as_bytes(hashes: Collection[int]) -> bytes:
    return b"".join(one.to_bytes(HASH_BYTES, "big") for one in hashes)


def cached_blocks(
    instance: str, begin: int, end: int, added: Collection[int] = (), removed: Collection[int] = (), epoch: int = 1
) -> CachedBlocks:
    return CachedBlocks(instance, epoch, 16, begin, end, hashes_as_bytes(added), hashes_as_bytes(removed))


class SlowIndex:
    """Without a bound."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self.hashes: dict[str, set[int]] = {}
        self.known_to: dict[str, int] = {}

    def set_members(self, members: Collection[tuple[str, int]]) -> None:
        for name, _ in self.epochs.items() - set(members):
            del self.hashes[name], self.known_to[name]
        for name, _ in set(members) - self.epochs.items():
            self.hashes[name], self.known_to[name] = set(), ALL_CACHED
        self.epochs = dict(members)

    def on_cached(self, message: CachedBlocks) -> None:
        name = message.instance
        if self.epochs.get(name) != message.epoch:
            return
        if message.begin == ALL_CACHED and message.end >= self.known_to[name]:
            self.hashes[name] = set()
        elif message.begin == ALL_CACHED or not message.begin <= self.known_to[name] < message.end:
            return
        self.hashes[name] -= set(numbers(message.removed))
        self.hashes[name] |= set(numbers(message.added))
        self.known_to[name] = message.end

    def saved_blocks(self, instance: str, prefix: Sequence[int]) -> int:
        return next((count for count, one in enumerate(prefix) if one not in self.hashes[instance]), len(prefix))


def numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + HASH_BYTES], "big") for at in range(0, len(data), HASH_BYTES)]
