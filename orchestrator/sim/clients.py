"""Who sends requests to a simulated gateway, and reads the answers? Clients that do not wait for each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from migration.types import RequestId
from orchestrator.gateway.loop import GatewayLoop
from orchestrator.gateway.types import Deliver, Fail, Outgoing
from orchestrator.policy.admission import NO_ASKS, Asks
from orchestrator.policy.prefixes import MAX_HASHED_BLOCKS
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.engine import Ask, encode
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.prefix_cache import prefix_hashes


class Clients:
    """All clients of one world: an open loop over its gateways, each request to the next one."""

    def __init__(self, gateways: list[GatewayLoop], engine: LengthConfig) -> None:
        self._gateways = gateways
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self.lived: dict[RequestId, Lived] = {}
        self._num_open = 0
        self._all_sent = False
        self._is_over = asyncio.Event()
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

    @property
    def num_open(self) -> int:
        return self._num_open

    def _send(self, arrival: Arrival) -> None:
        request_id = RequestId(f"r{arrival.index}")
        self.lived[request_id] = Lived(arrival, self._loop.time())
        self._num_open += 1
        gateway = self._gateways[arrival.index % len(self._gateways)]
        ids = arrival.prefix_ids if self._engine.prefix_cache else ()
        payload = encode(Ask(arrival.num_prompt, arrival.num_answer, arrival.max_tokens, prefix_ids=ids))
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
            lived = self.lived[RequestId(entry.request_id)]
            if not lived.num_tokens:
                lived.first_s = now_s
            lived.num_tokens += len(entry.token_ids)
            lived.last_s = now_s
            if entry.finish_reason is not None:
                self._end(lived)

    def _fail(self, fail: Fail) -> None:
        lived = self.lived[fail.request_id]
        lived.error = f"{fail.failure.kind.value}: {fail.failure.message}"
        self._end(lived)

    def _end(self, lived: Lived) -> None:
        if not lived.is_over:
            lived.is_over = True
            self._num_open -= 1
            self._look()

    def _look(self) -> None:
        if self._all_sent and not self._num_open:
            self._is_over.set()
