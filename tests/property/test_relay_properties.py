"""Any interleaving, with any repeats, gives the client each token once and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instance.messages import OutputEntry
from migration.types import Epoch, InstanceId, RequestId
from orchestrator.gateway.relay import Owner, Relay

R = RequestId("r")
OWNERS: tuple[Owner, ...] = tuple((InstanceId(name), Epoch(1)) for name in "abc")


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[Owner, OutputEntry]], list[tuple[Owner, OutputEntry]]]:
    """(what the owners said, in order; the same as it arrives: shuffled, some of it repeated)."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    said: list[tuple[Owner, OutputEntry]] = []
    offset = 0
    for position, size in enumerate(sizes):
        ids = tuple(range(100 + offset, 100 + offset + size))
        finish = 1 if position == len(sizes) - 1 else None
        said.append((draw(st.sampled_from(OWNERS)), OutputEntry("r", offset, ids, finish_reason=finish)))
        offset += size
    if draw(st.booleans()):
        last_owner, last = said[-1]
        said[-1] = (last_owner, OutputEntry("r", last.offset, last.token_ids))
        said.append((last_owner, OutputEntry("r", offset, (), finish_reason=2)))
    repeated = draw(st.lists(st.sampled_from(said), max_size=10))
    return said, draw(st.permutations(said + repeated))


def delivered_by(relay: Relay, arrivals: list[tuple[Owner, OutputEntry]]) -> list[OutputEntry]:
    relay.open(R, OWNERS[0])
    out: list[OutputEntry] = []
    for owner, entry in arrivals:
        out.extend(relay.on_entries(owner, (entry,)).entries)
        relay.check_integrity()
    return out


@given(histories())
def test_each_token_is_delivered_once_and_in_order(
    history: tuple[list[tuple[Owner, OutputEntry]], list[tuple[Owner, OutputEntry]]],
) -> None:
    said, arrivals = history
    relay = Relay()
    assert delivered_by(relay, arrivals) == [entry for _, entry in said]
    assert R not in relay


@given(histories())
def test_without_the_relay_some_arrivals_are_wrong(
    history: tuple[list[tuple[Owner, OutputEntry]], list[tuple[Owner, OutputEntry]]],
) -> None:
    """The negative control: what arrives equals what was said only when nothing was repeated or reordered."""
    said, arrivals = history
    as_said = [entry for _, entry in said]
    as_arrived = [entry for _, entry in arrivals]
    assert (as_arrived == as_said) == (arrivals == said)


@given(st.data())
def test_entries_with_other_boundaries_still_give_each_token_once(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 20))
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, total - 1), st.integers(1, 5)), max_size=30), label="offset, length"
    )
    spans += [(offset, 1) for offset in range(total)]
    arrivals = [
        (OWNERS[0], OutputEntry("r", offset, tuple(range(offset, min(offset + length, total)))))
        for offset, length in data.draw(st.permutations(spans))
    ]
    relay = Relay()
    out = delivered_by(relay, arrivals)
    assert [token for entry in out for token in entry.token_ids] == list(range(total))
    assert relay.tokens(R) == tuple(range(total))
