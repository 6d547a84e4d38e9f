"""What is an engine in the simulator? Lengths behind the Engine port, and runs of steps that end at known times.

`step` makes one step, as any engine does. The simulator's host asks for runs of them instead (`runs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from instance.headroom import Headroom
from instance.types import (
    CachedChanges,
    CommittedRequest,
    EngineFacts,
    EngineLoad,
    EngineOutput,
    EngineRefusal,
    PriorityAnswer,
    RequestStatus,
    RequestView,
    Rescue,
    StepResult,
    Submission,
)
from migration.ports import BlockMover
from migration.types import (
    BlockTable,
    Description,
    MigrationId,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)
from orchestrator.sim.lengths import Batch, LengthConfig, Sequence
from orchestrator.sim.prefix_cache import NOTHING, Chain
from orchestrator.sim.runs import Runs
from orchestrator.sim.steptime import StepTimes

_VERSION = "lengths-1"
_ALL_BLOCKS = tuple(range(65_536))


class Ask(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload of a submission: a request of these lengths."""

    num_prompt: int
    num_answer: int
    """Output tokens after which it ends by itself, `max_tokens` at most."""
    max_tokens: int
    movable: bool = True
    prefix_ids: tuple[int, ...] = ()
    """See `Arrival`; only where engines cache prefixes."""
    arrived_s: float = 0.0
    """When it was sent: queues are in this order, also after a move (vLLM's `arrival_time`)."""


class _Moved(msgspec.Struct, frozen=True):
    """The payload of a description, and the state of a stopped request."""

    ask: Ask
    external_id: str
    priority: int
    num_output: int
    computed: int
    num_preemptions: int


def encode(value: Ask | _Moved) -> bytes:
    return msgspec.msgpack.encode(value)


@dataclass(slots=True)
class _Reserved:
    moved: _Moved
    request_id: RequestId
    blocks: int
    chain: Chain | None = None
    num_cached: int = 0
    """Of its blocks, which were here: they are not copied."""


class LengthEngine:
    """See `instance.engine.Engine`."""

    def __init__(self, config: LengthConfig, times: StepTimes, mover: BlockMover) -> None:
        self._config = config
        self._mover = mover
        self.batch = Batch(config)
        self.runs = Runs(self.batch, times)
        self._reserved: dict[MigrationId, _Reserved] = {}
        self._aborted: dict[RequestId, None] = {}
        self._num_arrivals = 0
        self.leaving: list[EngineOutput] = []
        """What requests that were stopped had got and nobody was told yet: whoever stops them tells it."""

    @property
    def facts(self) -> EngineFacts:
        config = self._config
        return EngineFacts(
            model="lengths",
            kv_fingerprint=f"{_VERSION} {config.block_size}",
            block_size=config.block_size,
            total_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            tensor_parallel_size=1,
            engine_version=_VERSION,
            migration_refused_because=None,
        )

    @property
    def mover(self) -> BlockMover:
        return self._mover

    # ---- requests
    def add(self, submission: Submission) -> EngineRefusal | None:
        if submission.request_id in self.batch.sequences:
            return None
        if any(one.request_id == submission.request_id for one in self._reserved.values()):
            return EngineRefusal("the request is on its way here from another instance", final=False)
        ask = msgspec.msgpack.decode(submission.payload, type=Ask)
        if reason := self._never_fits(ask.num_prompt + ask.max_tokens):
            return EngineRefusal(reason, final=True)
        moved = _Moved(ask, submission.external_id, submission.priority, 0, 0, 0)
        self._enter(submission.request_id, moved, 0, self._chain(submission.request_id, ask))
        return None

    def rescue(self, submission: Submission, output_token_ids: tuple[int, ...]) -> Rescue | EngineRefusal:
        ask = msgspec.msgpack.decode(submission.payload, type=Ask)
        moved = _Moved(ask, submission.external_id, submission.priority, len(output_token_ids), 0, 0)
        fingerprint, size = self.facts.kv_fingerprint, self._config.block_size
        return Rescue(Description(submission.request_id, encode(moved), 0, fingerprint, size, 0), encode(moved))

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        for request_id in request_ids:
            self._aborted[request_id] = None
            sequence = self.batch.sequences.get(request_id)
            if sequence is not None:
                self.batch.remove(sequence)
        while len(self._aborted) > 4096:
            del self._aborted[next(iter(self._aborted))]

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        return self.batch.set_priority(request_id, priority)

    def set_headroom(self, headroom: Headroom) -> None:
        self.batch.headroom = headroom

    def has_work(self) -> bool:
        return bool(self.batch.running or self.batch.holding or self.batch.waiting)

    def step(self) -> StepResult:
        if self.runs.begin(0.0, 0.0, skips_empty=False) is None:
            return StepResult((), executed=False, num_scheduled_tokens=0, num_decoding=0)
        return self.runs.end().result

    def load(self) -> EngineLoad:
        batch = self.batch
        head = batch.head_of_line()
        return EngineLoad(
            free_blocks=batch.free,
            reserved_blocks=sum(one.blocks for one in self._reserved.values()) if self._reserved else 0,
            num_running=len(batch.running),
            num_waiting=len(batch.holding) + len(batch.waiting),
            running_by_priority=batch.running_by_priority(),
            head_of_line_blocks=0 if head is None else batch.blocks_for(head.tokens),
            waiting_blocks=batch.waiting_blocks,
            num_preemptions=batch.num_preemptions,
        )

    def requests(self) -> tuple[RequestView, ...]:
        return self.batch.views()

    def reset_prefix_cache(self) -> bool:
        return self.batch.cache is None or self.batch.cache.reset()

    def take_cached_changes(self) -> CachedChanges | None:
        return None if self.batch.cache is None else self.batch.cache.take_changes()

    # ---- source
    def describe(self, request_id: RequestId) -> Description | Refusal | None:
        sequence = self.batch.sequences.get(request_id)
        if sequence is None:
            return None
        if not sequence.movable:
            return Refusal("this request cannot be moved")
        if sequence.status is RequestStatus.MIGRATING_OUT:
            return Refusal("this request is being moved already")
        return Description(
            request_id=request_id,
            payload=encode(_moved(sequence, sequence.computed)),
            settled_tokens=sequence.computed,
            kv_fingerprint=self.facts.kv_fingerprint,
            block_size=self._config.block_size,
            num_preemptions=sequence.num_preemptions,
        )

    def progress(self, request_id: RequestId) -> Progress | None:
        sequence = self.batch.sequences.get(request_id)
        if sequence is None:
            return None
        table = _table(sequence.blocks)
        return Progress(sequence.computed, sequence.tokens, sequence.num_preemptions, table)

    def try_stop(self, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped | None:
        sequence = self.batch.sequences.get(request_id)
        if sequence is None:
            return NotStopped.ABORTED if request_id in self._aborted else NotStopped.FINISHED
        if not sequence.movable:
            return NotStopped.UNMOVABLE
        self.leaving.extend(self.runs.untold(sequence))
        self.batch.take_out(sequence)
        sequence.status = RequestStatus.MIGRATING_OUT
        computed = 0 if without_kv else sequence.computed
        return StoppedRequest(
            state=encode(_moved(sequence, computed)),
            settled_tokens=computed,
            num_output_tokens=sequence.num_output,
            num_preemptions=sequence.num_preemptions,
            block_table=_table(0 if without_kv else sequence.blocks),
        )

    def resume(self, request_id: RequestId) -> None:
        sequence = self._stopped(request_id)
        if sequence is not None:
            self.batch.put_back(sequence)

    def release(self, request_id: RequestId) -> bool:
        sequence = self._stopped(request_id)
        if sequence is not None:
            self.batch.remove(sequence)
        return sequence is not None

    # ---- destination
    def reserve(self, migration_id: MigrationId, description: Description, slack_blocks: int) -> Reservation | Refusal:
        known = self._reserved.get(migration_id)
        if known is not None:
            return self._reservation(known)
        moved = msgspec.msgpack.decode(description.payload, type=_Moved)
        if description.kv_fingerprint != self.facts.kv_fingerprint:
            return Refusal(f"its KV is {description.kv_fingerprint}, here it is {self.facts.kv_fingerprint}")
        ids = {one.request_id for one in self._reserved.values()}
        if description.request_id in self.batch.sequences or description.request_id in ids:
            return Refusal("the request is here already")
        longest = moved.ask.num_prompt + moved.ask.max_tokens
        if reason := self._never_fits(longest):
            return Refusal(reason)
        settled = description.settled_tokens
        blocks = min(self.batch.blocks_for(settled) + slack_blocks, self.batch.blocks_for(longest)) if settled else 0
        batch, chain = self.batch, self._chain(description.request_id, moved.ask)
        found = NOTHING if batch.cache is None or chain is None else batch.cache.find(chain, settled)
        if blocks - found.num_held > batch.free:
            return Refusal(f"{blocks} blocks wanted, {batch.free} are free")
        if batch.cache is not None and chain is not None:
            batch.cache.hold(chain, found)
        batch.take(blocks - found.num_held)
        reserved = _Reserved(moved, description.request_id, blocks, chain, len(found.blocks))
        self._reserved[migration_id] = reserved
        return self._reservation(reserved)

    def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        reserved = self._reserved.get(migration_id)
        if reserved is None:
            return Refusal("no such reservation")
        missing = max(0, self.batch.blocks_for(num_tokens) - reserved.blocks)
        if missing > self.batch.free:
            return Refusal(f"{missing} more blocks wanted, {self.batch.free} are free")
        self.batch.take(missing)
        reserved.blocks += missing
        return self._reservation(reserved)

    def is_ready(self, migration_id: MigrationId) -> bool | Refusal:
        return True if migration_id in self._reserved else Refusal("no such reservation")

    def commit(self, migration_id: MigrationId, state: bytes) -> CommittedRequest | Refusal:
        reserved = self._reserved.pop(migration_id, None)
        if reserved is None:
            return Refusal("no such reservation")
        moved = msgspec.msgpack.decode(state, type=_Moved)
        blocks, chain = reserved.blocks, reserved.chain
        if not moved.computed:
            self.batch.give_back(blocks, chain)
            blocks = 0
        sequence = self._enter(reserved.request_id, moved, blocks, chain)
        if blocks and self.batch.cache is not None and chain is not None:
            self.batch.cache.add(chain, reserved.num_cached * self._config.block_size, moved.computed)
        return CommittedRequest(
            request_id=sequence.request_id,
            external_id=sequence.external_id,
            num_output_tokens=sequence.num_output,
            priority=sequence.priority,
            num_prompt_tokens=sequence.num_prompt,
            max_tokens=sequence.max_tokens,
        )

    def cancel(self, migration_id: MigrationId) -> None:
        reserved = self._reserved.pop(migration_id, None)
        if reserved is not None:
            self.batch.give_back(reserved.blocks, reserved.chain)

    def check_integrity(self) -> None:
        chains = [one.chain for one in self._reserved.values() if one.chain is not None]
        self.batch.check_integrity(sum(one.blocks for one in self._reserved.values()), chains)

    def close(self) -> None:
        """Nothing is held outside this process."""

    # ---- inside
    def _chain(self, request_id: RequestId, ask: Ask) -> Chain | None:
        cache = self.batch.cache
        return None if cache is None else cache.chain(request_id, ask.prefix_ids, ask.num_prompt)

    def _reservation(self, reserved: _Reserved) -> Reservation:
        num_cached_tokens = reserved.num_cached * self._config.block_size
        return Reservation(num_cached_tokens, reserved.blocks, _table(reserved.blocks))

    def _enter(self, request_id: RequestId, moved: _Moved, blocks: int, chain: Chain | None) -> Sequence:
        self._num_arrivals += 1
        self._aborted.pop(request_id, None)
        ask = moved.ask
        sequence = Sequence(
            request_id=request_id,
            external_id=moved.external_id,
            priority=moved.priority,
            arrival=self._num_arrivals,
            num_prompt=ask.num_prompt,
            num_answer=ask.num_answer,
            max_tokens=ask.max_tokens,
            movable=ask.movable,
            tokens=ask.num_prompt + moved.num_output,
            computed=moved.computed,
            blocks=blocks,
            num_told=moved.num_output,
            chain=chain,
            arrived_s=ask.arrived_s,
        )
        self.batch.sequences[request_id] = sequence
        self.batch.put_back(sequence)
        sequence.num_preemptions = moved.num_preemptions  # those were elsewhere: here it is new
        return sequence

    def _stopped(self, request_id: RequestId) -> Sequence | None:
        sequence = self.batch.sequences.get(request_id)
        return sequence if sequence is not None and sequence.status is RequestStatus.MIGRATING_OUT else None

    def _never_fits(self, num_tokens: int) -> str | None:
        if num_tokens > self._config.max_model_len:
            return f"{num_tokens} tokens are more than the {self._config.max_model_len} this model holds"
        if self.batch.blocks_for(num_tokens) > self._config.num_blocks:
            return f"{num_tokens} tokens do not fit into {self._config.num_blocks} blocks"
        return None


def _moved(sequence: Sequence, computed: int) -> _Moved:
    ids = () if sequence.chain is None else sequence.chain.ids
    of_ask = (sequence.num_prompt, sequence.num_answer, sequence.max_tokens, sequence.movable)
    ask = Ask(*of_ask, ids, sequence.arrived_s)
    return _Moved(ask, sequence.external_id, sequence.priority, sequence.num_output, computed, sequence.num_preemptions)


def _table(num_blocks: int) -> BlockTable:
    """Blocks have no number here; how many there are is what counts."""
    return (_ALL_BLOCKS[:num_blocks],)
