"""Which tokens go to which gateway, and at which offset? The token streams of one instance, across hand-overs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from instance.messages import OutputEntry, Submit
from instance.types import EngineOutput, Wishes
from migration.types import RequestId

MAX_TOMBSTONES = 4096


@dataclass(slots=True)
class _Stream:
    gateway: str
    next_offset: int
    opened_s: float
    wishes: Wishes | None


def wishes_of(submit: Submit) -> Wishes:
    """What a request wants of its speed as it comes, and how long it has waited by then."""
    return Wishes(submit.ttft_s, submit.tpot_s, submit.waited_s)


class StreamTable:
    """Every request whose tokens this instance emits: its gateway and the offset of its next token."""

    def __init__(self) -> None:
        self._streams: dict[RequestId, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._streams

    def open(
        self, request_id: RequestId, gateway: str, offset: int, now_s: float, wishes: Wishes | None = None
    ) -> None:
        """Start (or, after a hand-over, go on with) a stream: its next token has this offset. `wishes`: of its request,
        as it comes."""
        self._streams[request_id] = _Stream(gateway, offset, now_s, wishes)

    def open_for(self, submit: Submit, now_s: float) -> None:
        """Start the stream of a request that comes, or go on after the output with which it comes."""
        offset = len(submit.output_token_ids)
        self.open(RequestId(submit.request_id), submit.gateway_address, offset, now_s, wishes_of(submit))

    def close(self, request_id: RequestId) -> None:
        """Nothing more is emitted for it. Unknown ids are ignored."""
        self._streams.pop(request_id, None)

    def gateway(self, request_id: RequestId) -> str | None:
        stream = self._streams.get(request_id)
        return None if stream is None else stream.gateway

    def next_offset(self, request_id: RequestId) -> int | None:
        stream = self._streams.get(request_id)
        return None if stream is None else stream.next_offset

    def age_s(self, request_id: RequestId, now_s: float) -> float:
        """Between whole milliseconds, so that all grow by the same from report to report: a journal says it once."""
        stream = self._streams.get(request_id)
        return 0.0 if stream is None else (round(now_s * 1000) - round(stream.opened_s * 1000)) / 1000

    def wishes(self, request_id: RequestId) -> Wishes | None:
        """As they were when it came; None: they are not known."""
        stream = self._streams.get(request_id)
        return None if stream is None else stream.wishes

    def entries(self, outputs: Iterable[EngineOutput]) -> dict[str, tuple[OutputEntry, ...]]:
        """One step's outputs by gateway, in the order of the outputs. A finish closes its stream; an output without a
        stream (aborted, or given away) is dropped."""
        by_gateway: dict[str, list[OutputEntry]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            entry = OutputEntry(
                request_id=output.request_id,
                offset=stream.next_offset,
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                extra=output.extra,
            )
            stream.next_offset += len(output.token_ids)
            by_gateway.setdefault(stream.gateway, []).append(entry)
            if output.finish_reason is not None:
                del self._streams[output.request_id]
        return {gateway: tuple(entries) for gateway, entries in by_gateway.items()}


class Tombstones:
    """The last `bound` ids that were aborted: what must not come back by a late submission or migration."""

    def __init__(self, bound: int = MAX_TOMBSTONES) -> None:
        self._bound = bound
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def add(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._ids.pop(request_id, None)
            self._ids[request_id] = None
        while len(self._ids) > self._bound:
            self._ids.popitem(last=False)
