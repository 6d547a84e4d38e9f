"""What is an engine without a model? A deterministic one behind the Engine port: the tests' and the simulator's engine.

It pages, batches, caches prefixes and preempts as vLLM does; its tokens are read through the KV memory, so a migration
that loses or misplaces a block changes the answer. It never waits: the time of a step is only told (`last_step_s`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

import msgspec

from instance.fake_blocks import FakeStore, block_hashes, num_blocks_for
from instance.fake_model import (
    FakeMove,
    FakeRequest,
    FakeState,
    decode_fake,
    fake_compatibility,
    first_generator,
    state_after,
)
from instance.fake_scheduler import FakeConfig, FakeReservation, FakeScheduler, Sequence
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
    step_work,
)
from instance.vllm.handshake import encode, why_refused
from migration.ports import BlockMover
from migration.transports import KVStore, RankMover
from migration.types import (
    Description,
    MigrationId,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

MAX_REMEMBERED_ENDS = 4096


class FakeEngineBroke(RuntimeError):
    """The step that `FakeConfig.fail_at_step` names."""


class FakeEngine:
    """See `instance.engine.Engine`."""

    def __init__(self, config: FakeConfig, make_mover: Callable[[KVStore], RankMover]) -> None:
        self._config = config
        self._scheduler = FakeScheduler(config)
        self._pool = self._scheduler.pool
        self._mover = make_mover(FakeStore(self._pool.words))
        self._reservations: dict[MigrationId, FakeReservation] = {}
        self._in_flight: list[tuple[Sequence, EngineOutput]] = []
        self._stepped: list[Sequence] = []
        self._aborted: OrderedDict[RequestId, None] = OrderedDict()
        self._num_arrivals = 0
        self._num_steps = 0
        self.last_step_s = 0.0
        """Modelled time of the last step."""

    @property
    def facts(self) -> EngineFacts:
        config, own = self._config, fake_compatibility(self._config.block_size)
        return EngineFacts(
            model=own.model,
            kv_fingerprint=encode(own),
            block_size=config.block_size,
            total_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            tensor_parallel_size=own.tensor_parallel_size,
            engine_version=own.engine_version,
            migration_refused_because=None,
        )

    @property
    def mover(self) -> BlockMover:
        return self._mover

    # ---- requests
    def add(self, submission: Submission) -> EngineRefusal | None:
        if submission.request_id in self._scheduler.sequences:
            return None
        if any(r.request_id == submission.request_id for r in self._reservations.values()):
            return EngineRefusal("the request is on its way here from another instance", final=False)
        request = decode_fake(submission.payload, FakeRequest)
        if request is None:
            return EngineRefusal("the request cannot be read", final=True)
        if not request.prompt or request.max_tokens < 1 or any(not 0 <= t < 1 << 32 for t in request.prompt):
            return EngineRefusal("a request needs a prompt of token ids and max_tokens >= 1", final=True)
        if reason := self._never_fits(len(request.prompt) + request.max_tokens):
            return EngineRefusal(reason, final=True)
        self._enter(submission.request_id, FakeMove(request, submission.external_id, submission.priority, ()))
        return None

    def rescue(self, submission: Submission, output_token_ids: tuple[int, ...]) -> Rescue | EngineRefusal:
        request = decode_fake(submission.payload, FakeRequest)
        if request is None:
            return EngineRefusal("the request cannot be read", final=True)
        move = FakeMove(request, submission.external_id, submission.priority, output_token_ids)
        return Rescue(self._description(submission.request_id, move), msgspec.msgpack.encode(state_after(move)))

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        for request_id in request_ids:
            self._aborted.pop(request_id, None)
            self._aborted[request_id] = None
            sequence = self._scheduler.sequences.get(request_id)
            if sequence is not None:
                self._scheduler.remove(sequence)
        while len(self._aborted) > MAX_REMEMBERED_ENDS:
            self._aborted.popitem(last=False)

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        return self._scheduler.set_priority(request_id, priority)

    def set_headroom(self, headroom: Headroom) -> None:
        self._scheduler.headroom = headroom

    def has_work(self) -> bool:
        scheduler = self._scheduler
        return bool(scheduler.running or scheduler.holding or scheduler.waiting or self._stepped)

    def step(self) -> StepResult:
        self._num_steps += 1
        if self._num_steps == self._config.fail_at_step:
            raise FakeEngineBroke(f"step {self._num_steps}")
        if not self._config.is_pipelined:
            plan = self._compute()
            outputs = self._give_out()
        else:
            outputs = self._give_out()
            plan = self._compute()
        # A plan is read after its step: its tokens are computed.
        work = step_work((n, s.computed - n, s.computed - n >= len(s.request.prompt)) for s, n in plan)
        num_scheduled = work.num_prefill_tokens + work.num_decode_tokens
        self.last_step_s = self._config.step_base_s + num_scheduled * self._config.step_token_s
        return StepResult(outputs, bool(plan), num_scheduled, work.num_decoding, work)

    def load(self) -> EngineLoad:
        scheduler, size = self._scheduler, self._config.block_size
        demands = [num_blocks_for(len(s.tokens), size) for s in scheduler.in_order_of_waiting()]
        return EngineLoad(
            free_blocks=self._pool.num_free,
            reserved_blocks=sum(len(reservation.blocks) for reservation in self._reservations.values()),
            num_running=len(scheduler.running),
            num_waiting=len(demands),
            running_by_priority=tuple(sorted(Counter(s.priority for s in scheduler.running).items())),
            head_of_line_blocks=demands[0] if demands else 0,
            waiting_blocks=sum(demands),
            num_preemptions=scheduler.num_preemptions,
        )

    def requests(self) -> tuple[RequestView, ...]:
        return self._scheduler.views()

    def reset_prefix_cache(self) -> bool:
        self._pool.reset_cache()
        return True

    def take_cached_changes(self) -> CachedChanges | None:
        return self._pool.take_cached_changes() if self._config.prefix_cache else None

    # ---- source
    def describe(self, request_id: RequestId) -> Description | Refusal | None:
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None or sequence.finish is not None:
            return None
        if not sequence.request.movable:
            return Refusal("this request cannot be moved")
        if sequence.status is RequestStatus.MIGRATING_OUT:
            return Refusal("this request is being moved already")
        output = tuple(sequence.tokens[len(sequence.request.prompt) : sequence.num_visible])
        move = FakeMove(sequence.request, sequence.external_id, sequence.priority, output)
        return self._description(request_id, move, sequence.num_settled, sequence.num_preemptions)

    def _description(
        self, request_id: RequestId, move: FakeMove, settled_tokens: int = 0, num_preemptions: int = 0
    ) -> Description:
        fingerprint, size = self.facts.kv_fingerprint, self._config.block_size
        return Description(request_id, msgspec.msgpack.encode(move), settled_tokens, fingerprint, size, num_preemptions)

    def progress(self, request_id: RequestId) -> Progress | None:
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None:
            return None
        return Progress(
            settled_tokens=sequence.num_settled,
            num_tokens=sequence.num_visible,
            num_preemptions=sequence.num_preemptions,
            block_table=(tuple(sequence.blocks),),
        )

    def try_stop(self, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped | None:
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None:
            return NotStopped.ABORTED if request_id in self._aborted else NotStopped.FINISHED
        if not sequence.request.movable:
            return NotStopped.UNMOVABLE
        self._scheduler.take_out(sequence)
        sequence.status = RequestStatus.MIGRATING_OUT
        if sequence.in_flight:
            return None
        computed = 0 if without_kv else sequence.computed
        output = tuple(sequence.tokens[len(sequence.request.prompt) :])
        state = FakeState(output, computed, sequence.generator, sequence.num_preemptions, sequence.priority)
        return StoppedRequest(
            state=msgspec.msgpack.encode(state),
            settled_tokens=computed,
            num_output_tokens=len(output),
            num_preemptions=sequence.num_preemptions,
            block_table=((),) if without_kv else (tuple(sequence.blocks),),
        )

    def resume(self, request_id: RequestId) -> None:
        sequence = self._stopped(request_id)
        if sequence is not None:
            self._scheduler.put_back(sequence)

    def release(self, request_id: RequestId) -> bool:
        sequence = self._stopped(request_id)
        if sequence is not None:
            self._scheduler.remove(sequence)
        return sequence is not None

    # ---- destination
    def reserve(self, migration_id: MigrationId, description: Description, slack_blocks: int) -> Reservation | Refusal:
        size = self._config.block_size
        known = self._reservations.get(migration_id)
        if known is not None:
            return known.view(size)
        move = decode_fake(description.payload, FakeMove)
        if move is None:
            return Refusal("the description cannot be read")
        if reason := self._cannot_take(description, move):
            return Refusal(reason)
        tokens = (*move.request.prompt, *move.output)
        hashes = block_hashes(tokens, size)[: description.settled_tokens // size] if self._config.prefix_cache else []
        num_blocks = self._room_for(description.settled_tokens, slack_blocks, move)
        num_cached = self._pool.num_cached(hashes)
        if num_blocks - num_cached + self._pool.num_cached_free(hashes) > self._pool.num_free:
            return Refusal(f"{num_blocks} blocks wanted, {self._pool.num_free} are free")
        shared = self._pool.share_prefix(hashes)
        fresh = self._pool.allocate(num_blocks - len(shared)) or []
        held, polls = shared + fresh, move.request.ready_polls
        reservation = FakeReservation(move, description.request_id, held, len(shared), polls)
        self._reservations[migration_id] = reservation
        return reservation.view(size)

    def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        reservation = self._reservations.get(migration_id)
        if reservation is None:
            return Refusal("no such reservation")
        missing = num_blocks_for(num_tokens, self._config.block_size) - len(reservation.blocks)
        fresh = self._pool.allocate(max(0, missing))
        if fresh is None:
            return Refusal(f"{missing} more blocks wanted, {self._pool.num_free} are free")
        reservation.blocks += fresh
        return reservation.view(self._config.block_size)

    def is_ready(self, migration_id: MigrationId) -> bool | Refusal:
        reservation = self._reservations.get(migration_id)
        if reservation is None:
            return Refusal("no such reservation")
        reservation.polls_left -= 1
        return reservation.polls_left < 0

    def commit(self, migration_id: MigrationId, state: bytes) -> CommittedRequest | Refusal:
        reservation = self._reservations.pop(migration_id, None)
        if reservation is None:
            return Refusal("no such reservation")
        small = decode_fake(state, FakeState)
        if small is None or self._is_inconsistent(reservation, small):
            self._pool.release(reservation.blocks)
            return Refusal("the state cannot be read, or does not fit the reservation")
        move = FakeMove(reservation.move.request, reservation.move.external_id, small.priority, small.output)
        blocks = reservation.blocks
        if small.computed_tokens == 0:
            self._pool.release(blocks)
            blocks = []
        sequence = self._enter(reservation.request_id, move, blocks)
        sequence.generator, sequence.num_preemptions = small.generator, small.num_preemptions
        sequence.computed = small.computed_tokens
        self._scheduler.cache_full_blocks(sequence, 0)
        return CommittedRequest(
            request_id=sequence.request_id,
            external_id=move.external_id,
            num_output_tokens=len(small.output),
            priority=move.priority,
            num_prompt_tokens=len(move.request.prompt),
            max_tokens=move.request.max_tokens,
        )

    def cancel(self, migration_id: MigrationId) -> None:
        reservation = self._reservations.pop(migration_id, None)
        if reservation is not None:
            self._pool.release(reservation.blocks)

    def check_integrity(self) -> None:
        self._scheduler.check_integrity([reservation.blocks for reservation in self._reservations.values()])

    def close(self) -> None:
        self._mover.shut_down()

    # ---- inside
    def _enter(self, request_id: RequestId, move: FakeMove, blocks: list[int] | None = None) -> Sequence:
        self._num_arrivals += 1
        self._aborted.pop(request_id, None)
        sequence = Sequence(
            request_id=request_id,
            external_id=move.external_id,
            priority=move.priority,
            arrival=self._num_arrivals,
            request=move.request,
            generator=first_generator(move.request.seed),
            tokens=[*move.request.prompt, *move.output],
            blocks=blocks or [],
        )
        self._scheduler.sequences[request_id] = sequence
        self._scheduler.put_back(sequence)
        return sequence

    def _room_for(self, settled_tokens: int, slack_blocks: int, move: FakeMove) -> int:
        """Nothing computed needs no block; nobody needs more than the request at its longest."""
        if settled_tokens == 0:
            return 0
        size = self._config.block_size
        longest = num_blocks_for(len(move.request.prompt) + move.request.max_tokens, size)
        return min(num_blocks_for(settled_tokens, size) + slack_blocks, longest)

    def _stopped(self, request_id: RequestId) -> Sequence | None:
        sequence = self._scheduler.sequences.get(request_id)
        return sequence if sequence is not None and sequence.status is RequestStatus.MIGRATING_OUT else None

    def _never_fits(self, num_tokens: int) -> str | None:
        if num_tokens > self._config.max_model_len:
            return f"{num_tokens} tokens are more than the {self._config.max_model_len} this model holds"
        if num_blocks_for(num_tokens, self._config.block_size) > self._config.num_blocks:
            return f"{num_tokens} tokens do not fit into {self._config.num_blocks} blocks"
        return None

    def _cannot_take(self, description: Description, move: FakeMove) -> str | None:
        if reason := why_refused(description.kv_fingerprint, self.facts.kv_fingerprint):
            return reason
        if description.request_id in self._scheduler.sequences:
            return "the request is here already"
        if any(r.request_id == description.request_id for r in self._reservations.values()):
            return "the request is on its way here already"
        return self._never_fits(len(move.request.prompt) + move.request.max_tokens)

    def _is_inconsistent(self, reservation: FakeReservation, small: FakeState) -> bool:
        return (
            reservation.request_id in self._scheduler.sequences
            or len(small.output) >= reservation.move.request.max_tokens
            or not 0 <= small.computed_tokens < len(reservation.move.request.prompt) + len(small.output) + 1
            or num_blocks_for(small.computed_tokens, self._config.block_size) > len(reservation.blocks)
        )

    def _compute(self) -> list[tuple[Sequence, int]]:
        plan = self._scheduler.schedule()
        for sequence, count in plan:
            sequence.in_flight = count
        self._stepped = [sequence for sequence, _ in plan]
        for output in self._scheduler.compute(plan):
            sequence = self._scheduler.sequences[output.request_id]
            sequence.has_output_in_flight = True
            self._in_flight.append((sequence, output))
        return plan

    def _give_out(self) -> tuple[EngineOutput, ...]:
        """The outputs that are due, without those of requests that were aborted meanwhile."""
        for sequence in self._stepped:
            sequence.in_flight, sequence.has_output_in_flight = 0, False
        due, self._in_flight, self._stepped = self._in_flight, [], []
        outputs = []
        for sequence, output in due:
            if self._scheduler.sequences.get(sequence.request_id) is not sequence:
                continue
            outputs.append(output)
            if output.finish_reason is not None:
                self._scheduler.remove(sequence)
        return tuple(outputs)
