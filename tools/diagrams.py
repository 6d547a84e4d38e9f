"""What do the protocol's machines look like? Draws them into migration/README.md (``--check``: compares)."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from migration.table import DESTINATION_TABLE, SOURCE_TABLE, DestinationState, SourceState

README = Path(__file__).resolve().parent.parent / "migration" / "README.md"
MANY_EVENTS = 4
"""More events than this on one arrow are counted instead of named."""


State = TypeVar("State", bound=Enum)


def draw(table: Mapping[tuple[State, type], frozenset[State]], first: State, last: tuple[State, ...]) -> str:
    """A mermaid state diagram: one arrow for each pair of states, loops left out."""
    arrows: dict[tuple[State, State], list[str]] = defaultdict(list)
    for (state, event), targets in table.items():
        for target in targets:
            if target is not state:
                arrows[state, target].append(event.__name__)
    order = list(type(first))
    lines: list[str] = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for (state, target), events in sorted(arrows.items(), key=lambda arrow: tuple(map(order.index, arrow[0]))):
        names = sorted(events)
        label = ", ".join(names) if len(names) <= MANY_EVENTS else f"{len(names)} events that end it"
        lines.append(f"    {state.name} --> {target.name}: {label}")
    ends = [f"    {state.name} --> [*]" for state in last]
    return "\n".join([*lines, *ends, "```"])


def drawn(text: str) -> str:
    """The README with both diagrams anew between their markers. Raises `ValueError` when a marker is missing."""
    # Every end leads to CLOSING, and at once to DONE if nothing is held: draw the first arrow only.
    source_table = {
        (state, event): targets if state is SourceState.CLOSING else targets - {SourceState.DONE}
        for (state, event), targets in SOURCE_TABLE.items()
    }
    ends = (DestinationState.COMMITTED, DestinationState.CLOSED)
    diagrams = {
        "source": draw(source_table, SourceState.IDLE, (SourceState.DONE,)),
        "destination": draw(DESTINATION_TABLE, DestinationState.IDLE, ends),
    }
    for name, diagram in diagrams.items():
        head, begin, rest = text.partition(f"<!-- {name} diagram: make diagrams -->\n")
        _, end, tail = rest.partition(f"\n<!-- end of {name} diagram -->")
        if not begin or not end:
            raise ValueError(f"{README.name} has no markers for the {name} diagram")
        text = head + begin + diagram + end + tail
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the README is not up to date")
    check = parser.parse_args().check
    text = README.read_text()
    new = drawn(text)
    if check and new != text:
        print(
            "migration/README.md: the diagrams are not those of migration/table.py; run `make diagrams`",
            file=sys.stderr,
        )
        return 1
    if not check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
