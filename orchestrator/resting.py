"""What must be left alone for a while, and until when? A bounded set with a time for each name."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


class RestingPlace(Generic[Name]):
    """At most `max_names`; past that the one put to rest first is forgotten, which costs at worst one more try."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._until_s: dict[Name, float] = {}

    def rest(self, name: Name, until_s: float) -> None:
        """Leave it alone until then; a longer rest it already has is kept."""
        longest = max(until_s, self._until_s.pop(name, until_s))
        self._until_s[name] = longest
        while len(self._until_s) > self._max_names:
            del self._until_s[next(iter(self._until_s))]

    def forget_rested(self, now_s: float) -> None:
        for name in [name for name, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[name]

    def names(self) -> frozenset[Name]:
        return frozenset(self._until_s)
