"""How long was each instance of a simulated fleet paid for? From when it was asked for until it was gone. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Presence:
    """Of every incarnation, by its actor's name."""

    began_s: dict[str, float] = field(default_factory=dict)
    """When it was asked for: the time it takes to start is paid, too."""
    ended_s: dict[str, float] = field(default_factory=dict)

    def seconds(self, since_s: float, until_s: float) -> float:
        """Of all instances together, in that time. Raises ValueError for a time that ends before it begins."""
        if until_s < since_s:
            raise ValueError(f"{since_s:g} .. {until_s:g} s is no span of time")
        return sum(
            max(0.0, min(until_s, self.ended_s.get(name, until_s)) - max(since_s, began_s))
            for name, began_s in self.began_s.items()
        )
