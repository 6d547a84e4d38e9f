"""What must an engine offer to be an instance? The Engine port: synchronous, called by one thread, between steps.

`instance.vllm.host.VllmEngine` is the real one, `instance.fake.FakeEngine` the verified fake; both pass tests/contract.
"""

from __future__ import annotations

from typing import Protocol

from instance.headroom import Headroom
from instance.types import (
    CachedChanges,
    CommittedRequest,
    EngineFacts,
    EngineLoad,
    EngineRefusal,
    PriorityAnswer,
    RequestView,
    Rescue,
    StepResult,
    Submission,
)
from migration.ports import BlockMover
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


class Engine(Protocol):
    """Every method runs on the engine's thread, between two steps; none waits for anything but `step`."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def mover(self) -> BlockMover:
        """The data plane of this engine's ranks; the one part that is used from outside the engine's thread."""

    def add(self, submission: Submission) -> EngineRefusal | None:
        """Queue a request. A refusal leaves no trace. A known id is ignored (a repeated submission)."""

    def rescue(self, submission: Submission, output_token_ids: tuple[int, ...]) -> Rescue | EngineRefusal:
        """What `reserve` and `commit` take so that this request goes on here after this output (one token at least),
        though nobody is left to export it: as output, not as prompt, and its sampler where so many tokens have brought
        it. No request is changed."""

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        """End these requests without output; stopped ones too. Unknown ids are ignored."""

    def set_priority(self, request_id: RequestId, priority: int) -> PriorityAnswer:
        """From the next step on it is as urgent as this (lower is more urgent): where it waits, its place in the queue
        is by it; where it runs, who gives blocks up first. Its tokens do not change. A move takes it along."""

    def set_headroom(self, headroom: Headroom) -> None:
        """From the next step on a request is begun beside a running one of a more urgent level only if that level's
        headroom stays free (`instance.headroom.kept_from`). What runs goes on; what has come with its KV begins. An
        engine that does not schedule by priority heeds none: the urgent ones would wait behind what is held back."""

    def has_work(self) -> bool: ...

    def step(self) -> StepResult:
        """Run one engine step."""

    def load(self) -> EngineLoad: ...

    def requests(self) -> tuple[RequestView, ...]:
        """Every request this engine owns, in order of arrival."""

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix. False: not possible now (blocks are in use)."""

    def take_cached_changes(self) -> CachedChanges | None:
        """What the prefix cache has gained and lost since the last call; the first call is told all that it holds.

        None: nothing has changed, or this engine never tells. Costs nothing before the first call.
        """

    # ---- source
    def describe(self, request_id: RequestId) -> Description | Refusal | None: ...

    def progress(self, request_id: RequestId) -> Progress | None: ...

    def try_stop(self, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped | None:
        """Take it out of the batch and export it. None: tokens are still in flight, call again after the next step
        (it is out of the batch already). `without_kv`: export as if nothing had been computed (re-prefill mode)."""

    def resume(self, request_id: RequestId) -> None: ...

    def release(self, request_id: RequestId) -> bool:
        """Free a stopped request without output. False: it was no longer there (aborted meanwhile)."""

    # ---- destination
    def reserve(
        self, migration_id: MigrationId, description: Description, slack_blocks: int
    ) -> Reservation | Refusal: ...

    def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal: ...

    def is_ready(self, migration_id: MigrationId) -> bool | Refusal:
        """True: it could be committed now. False: ask again after a while (a grammar is compiling)."""

    def commit(self, migration_id: MigrationId, state: bytes) -> CommittedRequest | Refusal:
        """Make it schedulable. A refusal has cancelled the reservation."""

    def cancel(self, migration_id: MigrationId) -> None: ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless free + held + reserved = total and the queues agree (for tests)."""

    def close(self) -> None:
        """Stop the engine and its processes."""
