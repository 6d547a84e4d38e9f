"""Which requests does a simulated engine step, and with how many blocks? vLLM's scheduling rules over lengths alone.

The rules are those of `instance/fake_scheduler.py`, which the contract suite holds against vLLM itself; a property test
holds this one against it, step by step. Tokens have no content here and blocks no number, so that a step costs little,
and that many steps in which nothing happens but decoding cost hardly more than one (`Batch.steps_alike`). Prefixes are
cached where the config says so (`prefix_cache.py`).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from instance.headroom import Headroom, kept_from
from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus, RequestView
from migration.types import RequestId
from orchestrator.sim.arrivals import PREFIX_BLOCK_TOKENS
from orchestrator.sim.losses import Losses
from orchestrator.sim.prefix_cache import NOTHING, Chain, Found, PrefixCache


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
    prefix_cache: bool = False
    prefix_id_tokens: int = PREFIX_BLOCK_TOKENS
    """Of one of a request's prefix ids."""


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
    num_told: int = 0
    """Output tokens that were among a step's outputs."""
    status: RequestStatus = RequestStatus.WAITING
    chain: Chain | None = None
    """None: there is no prefix cache."""
    arrived_s: float = 0.0
    """At its first instance, by the clock of whoever sent it."""

    @property
    def num_output(self) -> int:
        return self.tokens - self.num_prompt

    @property
    def is_over(self) -> bool:
        return self.tokens - self.num_prompt >= self.num_answer


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    """Urgent first: a lower priority number, then earlier arrival, wherever that was; then who came here first."""
    return (sequence.priority, sequence.arrived_s, sequence.arrival)


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
    waiting_blocks: int = 0
    """That those which wait, with their KV or without, need to begin."""
    num_preemptions: int = 0
    has_preempted: bool = False
    """In the step that was scheduled last, so that who waits was not looked at: it may begin in the next one."""
    headroom: Headroom = ()
    cache: PrefixCache | None = None
    num_prompt_tokens: int = 0
    """Of the requests that have begun here."""
    num_found_tokens: int = 0
    """Of those: in the prefix cache when they began."""
    _untold: list[Sequence] = field(default_factory=list)
    """Preempted since all was told."""
    _running_at: dict[int, int] = field(default_factory=dict)
    """How many run of each priority."""
    now_s: float = 0.0
    """When the step began that is scheduled."""
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        self.free = self.config.num_blocks
        if self.config.prefix_cache:
            self.cache = PrefixCache(self.config.block_size, self.config.prefix_id_tokens)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def head_of_line(self) -> Sequence | None:
        """Who runs next of those that wait."""
        return self.holding[0] if self.holding else self.waiting[0] if self.waiting else None

    def running_by_priority(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._running_at.items() if len(self._running_at) < 2 else sorted(self._running_at.items()))

    def take_untold(self) -> list[Sequence]:
        """Those that were preempted since this was asked last, and are here still."""
        untold, self._untold = self._untold, []
        return [one for one in untold if self.sequences.get(one.request_id) is one]

    def views(self) -> tuple[RequestView, ...]:
        return tuple(
            RequestView(
                request_id=one.request_id,
                external_id=one.external_id,
                status=one.status,
                priority=one.priority,
                num_prompt_tokens=one.num_prompt,
                num_output_tokens=one.tokens - one.num_prompt,
                max_tokens=one.max_tokens,
                num_blocks=one.blocks,
                movable=one.movable and one.status is not RequestStatus.MIGRATING_OUT,
            )
            for one in self.sequences.values()
        )

    # ---- who is where
    def put_back(self, sequence: Sequence) -> None:
        """Into the queue where it belongs."""
        self.waiting_blocks += self.blocks_for(sequence.tokens)
        if sequence.blocks:
            sequence.status = RequestStatus.PREEMPTED
            self.holding.append(sequence)
        else:
            sequence.status = RequestStatus.PREEMPTED if sequence.num_preemptions else RequestStatus.WAITING
            bisect.insort(self.waiting, sequence, key=_rank)

    def take_out(self, sequence: Sequence) -> None:
        """Out of every queue; it keeps its blocks."""
        if sequence.status is RequestStatus.RUNNING:
            self.running.remove(sequence)
            self._count_running(sequence.priority, -1)
        elif sequence.status is not RequestStatus.MIGRATING_OUT:
            (self.holding if sequence.blocks else self.waiting).remove(sequence)
            self.waiting_blocks -= self.blocks_for(sequence.tokens)

    def _count_running(self, priority: int, change: int) -> None:
        count = self._running_at.get(priority, 0) + change
        if count:
            self._running_at[priority] = count
        else:
            del self._running_at[priority]

    def remove(self, sequence: Sequence) -> None:
        """It is gone: its blocks are free."""
        self.take_out(sequence)
        del self.sequences[sequence.request_id]
        self.give_back(sequence.blocks, sequence.chain)
        sequence.blocks = 0

    # ---- blocks
    def take(self, num_blocks: int) -> None:
        """Of the free ones."""
        self.free -= num_blocks
        if self.cache is not None:
            self.cache.trim(self.free)

    def give_back(self, num_blocks: int, chain: Chain | None) -> None:
        """All blocks of a table, of which the chain knows those that can be found."""
        self.free += num_blocks
        if self.cache is not None and chain is not None:
            self.free -= self.cache.release(chain)

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return PriorityAnswer(PriorityOutcome.NOT_HERE, reason="no such request is here")
        if sequence.status is RequestStatus.MIGRATING_OUT:
            return PriorityAnswer(PriorityOutcome.ON_THE_MOVE, reason="it is stopped, on its way to another instance")
        previous, sequence.priority = sequence.priority, priority
        if sequence.status is RequestStatus.RUNNING:
            self._count_running(previous, -1)
            self._count_running(priority, 1)
        self.waiting.sort(key=_rank)
        return PriorityAnswer(PriorityOutcome.SET, previous, sequence.status)

    # ---- one step
    def schedule(self) -> dict[Sequence, int]:
        """Tokens to compute of each request, decided in vLLM's order; blocks for them are taken."""
        plan: dict[Sequence, int] = {}
        budget, index, preemptions_before = self.config.max_num_batched_tokens, 0, self.num_preemptions
        running, size = self.running, self.config.block_size
        while index < len(running) and budget > 0:
            sequence = running[index]
            count = sequence.tokens - sequence.computed
            if count > budget:  # noqa: PLR1730
                count = budget
            missing = -(-(sequence.computed + count) // size) - sequence.blocks
            if missing > 0:
                while missing > self.free:
                    victim = max(running, key=_rank)
                    at = running.index(victim)
                    budget += plan.pop(victim, 0)
                    self._preempt(victim)
                    if victim is sequence:
                        break
                    index -= at < index
                if sequence.status is not RequestStatus.RUNNING:
                    break  # it had to give its own blocks up: vLLM looks at no further one in this step
                sequence.blocks += missing
                self.take(missing)
            plan[sequence] = count
            budget -= count
            index += 1
        if (self.waiting or self.holding) and self.num_preemptions == preemptions_before:
            self._admit(plan, budget)
        self.has_preempted = self.num_preemptions > preemptions_before
        return plan

    def _take(self, sequence: Sequence, missing: int) -> None:
        if missing > 0:
            sequence.blocks += missing
            self.take(missing)

    def _preempt(self, sequence: Sequence) -> None:
        self.take_out(sequence)
        self._untold.append(sequence)
        self.losses.preempted(sequence.request_id, sequence.computed, self.now_s)
        self.give_back(sequence.blocks, sequence.chain)
        sequence.blocks = sequence.computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.put_back(sequence)

    def _admit(self, plan: dict[Sequence, int], budget: int) -> None:
        while (self.holding or self.waiting) and len(self.running) < self.config.max_num_seqs and budget > 0:
            has_kv = bool(self.holding)
            sequence = self.holding[0] if has_kv else self.waiting[0]
            found = NOTHING
            if self.cache is not None and sequence.chain is not None and not has_kv:
                found = self.cache.find(sequence.chain, sequence.tokens - 1)  # to sample, one is computed at least
            # All of it must fit, not only the first chunk.
            wanted = self.blocks_for(sequence.tokens) - sequence.blocks - found.num_held
            if wanted > self.free or (not has_kv and self._is_held_back(sequence, wanted)):
                if has_kv and not self.running:
                    # Those that wait with their KV would wait for each other for ever: the least urgent gives its up.
                    self._preempt(max(self.holding, key=_rank))
                return
            self.take_out(sequence)
            sequence.status = RequestStatus.RUNNING
            self.running.append(sequence)
            self._count_running(sequence.priority, 1)
            if not has_kv:
                self._begin(sequence, found)
            count = min(sequence.tokens - sequence.computed, budget)
            self._take(sequence, self.blocks_for(sequence.computed + count) - sequence.blocks)
            plan[sequence] = count
            budget -= count

    def _begin(self, sequence: Sequence, found: Found) -> None:
        """With what is cached of it."""
        if sequence.tokens == sequence.num_prompt and not sequence.num_preemptions:
            self.num_prompt_tokens += sequence.num_prompt
            self.num_found_tokens += len(found.blocks) * self.config.block_size
        if found.blocks and self.cache is not None and sequence.chain is not None:
            self.cache.hold(sequence.chain, found)
            self.free -= found.num_free
            sequence.blocks = len(found.blocks)
            sequence.computed = sequence.blocks * self.config.block_size

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

        While nobody ends free blocks only become fewer, so whoever was looked at and waits goes on waiting. What
        becomes full while they decode is nobody else's prefix.
        """
        if len(plan) != len(self.running):
            return 0
        most = 1 if self.has_preempted else limit
        for one in plan:
            if one.tokens - one.computed != 1:
                return 0
            left = one.num_answer - one.tokens + one.num_prompt
            if left < most:  # noqa: PLR1730 - `min` takes three times as long
                most = left
        if self.free < len(plan) * (most // self.config.block_size + 1):  # else there is enough for whatever they need
            while most > 1 and self._missing(plan, most) > self.free:
                most -= 1
        return most

    def _missing(self, plan: dict[Sequence, int], num_steps: int) -> int:
        size = self.config.block_size
        return sum(max(0, (one.computed + num_steps + size - 1) // size - one.blocks) for one in plan)

    def advance(self, plan: dict[Sequence, int], num_steps: int) -> None:
        """So many steps alike have been made."""
        size, taken = self.config.block_size, 0
        if self.cache is not None:  # what becomes full now is nobody else's, so it does not matter which goes first
            self._add_computed((one, num_steps) for one in plan)
        for one in plan:
            one.tokens += num_steps
            one.computed = computed = one.computed + num_steps
            if computed > one.blocks * size:
                missing = -(-computed // size) - one.blocks
                one.blocks += missing
                taken += missing
        self.take(taken)

    def compute(self, plan: dict[Sequence, int]) -> list[Sequence]:
        """One step of any kind has been made. Returns those that have got a token."""
        given = []
        if self.cache is not None:
            self._add_computed(plan.items())
        for sequence, count in plan.items():
            sequence.computed += count
            if sequence.computed == sequence.tokens:
                sequence.tokens += 1
                given.append(sequence)
        return given

    def _add_computed(self, counts: Iterable[tuple[Sequence, int]]) -> None:
        """To the cache: the blocks that are full when so many tokens more are computed."""
        cache, size = self.cache, self.config.block_size
        assert cache is not None
        for one, count in counts:
            if one.computed % size + count >= size and one.chain is not None:
                cache.add(one.chain, one.computed, one.computed + count)

    def check_integrity(self, num_reserved: int, reserved: Iterable[Chain] = ()) -> None:
        """Raise AssertionError unless free, held and reserved blocks are all there are, and the queues agree."""
        queues = (*self.running, *self.holding, *self.waiting)
        assert len(set(queues)) == len(queues), "a request stands in two queues"
        stopped = {one for one in self.sequences.values() if one.status is RequestStatus.MIGRATING_OUT}
        assert set(queues) | stopped == set(self.sequences.values()), "a request stands in no queue"
        assert not stopped & set(queues), "a stopped request stands in a queue"
        assert all(one.status is RequestStatus.RUNNING for one in self.running)
        assert self._running_at == Counter(one.priority for one in self.running), "the running are counted wrong"
        waiting_blocks = sum(self.blocks_for(one.tokens) for one in (*self.holding, *self.waiting))
        assert self.waiting_blocks == waiting_blocks, "what those that wait need is counted wrong"
        held = sum(one.blocks for one in self.sequences.values())
        if self.cache is not None:
            chains = [one.chain for one in self.sequences.values() if one.chain is not None]
            self.cache.check_integrity([*chains, *reserved], self.free)
            held -= self.cache.num_shared()
        assert self.free >= 0 and self.free + held + num_reserved == self.config.num_blocks, "blocks were lost"
        assert all(one.computed <= one.blocks * self.config.block_size for one in self.sequences.values())
