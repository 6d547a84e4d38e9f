"""Who sends requests to a simulated gateway, and reads the answers? Clients that do not wait for each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from migration.types import RequestId
from orchestrator.gateway.errors import Failure
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.types import Deliver, Fail, Outgoing
from orchestrator.policy.admission import NO_ASKS, Asks
from orchestrator.policy.prefixes import MAX_HASHED_BLOCKS
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.engine import Ask, encode
from orchestrator.sim.gaps import Gaps
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.prefix_cache import prefix_hashes


class Watch(Protocol):
    """Somebody who looks at everything that clients are told."""

    def told(self, lived: Lived, token_ids: tuple[int, ...], has_ended: bool) -> None:
        """Before it counts."""

    def failed(self, lived: Lived, failure: Failure) -> None: ...


class Clients:
    """All clients of one world: an open loop over its gateways, each request to the next one."""

    def __init__(self, gateways: list[GatewayLoop], engine: LengthConfig, front_end_s: float = 0.0) -> None:
        """`front_end_s`: what a gateway takes for each request before it dispatches it; one after the other."""
        self._gateways = gateways
        self._engine = engine
        self._front_end_s = front_end_s
        self._free_at_s = [0.0] * len(gateways)
        self._loop = asyncio.get_running_loop()
        self.lived: dict[RequestId, Lived] = {}
        self.first_counted = 0
        """Index of the first request whose gaps are counted."""
        self.gaps: dict[str, Gaps] = {}
        """By kind of request."""
        self._uncounted = Gaps()
        self._gaps_of: dict[RequestId, Gaps] = {}
        self._moved: dict[RequestId, str] = {}
        """Where they were moved to, and have got no token from yet."""
        self.downtimes_s: list[float] = []
        """Of committed moves of requests with their KV: the longest gap between a token from the source and the one
        after it (`gaps.py`), in order of the latter."""
        self._num_open = 0
        self._all_sent = False
        self._is_over = asyncio.Event()
        self.watch: Watch | None = None
        for gateway in gateways:
            gateway.connect(self._deliver, self._fail)

    async def send_all(self, arrivals: Iterable[Arrival]) -> None:
        """In order of arrival, each at its time; returns when the last one is sent."""
        began_s = self._loop.time()
        for arrival in arrivals:
            wait_s = began_s + arrival.at_s - self._loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._send(arrival)
        self._all_sent = True
        self._look()

    async def until_over(self) -> None:
        """Returns when every request has been answered, or has failed."""
        await self._is_over.wait()

    def abort(self, request_id: RequestId) -> None:
        """Its client leaves."""
        lived = self.lived[request_id]
        lived.error = "its client has left"
        self._gateways[lived.arrival.index % len(self._gateways)].abort((request_id,))
        self._end(lived)

    @property
    def num_open(self) -> int:
        return self._num_open

    def _send(self, arrival: Arrival) -> None:
        lived = Lived(arrival, self._loop.time())
        request_id = lived.request_id
        self.lived[request_id] = lived
        is_counted = arrival.index >= self.first_counted
        self._gaps_of[request_id] = self.gaps.setdefault(arrival.kind, Gaps()) if is_counted else self._uncounted
        self._num_open += 1
        if self._front_end_s > 0.0:
            number = arrival.index % len(self._gateways)
            self._free_at_s[number] = max(self._free_at_s[number], self._loop.time()) + self._front_end_s
            self._loop.call_at(self._free_at_s[number], self._submit, request_id, arrival)
        else:
            self._submit(request_id, arrival)

    def _submit(self, request_id: RequestId, arrival: Arrival) -> None:
        gateway = self._gateways[arrival.index % len(self._gateways)]
        ids = arrival.prefix_ids if self._engine.prefix_cache else ()
        lengths = (arrival.num_prompt, arrival.num_answer, arrival.max_tokens)
        payload = encode(Ask(*lengths, prefix_ids=ids, arrived_s=self._loop.time()))
        gateway.submit(
            Outgoing(
                request_id=request_id,
                external_id=request_id,
                priority=arrival.priority,
                num_prompt_tokens=arrival.num_prompt,
                max_tokens=arrival.max_tokens,
                payload=payload,
                payload_as=lambda _: payload,
                asks=NO_ASKS if arrival.targets is None else Asks(arrival.targets),
                prefix=self._prefix(arrival, gateway.router.hashed_block_size) if ids else (),
            )
        )

    def has_moved(self, request_id: RequestId, destination: str) -> None:
        """It was just committed there."""
        lived = self.lived.get(request_id)
        if lived is not None and lived.num_tokens and not lived.is_over:
            self._moved[request_id] = destination

    def _prefix(self, arrival: Arrival, block_size: int | None) -> tuple[int, ...]:
        """What production's gateway says of a prompt (`orchestrator/gateway/prefixes.py`), without the blocks that
        nobody else can have: they would be looked for in vain. The last token is always computed."""
        if block_size is None:
            return ()
        num_tokens = min(arrival.num_prompt - 1, MAX_HASHED_BLOCKS * block_size)
        return prefix_hashes(arrival.prefix_ids, self._engine.prefix_id_tokens, num_tokens, block_size)

    def _deliver(self, delivery: Deliver) -> None:
        now_s = self._loop.time()
        for entry in delivery.entries:
            request_id = RequestId(entry.request_id)
            lived = self.lived[request_id]
            num_tokens = len(entry.token_ids)
            if self.watch is not None:
                self.watch.told(lived, entry.token_ids, entry.finish_reason is not None)
            if not lived.num_tokens:
                lived.first_s = now_s
            elif num_tokens:
                gap_s = self._gaps_of[request_id].add(now_s - lived.last_s, num_tokens)
                if not gap_s <= lived.longest_gap_s:
                    lived.longest_gap_s = gap_s
                if self._moved and self._moved.get(request_id) == delivery.sender[0]:
                    del self._moved[request_id]
                    self.downtimes_s.append(gap_s)
            lived.num_tokens += num_tokens
            lived.last_s = now_s
            if entry.finish_reason is not None:
                self._end(lived)

    def _fail(self, fail: Fail) -> None:
        lived = self.lived[fail.request_id]
        if self.watch is not None:
            self.watch.failed(lived, fail.failure)
        lived.error = f"{fail.failure.kind.value}: {fail.failure.message}"
        self._end(lived)

    def _end(self, lived: Lived) -> None:
        if not lived.is_over:
            lived.is_over = True
            self._moved.pop(lived.request_id, None)
            self._num_open -= 1
            self._look()

    def _look(self) -> None:
        if self._all_sent and not self._num_open:
            self._is_over.set()
