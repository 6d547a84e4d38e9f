"""Which requests does a simulated engine step, and with how many blocks? vLLM's scheduling rules over lengths alone.

The rules are those of `instance/fake_scheduler.py`, which the contract suite holds against vLLM itself; a property test
holds this one against it, step by step. Tokens have no content here and blocks no number, so that a step costs little,
and that many steps in which nothing happens but decoding cost hardly more than one (`Batch.steps_alike`). No prefix is
cached.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from instance.headroom import Headroom, kept_from
from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus, RequestView
from migration.types import RequestId
from orchestrator.sim.losses import Losses


@dataclass(frozen=True, slots=True)
class LengthConfig:
    """A simulated engine's size."""

    num_blocks: int = 851
    block_size: int = 16
    max_model_len: int = 8192
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    bytes_per_token: int = 524_288
    """Of KV, all layers: what a migration copies."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine."""

    request_id: RequestId
    external_id: str
    priority: int
    arrival: int
    num_prompt: int
    num_answer: int
    """Output tokens after which it ends by itself. Nobody but the engine knows."""
    max_tokens: int
    movable: bool = True
    tokens: int = 0
    """Prompt and output so far."""
    computed: int = 0
    blocks: int = 0
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING

    @property
    def num_output(self) -> int:
        return self.tokens - self.num_prompt

    @property
    def is_over(self) -> bool:
        return self.tokens - self.num_prompt >= self.num_answer


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Urgent first: a lower priority number, then earlier arrival; arrivals are unique."""
    return (sequence.priority, sequence.arrival)


@dataclass(slots=True)
class Batch:
    """The queues and blocks of one engine."""

    config: LengthConfig
    free: int = 0
    sequences: dict[RequestId, Sequence] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    holding: list[Sequence] = field(default_factory=list)
    """Waiting, but their KV is here: migrated in, or resumed without a free slot."""
    waiting: list[Sequence] = field(default_factory=list)
    """By rank."""
    num_preemptions: int = 0
    headroom: Headroom = ()
    now_s: float = 0.0
    """When the step began that is scheduled."""
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        self.free = self.config.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def in_order_of_waiting(self) -> Iterator[Sequence]:
        yield from self.holding
        yield from self.waiting

    def views(self) -> tuple[RequestView, ...]:
        return tuple(
            RequestView(
                request_id=one.request_id,
                external_id=one.external_id,
                status=one.status,
                priority=one.priority,
                num_prompt_tokens=one.num_prompt,
                num_output_tokens=one.num_output,
                max_tokens=one.max_tokens,
                num_blocks=one.blocks,
                movable=one.movable and one.status is not RequestStatus.MIGRATING_OUT,
            )
            for one in self.sequences.values()
        )

    # ---- who is where
    def put_back(self, sequence: Sequence) -> None:
        """Into the queue where it belongs."""
        if sequence.blocks:
            sequence.status = RequestStatus.PREEMPTED
            self.holding.append(sequence)
        else:
            sequence.status = RequestStatus.PREEMPTED if sequence.num_preemptions else RequestStatus.WAITING
            bisect.insort(self.waiting, sequence, key=_rank)

    def take_out(self, sequence: Sequence) -> None:
        """Out of every queue; it keeps its blocks."""
        for group in (self.running, self.holding, self.waiting):
            if sequence in group:
                group.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is gone: its blocks are free."""
        self.take_out(sequence)
        del self.sequences[sequence.request_id]
        self.free += sequence.blocks
        sequence.blocks = 0

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return PriorityAnswer(PriorityOutcome.NOT_HERE, reason="no such request is here")
        if sequence.status is RequestStatus.MIGRATING_OUT:
            return PriorityAnswer(PriorityOutcome.ON_THE_MOVE, reason="it is stopped, on its way to another instance")
        previous, sequence.priority = sequence.priority, priority
        self.waiting.sort(key=_rank)
        return PriorityAnswer(PriorityOutcome.SET, previous, sequence.status)

    # ---- one step
    def schedule(self) -> dict[Sequence, int]:
        """Tokens to compute of each request, decided in vLLM's order; blocks for them are taken."""
        plan: dict[Sequence, int] = {}
        budget, index, preemptions_before = self.config.max_num_batched_tokens, 0, self.num_preemptions
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            count = min(sequence.tokens - sequence.computed, budget)
            missing = self.blocks_for(sequence.computed + count) - sequence.blocks
            while missing > self.free:
                victim = max(self.running, key=_rank)
                at = self.running.index(victim)
                budget += plan.pop(victim, 0)
                self._preempt(victim)
                if victim is sequence:
                    break
                index -= at < index
            if sequence.status is not RequestStatus.RUNNING:
                break  # it had to give its own blocks up: vLLM looks at no further one in this step
            self._take(sequence, missing)
            plan[sequence] = count
            budget -= count
            index += 1
        if self.num_preemptions == preemptions_before:
            self._admit(plan, budget)
        return plan

    def _take(self, sequence: Sequence, missing: int) -> None:
        if missing > 0:
            sequence.blocks += missing
            self.free -= missing

    def _preempt(self, sequence: Sequence) -> None:
        self.take_out(sequence)
        self.losses.preempted(sequence.request_id, sequence.computed, self.now_s)
        self.free += sequence.blocks
        sequence.blocks = sequence.computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.put_back(sequence)

    def _admit(self, plan: dict[Sequence, int], budget: int) -> None:
        while (self.holding or self.waiting) and len(self.running) < self.config.max_num_seqs and budget > 0:
            has_kv = bool(self.holding)
            sequence = self.holding[0] if has_kv else self.waiting[0]
            wanted = self.blocks_for(sequence.tokens) - sequence.blocks  # all of it must fit, not only the first chunk
            if wanted > self.free or (not has_kv and self._is_held_back(sequence, wanted)):
                if has_kv and not self.running:
                    # Those that wait with their KV would wait for each other for ever: the least urgent gives its up.
                    self._preempt(max(self.holding, key=_rank))
                return
            (self.holding if has_kv else self.waiting).pop(0)
            sequence.status = RequestStatus.RUNNING
            self.running.append(sequence)
            count = min(sequence.tokens - sequence.computed, budget)
            self._take(sequence, self.blocks_for(sequence.computed + count) - sequence.blocks)
            plan[sequence] = count
            budget -= count

    def _is_held_back(self, sequence: Sequence, wanted: int) -> bool:
        """Whether more urgent ones that run would lack the headroom of their level beside it."""
        if not self.headroom:
            return False
        kept = kept_from(self.headroom, sequence.priority, (running.priority for running in self.running))
        return kept > 0 and self.free - wanted < kept

    # ---- many steps
    def steps_alike(self, plan: dict[Sequence, int], limit: int) -> int:
        """How many steps go by, this one included, in which each of these gets a token and nobody begins or is
        preempted; at most `limit`. 0: this is no such step.

        While nobody ends free blocks only become fewer, so whoever waits now goes on waiting.
        """
        if len(plan) != len(self.running) or any(one.tokens - one.computed != 1 for one in plan):
            return 0
        most = min(limit, *(one.num_answer - one.num_output for one in plan))
        while most > 1 and self._missing(plan, most) > self.free:
            most -= 1
        return most

    def _missing(self, plan: dict[Sequence, int], num_steps: int) -> int:
        size = self.config.block_size
        return sum(max(0, (one.computed + num_steps + size - 1) // size - one.blocks) for one in plan)

    def advance(self, plan: dict[Sequence, int], num_steps: int) -> None:
        """So many steps alike have been made."""
        size = self.config.block_size
        for one in plan:
            one.tokens += num_steps
            one.computed += num_steps
            self._take(one, (one.computed + size - 1) // size - one.blocks)

    def compute(self, plan: dict[Sequence, int]) -> list[Sequence]:
        """One step of any kind has been made. Returns those that have got a token."""
        given = []
        for sequence, count in plan.items():
            sequence.computed += count
            if sequence.computed == sequence.tokens:
                sequence.tokens += 1
                given.append(sequence)
        return given

    def check_integrity(self, num_reserved: int) -> None:
        """Raise AssertionError unless free, held and reserved blocks are all there are, and the queues agree."""
        queues = (*self.running, *self.holding, *self.waiting)
        assert len(set(queues)) == len(queues), "a request stands in two queues"
        stopped = {one for one in self.sequences.values() if one.status is RequestStatus.MIGRATING_OUT}
        assert set(queues) | stopped == set(self.sequences.values()), "a request stands in no queue"
        assert not stopped & set(queues), "a stopped request stands in a queue"
        assert all(one.status is RequestStatus.RUNNING for one in self.running)
        held = sum(one.blocks for one in self.sequences.values())
        assert self.free >= 0 and self.free + held + num_reserved == self.config.num_blocks, "blocks were lost"
        assert all(one.computed <= one.blocks * self.config.block_size for one in self.sequences.values())
