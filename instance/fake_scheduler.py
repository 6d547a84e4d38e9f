"""Which requests does the fake engine step, with which blocks? Continuous batching as in vLLM's scheduler, small.

Token budget and chunked prefill, (priority, arrival) order, prefix hits, recompute preemption of the least urgent
running request when blocks run out; a migrated request waits with its KV and is scheduled first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from instance.fake_blocks import BlockPool, block_hashes, num_blocks_for
from instance.fake_model import FakeMove, FakeRequest, digest, finish_of, kv_words, next_generator, sample, weights
from instance.headroom import Headroom, kept_from
from instance.types import EngineOutput, PriorityAnswer, PriorityOutcome, RequestStatus, RequestView
from migration.types import RequestId, Reservation


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """A fake engine's size and habits."""

    num_blocks: int = 256
    block_size: int = 16
    max_model_len: int = 4096
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    prefix_cache: bool = True
    is_pipelined: bool = False
    """A step gives out the outputs of the step before, as an engine with asynchronous scheduling does."""
    fail_at_step: int | None = None
    """This step (from 1) raises, as a broken engine would."""
    step_base_s: float = 0.004
    """Modelled time of a step; only told, never slept."""
    step_token_s: float = 0.0002


@dataclass(slots=True)
class FakeReservation:
    """Blocks held for a request on its way here."""

    move: FakeMove
    request_id: RequestId
    blocks: list[int]
    num_cached_blocks: int
    polls_left: int

    def view(self, block_size: int) -> Reservation:
        return Reservation(self.num_cached_blocks * block_size, len(self.blocks), (tuple(self.blocks),))


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine."""

    request_id: RequestId
    external_id: str
    priority: int
    arrival: int
    request: FakeRequest
    generator: int
    tokens: list[int]
    status: RequestStatus = RequestStatus.WAITING
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    in_flight: int = 0
    """Tokens of the step whose output has not been given out yet."""
    has_output_in_flight: bool = False
    finish: int | None = None

    @property
    def num_output(self) -> int:
        """Output tokens, the one in flight included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_settled(self) -> int:
        return self.computed - self.in_flight

    @property
    def num_visible(self) -> int:
        """Tokens, prompt included, that have been given out."""
        return len(self.tokens) - self.has_output_in_flight

    @property
    def rank(self) -> tuple[int, float, int]:
        """Urgent first: a lower priority number, then earlier arrival, wherever that was; then who came here first."""
        return (self.priority, self.request.arrived_s, self.arrival)


class FakeScheduler:
    """The queues and blocks of one fake engine."""

    def __init__(self, config: FakeConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.sequences: dict[RequestId, Sequence] = {}
        self.running: list[Sequence] = []
        self.holding: list[Sequence] = []
        """Waiting, but their KV is here: migrated in, or resumed without a free slot."""
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self.headroom: Headroom = ()
        self._weights = weights(config.max_model_len + 1)

    def in_order_of_waiting(self) -> Iterator[Sequence]:
        yield from self.holding
        yield from sorted(self.waiting, key=lambda sequence: sequence.rank)

    def remove(self, sequence: Sequence) -> None:
        """It is gone: its blocks are free (what is cached can be found again)."""
        self.take_out(sequence)
        del self.sequences[sequence.request_id]
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def take_out(self, sequence: Sequence) -> None:
        """Out of every queue; it keeps its blocks."""
        for group in (self.running, self.holding, self.waiting):
            if sequence in group:
                group.remove(sequence)

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        """The queues are put in order by rank when they are asked, so that is all."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.finish is not None:
            return PriorityAnswer(PriorityOutcome.NOT_HERE, reason="no such request is here")
        if sequence.status is RequestStatus.MIGRATING_OUT:
            return PriorityAnswer(PriorityOutcome.ON_THE_MOVE, reason="it is stopped, on its way to another instance")
        previous, sequence.priority = sequence.priority, priority
        return PriorityAnswer(PriorityOutcome.SET, previous, sequence.status)

    def views(self) -> tuple[RequestView, ...]:
        return tuple(
            RequestView(
                request_id=sequence.request_id,
                external_id=sequence.external_id,
                status=sequence.status,
                priority=sequence.priority,
                num_prompt_tokens=len(sequence.request.prompt),
                num_output_tokens=sequence.num_visible - len(sequence.request.prompt),
                max_tokens=sequence.request.max_tokens,
                num_blocks=len(sequence.blocks),
                movable=sequence.request.movable and sequence.status is not RequestStatus.MIGRATING_OUT,
            )
            for sequence in self.sequences.values()
        )

    def put_back(self, sequence: Sequence) -> None:
        """Into the queue where it belongs."""
        if sequence.blocks:
            sequence.status = RequestStatus.PREEMPTED
            self.holding.append(sequence)
        else:
            sequence.status = RequestStatus.PREEMPTED if sequence.num_preemptions else RequestStatus.WAITING
            self.waiting.append(sequence)

    # ---- one step
    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens to compute), decided in vLLM's order."""
        plan: dict[Sequence, int] = {}
        budget = self.config.max_num_batched_tokens
        preemptions_before = self.num_preemptions
        for sequence in list(self.running):
            if sequence not in self.running or sequence.finish is not None:
                continue
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count > 0:
                if not self._make_room(sequence, sequence.computed + count, plan):
                    break  # it gave its own blocks up: vLLM looks at no further one in this step
                plan[sequence] = count
            budget = self.config.max_num_batched_tokens - sum(plan.values())
        if self.num_preemptions == preemptions_before:
            self._admit(plan, budget)
        return list(plan.items())

    def compute(self, plan: list[tuple[Sequence, int]]) -> list[EngineOutput]:
        """Write the KV of the scheduled tokens, and sample where a context is complete."""
        outputs = []
        for sequence, count in plan:
            self._write(sequence, count)
            if sequence.computed == len(sequence.tokens):
                outputs.append(self._sample(sequence))
        return outputs

    def _make_room(self, sequence: Sequence, num_tokens: int, plan: dict[Sequence, int]) -> bool:
        """Blocks for so many tokens; the least urgent running requests give theirs up. False: it had to itself."""
        while not self.extend(sequence, num_tokens):
            victim = max(self.running, key=lambda running: running.rank)
            plan.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = num_blocks_for(num_tokens, self.config.block_size) - len(sequence.blocks)
        fresh = self.pool.allocate(max(0, missing))
        if fresh is None:
            return False
        sequence.blocks += fresh
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.take_out(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.put_back(sequence)

    def _admit(self, plan: dict[Sequence, int], budget: int) -> None:
        for sequence in list(self.in_order_of_waiting()):
            if len(self.running) >= self.config.max_num_seqs or budget <= 0:
                return
            prefix = [] if sequence.blocks else self._prefix(sequence)
            # All of it must fit, not only the first chunk (vLLM's `scheduler_reserve_full_isl`, on by default).
            wanted = num_blocks_for(len(sequence.tokens), self.config.block_size) - len(sequence.blocks)
            wanted -= self.pool.num_cached(prefix) - self.pool.num_cached_free(prefix)
            if sequence in self.waiting and self._is_held_back(sequence, wanted):
                return
            if wanted > self.pool.num_free:
                if sequence in self.holding and not self.running:
                    # They would wait for each other for ever: the least urgent gives its KV up.
                    self._preempt(max(self.holding, key=lambda holding: holding.rank))
                return
            # Only now: what waits does not keep the cached blocks that it will share (as in vLLM).
            if prefix:
                sequence.blocks = self.pool.share_prefix(prefix)
                sequence.computed = len(sequence.blocks) * self.config.block_size
            count = min(len(sequence.tokens) - sequence.computed, budget)
            self.extend(sequence, sequence.computed + count)
            self.take_out(sequence)
            sequence.status = RequestStatus.RUNNING
            self.running.append(sequence)
            plan[sequence] = count
            budget -= count

    def _is_held_back(self, sequence: Sequence, wanted: int) -> bool:
        """Whether more urgent ones that run would lack the headroom of their level beside it."""
        kept = kept_from(self.headroom, sequence.priority, (running.priority for running in self.running))
        return kept > 0 and self.pool.num_free - wanted < kept

    def _prefix(self, sequence: Sequence) -> list[int]:
        """Hashes of the blocks that it may take from the cache."""
        if not self.config.prefix_cache:
            return []
        size = self.config.block_size
        sequence.hashes = block_hashes(sequence.tokens, size, sequence.hashes)
        return sequence.hashes[: (len(sequence.tokens) - 1) // size]  # At least one is computed, to sample from.

    def _write(self, sequence: Sequence, count: int) -> None:
        size, start = self.config.block_size, sequence.computed
        words = kv_words(sequence.tokens[start : start + count], start)
        done = 0
        while done < count:
            block, slot = divmod(start + done, size)
            part = min(size - slot, count - done)
            self.pool.words[sequence.blocks[block], slot : slot + part] = words[done : done + part]
            done += part
        sequence.computed += count
        self.cache_full_blocks(sequence, start // size)

    def cache_full_blocks(self, sequence: Sequence, first_block: int) -> None:
        if not self.config.prefix_cache:
            return
        sequence.hashes = block_hashes(sequence.tokens, self.config.block_size, sequence.hashes)
        for index in range(first_block, sequence.computed // self.config.block_size):
            self.pool.cache(sequence.blocks[index], sequence.hashes[index])

    def _sample(self, sequence: Sequence) -> EngineOutput:
        words = self.pool.words[sequence.blocks].reshape(-1)[: sequence.computed]
        token = sample(digest(words, self._weights), sequence.generator)
        sequence.generator = next_generator(sequence.generator)
        sequence.tokens.append(token)
        sequence.finish = finish_of(sequence.request, token, sequence.num_output)
        return EngineOutput(
            request_id=sequence.request_id,
            token_ids=(token,),
            finish_reason=sequence.finish,
            stop_reason=token if token == sequence.request.stop_token else None,
            extra=(),
        )

    def check_integrity(self, reserved: list[list[int]]) -> None:
        queues = (*self.running, *self.holding, *self.waiting)
        assert len(set(queues)) == len(queues), "a request stands in two queues"
        stopped = {s for s in self.sequences.values() if s.status is RequestStatus.MIGRATING_OUT}
        assert set(queues) | stopped == set(self.sequences.values()), "a request stands in no queue"
        assert not stopped & set(queues), "a stopped request stands in a queue"
        assert all(s.status is RequestStatus.RUNNING for s in self.running)
        assert len(self.running) <= self.config.max_num_seqs
        for sequence in self.sequences.values():
            assert sequence.computed <= len(sequence.blocks) * self.config.block_size
            assert sequence.computed <= len(sequence.tokens)
        self.pool.check_integrity([*(s.blocks for s in self.sequences.values()), *reserved])
