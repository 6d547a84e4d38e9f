"""How do two engines hand a request over without Ray, agents or wires? A synchronous helper that plays both agents.

The control part is done here by hand, call by call; blocks go through the engines' own movers. One thread steps both.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from instance.engine import Engine
from instance.types import CommittedRequest, EngineOutput, StepResult, Submission
from migration.types import (
    BlockRange,
    BlockTable,
    Description,
    MigrationId,
    NotStopped,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

READY_DEADLINE_S = 20.0
MAX_STEPS = 5_000
_NUMBERS = itertools.count(1)
"""Ids are never used twice, also not by two pairs over the same engines."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A request in an engine-neutral form. Equal (prompt_key, num_prompt_tokens) means the same prompt."""

    num_prompt_tokens: int
    max_tokens: int
    prompt_key: int = 0
    priority: int = 0


class EngineKit(Protocol):
    """Two engines of one kind that can move requests to each other, and how to write a submission for them."""

    @property
    def first(self) -> Engine: ...

    @property
    def second(self) -> Engine: ...

    def submission(self, request_id: RequestId, shape: Shape) -> Submission:
        """A greedy request that never stops before `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Sabotage:
    """What a negative control leaves out of a migration, to prove that the comparison would notice."""

    skip_block: int | None = None
    """This block index is not copied."""
    blank: tuple[int, int] | None = None
    """(KV-cache group, block index): what the null block holds is sent in its place."""
    skip_tail: bool = False
    """Blocks left at the stop are not copied."""
    alter_state: Callable[[bytes], bytes] | None = None
    alter_description: Callable[[Description], Description] | None = None


class Refused(AssertionError):
    """The migration was refused; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Ferried:
    """What one migration did."""

    committed: CommittedRequest
    num_cached_tokens: int
    staged_blocks: int
    tail_blocks: int
    settled_tokens: int


class EnginePair:
    """Steps two engines and ferries requests between them; keeps what they put out."""

    def __init__(self, kit: EngineKit) -> None:
        self.kit = kit
        self.first = kit.first
        self.second = kit.second
        self.outputs: dict[RequestId, list[EngineOutput]] = defaultdict(list)
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.close()

    # ---- requests
    def new_id(self, name: str = "request") -> RequestId:
        return RequestId(f"{name}-{next(_NUMBERS)}")

    def new_migration(self) -> MigrationId:
        return MigrationId(f"migration-{next(_NUMBERS)}")

    def add(self, engine: Engine, shape: Shape, request_id: RequestId | None = None) -> RequestId:
        request_id = request_id or self.new_id()
        refusal = engine.add(self.kit.submission(request_id, shape))
        assert refusal is None, refusal
        return request_id

    def step(self, engine: Engine) -> StepResult:
        result = engine.step()
        for output in result.outputs:
            self.outputs[output.request_id].append(output)
        engine.check_integrity()
        return result

    def tokens(self, request_id: RequestId) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def is_finished(self, request_id: RequestId) -> bool:
        return any(output.finish_reason is not None for output in self.outputs[request_id])

    def step_until(self, engine: Engine, is_reached: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if is_reached():
                return
            assert engine.has_work(), "the engine is idle and the state waited for was not reached"
            self.step(engine)
        raise AssertionError(f"not reached within {MAX_STEPS} steps")

    def decode_until(self, engine: Engine, request_id: RequestId, num_tokens: int) -> None:
        self.step_until(engine, lambda: len(self.tokens(request_id)) >= num_tokens or self.is_finished(request_id))

    def finish(self, engine: Engine, *request_ids: RequestId) -> None:
        self.step_until(engine, lambda: all(self.is_finished(request_id) for request_id in request_ids))

    def run_alone(self, engine: Engine, shape: Shape) -> list[int]:
        """Tokens of an undisturbed run."""
        request_id = self.add(engine, shape)
        self.finish(engine, request_id)
        return self.tokens(request_id)

    def drain(self) -> None:
        """End everything and step until both engines are idle, so that the next test starts from nothing."""
        for engine in (self.first, self.second):
            engine.abort(tuple(view.request_id for view in engine.requests()))
            for _ in range(MAX_STEPS):
                if not engine.has_work():
                    break
                self.step(engine)
            engine.check_integrity()
            assert engine.requests() == ()
            load = engine.load()
            assert (load.num_running, load.num_waiting, load.reserved_blocks) == (0, 0, 0), load
            assert load.free_blocks == engine.facts.total_blocks, load

    # ---- migration
    def describe(self, engine: Engine, request_id: RequestId) -> Description:
        description = engine.describe(request_id)
        assert isinstance(description, Description), description
        return description

    def reserve(
        self, engine: Engine, description: Description, migration: MigrationId | None = None, slack_blocks: int = 2
    ) -> tuple[MigrationId, Reservation]:
        migration = migration or self.new_migration()
        reservation = engine.reserve(migration, description, slack_blocks)
        if isinstance(reservation, Refusal):
            raise Refused(reservation.reason)
        engine.check_integrity()
        return migration, reservation

    def wait_ready(self, engine: Engine, migration: MigrationId) -> None:
        deadline_s = time.monotonic() + READY_DEADLINE_S
        while time.monotonic() < deadline_s:
            ready = engine.is_ready(migration)
            if isinstance(ready, Refusal):
                raise Refused(ready.reason)
            if ready:
                return
            time.sleep(0.001)  # a grammar compiles on another thread; nothing to step for it
        raise AssertionError("the destination did not get ready")

    def stop(self, engine: Engine, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped:
        for _ in range(10):
            stopped = engine.try_stop(request_id, without_kv)
            if stopped is not None:
                engine.check_integrity()
                return stopped
            self.step(engine)
        raise AssertionError("the request did not come to rest within 10 steps")

    def open(self, engine: Engine, migration: MigrationId, block_table: BlockTable) -> None:
        self._runner.run(engine.mover.open(migration, block_table))

    def close_tickets(self, migration: MigrationId, *engines: Engine) -> None:
        for engine in engines:
            self._runner.run(engine.mover.close(migration))

    def push(
        self, source: Engine, destination: Engine, migration: MigrationId, block_table: BlockTable, blocks: BlockRange
    ) -> int:
        """Bytes that landed."""
        endpoints = destination.mover.endpoints()
        return self._runner.run(source.mover.push(migration, endpoints, block_table, blocks, urgent=True)).num_bytes

    def ferry(
        self,
        request_id: RequestId,
        source: Engine,
        destination: Engine,
        *,
        num_stages: int = 2,
        steps_between: int = 1,
        without_kv: bool = False,
        sabotage: Sabotage | None = None,
    ) -> Ferried:
        """Move a request with `num_stages` stages of copying while it decodes; raises Refused with both sides as
        before."""
        ferry = _Ferry(self, request_id, source, destination, sabotage or Sabotage())
        return ferry.run(0 if without_kv else num_stages, steps_between, without_kv)


class _Ferry:
    """One migration, in the order in which the two machines of `migration` would do it."""

    def __init__(
        self, pair: EnginePair, request_id: RequestId, source: Engine, destination: Engine, sabotage: Sabotage
    ) -> None:
        self.pair = pair
        self.request_id = request_id
        self.source = source
        self.destination = destination
        self.sabotage = sabotage
        self.block_size = source.facts.block_size
        self.num_copied = 0
        self.num_blocks = 0

    def run(self, num_stages: int, steps_between: int, without_kv: bool) -> Ferried:
        pair, source, destination = self.pair, self.source, self.destination
        description = pair.describe(source, self.request_id)
        if self.sabotage.alter_description:
            description = self.sabotage.alter_description(description)
        if without_kv:
            stopped = pair.stop(source, self.request_id, without_kv=True)
            description = Description(
                description.request_id, description.payload, 0, description.kv_fingerprint, description.block_size, 0
            )
        self.migration, reservation = pair.reserve(destination, description)
        cached = reservation.num_cached_tokens
        assert cached % self.block_size == 0 and cached <= description.settled_tokens
        self.num_copied, self.num_blocks = cached // self.block_size, reservation.num_blocks
        pair.open(destination, self.migration, reservation.block_table)
        staged = sum(self._stage(steps_between) for _ in range(num_stages))
        pair.wait_ready(destination, self.migration)
        if not without_kv:
            stopped = pair.stop(source, self.request_id)
        if isinstance(stopped, NotStopped):
            self._give_up()
            raise Refused(stopped.value)
        tail = 0 if self.sabotage.skip_tail else self._copy(stopped.block_table, stopped.settled_tokens, is_tail=True)
        pair.close_tickets(self.migration, destination, source)
        state = self.sabotage.alter_state(stopped.state) if self.sabotage.alter_state else stopped.state
        committed = destination.commit(self.migration, state)
        destination.check_integrity()
        if isinstance(committed, Refusal):
            source.resume(self.request_id)
            raise Refused(committed.reason)
        assert source.release(self.request_id)
        source.check_integrity()
        if self.sabotage.alter_state is None:
            assert committed.num_output_tokens == len(pair.tokens(self.request_id)), "it must go on at its next token"
        return Ferried(committed, cached, staged, tail, stopped.settled_tokens)

    def _stage(self, steps_between: int) -> int:
        progress = self.source.progress(self.request_id)
        assert progress is not None, "it finished during the copy"
        num_full = progress.settled_tokens // self.block_size
        count = self._copy(progress.block_table, num_full * self.block_size, is_tail=False)
        for _ in range(steps_between):
            if self.source.has_work():
                self.pair.step(self.source)
        return count

    def _copy(self, block_table: BlockTable, num_tokens: int, is_tail: bool) -> int:
        end = -(-num_tokens // self.block_size)
        if end > self.num_blocks:
            grown = self.destination.grow(self.migration, num_tokens)
            if isinstance(grown, Refusal):
                self._give_up()
                raise Refused(grown.reason)
            self.num_blocks = grown.num_blocks
            self.pair.open(self.destination, self.migration, grown.block_table)
        if self.sabotage.blank is not None:
            group, index = self.sabotage.blank
            ids = [list(ids) for ids in block_table]
            ids[group][index : index + 1] = [0]
            block_table = tuple(tuple(group_ids) for group_ids in ids)
        first, self.num_copied = self.num_copied, max(end, self.num_copied)
        for blocks in self._ranges(first, end):
            self.pair.push(self.source, self.destination, self.migration, block_table, blocks)
        return max(0, end - first)

    def _ranges(self, first: int, end: int) -> list[BlockRange]:
        skip = self.sabotage.skip_block
        if skip is None or not first <= skip < end:
            return [BlockRange(first, end)] if end > first else []
        return [blocks for blocks in (BlockRange(first, skip), BlockRange(skip + 1, end)) if len(blocks)]

    def _give_up(self) -> None:
        self.pair.close_tickets(self.migration, self.destination, self.source)
        self.destination.cancel(self.migration)
        self.source.resume(self.request_id)
        self.source.check_integrity()
        self.destination.check_integrity()
