"""Which tokens go to the client next? Streams of output that survive a change of owner: each token once, in order.

Pure. An entry whose tokens were seen is dropped, an early one is held until the gap before it is filled, and the owner
of a request is whoever gave (or announced) its highest offset. Every token is kept:
should its owner be lost, another one goes on after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from instance.messages import OutputEntry
from migration.types import Epoch, InstanceId, RequestId

Owner = tuple[InstanceId, Epoch]

MAX_HELD_ENTRIES = 1024
"""Early entries kept for one request; what comes beyond is dropped and counted, and the gap then times out."""


@dataclass(frozen=True, slots=True)
class OwnerMoved:
    """A request goes on at another instance."""

    request_id: RequestId
    previous: Owner
    owner: Owner
    offset: int


@dataclass(frozen=True, slots=True)
class Relayed:
    """What one frame (or announcement) lets through."""

    entries: tuple[OutputEntry, ...] = ()
    moves: tuple[OwnerMoved, ...] = ()


@dataclass(slots=True)
class Stream:
    """One request's output so far."""

    request_id: RequestId
    owner: Owner
    tokens: list[int] = field(default_factory=list)
    highest: int = 0
    """Highest offset that anybody has spoken of: end of an entry, or of an announcement."""
    held: dict[int, list[OutputEntry]] = field(default_factory=dict)

    @property
    def next_offset(self) -> int:
        return len(self.tokens)

    @property
    def num_held(self) -> int:
        return sum(len(entries) for entries in self.held.values())


class Relay:
    """All streams of one gateway."""

    def __init__(self, max_held_entries: int = MAX_HELD_ENTRIES) -> None:
        self._streams: dict[str, Stream] = {}
        self._gaps: set[str] = set()
        """Streams that hold entries."""
        self._max_held = max_held_entries
        self.num_duplicates = 0
        self.num_overflows = 0
        self.num_overlaps = 0
        """Entries that repeat some tokens and bring others, with data that cannot be cut: dropped."""

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: RequestId, owner: Owner, tokens: tuple[int, ...] = ()) -> None:
        """Start a stream that goes on after these tokens. Raises ValueError when it is open already."""
        if request_id in self._streams:
            raise ValueError(f"the stream of {request_id} is open already")
        self._streams[request_id] = Stream(request_id, owner, list(tokens), len(tokens))

    def close(self, request_id: RequestId) -> None:
        """Forget a stream; what still comes for it is dropped."""
        self._streams.pop(request_id, None)
        self._gaps.discard(request_id)

    def owner(self, request_id: RequestId) -> Owner | None:
        stream = self._streams.get(request_id)
        return None if stream is None else stream.owner

    def tokens(self, request_id: RequestId) -> tuple[int, ...]:
        """Every output token relayed so far; empty for an unknown request."""
        stream = self._streams.get(request_id)
        return () if stream is None else tuple(stream.tokens)

    def num_tokens(self, request_id: RequestId) -> int:
        stream = self._streams.get(request_id)
        return 0 if stream is None else stream.next_offset

    def has_gap(self, request_id: RequestId) -> bool:
        """True: later tokens are here, earlier ones are missing."""
        return request_id in self._gaps

    @property
    def has_gaps(self) -> bool:
        """True: of at least one request."""
        return bool(self._gaps)

    def owned_by(self, owner: Owner) -> tuple[RequestId, ...]:
        return tuple(stream.request_id for stream in self._streams.values() if stream.owner == owner)

    def on_entries(self, sender: Owner, entries: tuple[OutputEntry, ...]) -> Relayed:
        """Take what one frame brings; return what may go to the clients now, and who changed hands."""
        out: list[OutputEntry] = []
        moves: list[OwnerMoved] = []
        streams = self._streams
        for entry in entries:
            stream = streams.get(entry.request_id)
            if stream is None:
                continue
            end = entry.offset + len(entry.token_ids)
            if end > stream.highest:
                if sender != stream.owner:
                    moves.extend(_take_over(stream, sender, entry.offset))
                stream.highest = end
                if not stream.held and entry.offset == len(stream.tokens):
                    # Nearly every entry: the next tokens, and nothing waits for them.
                    stream.tokens.extend(entry.token_ids)
                    out.append(entry)
                    if entry.finish_reason is not None:
                        del streams[entry.request_id]
                    continue
            self._hold(stream, entry)
            out.extend(self._release(stream))
            if stream.held and entry.request_id in streams:
                self._gaps.add(entry.request_id)
            else:
                self._gaps.discard(entry.request_id)
        return Relayed(tuple(out), tuple(moves))

    def on_owner_changed(self, request_id: RequestId, owner: Owner, offset: int) -> tuple[OwnerMoved, ...]:
        """A destination says that a request is its own from this offset on."""
        stream = self._streams.get(request_id)
        if stream is None or offset < stream.highest:
            return ()
        stream.highest = offset
        return _take_over(stream, owner, offset)

    def _hold(self, stream: Stream, entry: OutputEntry) -> None:
        num_seen = stream.next_offset - entry.offset
        if num_seen > 0:
            kept = entry.token_ids[num_seen:]
            if not kept and (entry.finish_reason is None or not entry.token_ids):
                self.num_duplicates += 1
                return
            if entry.extra:
                self.num_overlaps += 1
                return
            entry = msgspec.structs.replace(entry, offset=stream.next_offset, token_ids=kept)
        same_offset = stream.held.get(entry.offset, [])
        if entry in same_offset:
            self.num_duplicates += 1
        elif stream.num_held >= self._max_held and entry.offset != stream.next_offset:
            self.num_overflows += 1
        else:
            # Entries without tokens go first (they would be "seen" once the tokens of that offset are out), ends last.
            stream.held[entry.offset] = sorted(
                [*same_offset, entry], key=lambda held: (held.finish_reason is not None, len(held.token_ids))
            )

    def _release(self, stream: Stream) -> list[OutputEntry]:
        out: list[OutputEntry] = []
        while stream.held and (offset := min(stream.held)) <= stream.next_offset:
            for entry in stream.held.pop(offset):
                if entry.offset != stream.next_offset:
                    self._hold(stream, entry)  # other boundaries than what is out by now: cut it, or drop it
                    continue
                out.append(entry)
                stream.tokens.extend(entry.token_ids)
                if entry.finish_reason is not None:
                    del self._streams[stream.request_id]
                    return out
        return out

    def check_integrity(self) -> None:
        """Raise AssertionError unless nothing deliverable is held and bounds hold (tests call it after each event)."""
        for stream in self._streams.values():
            assert stream.next_offset not in stream.held, "a deliverable entry is held"
            assert stream.num_held <= self._max_held, "held entries are bounded"
            assert stream.highest >= stream.next_offset
        gaps = {request_id for request_id, stream in self._streams.items() if stream.held}
        assert self._gaps == gaps, "the streams with gaps are told wrong"


def _take_over(stream: Stream, owner: Owner, offset: int) -> tuple[OwnerMoved, ...]:
    if owner == stream.owner:
        return ()
    previous, stream.owner = stream.owner, owner
    return (OwnerMoved(stream.request_id, previous, owner, offset),)
