"""What must every engine do at either end of a migration, asked for one thing at a time?"""

from __future__ import annotations

import dataclasses

import msgspec

from instance.engine import Engine
from instance.types import RequestStatus
from instance.vllm import handshake
from migration.types import (
    MigrationId,
    NotStopped,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)
from tests.support.pair import EnginePair, Shape

UNKNOWN = RequestId("nobody-knows-this-one")
UNKNOWN_MIGRATION = MigrationId("no-such-migration")


def a_large_share_of(engine: Engine) -> int:
    """Prompt tokens that take 40 % of the blocks."""
    return int(engine.facts.total_blocks * 0.4) * engine.facts.block_size


class EndsContract:
    """Of `EngineContract`."""

    # ---- source
    def test_describe_and_progress_speak_of_settled_tokens(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 40, prompt_key=13))
        pair.decode_until(pair.first, request, 5)
        description, progress = pair.describe(pair.first, request), pair.first.progress(request)
        assert progress is not None
        assert 45 <= description.settled_tokens <= progress.num_tokens
        assert description.settled_tokens == progress.settled_tokens
        assert description.kv_fingerprint == pair.second.facts.kv_fingerprint
        assert len(progress.block_table[0]) * pair.first.facts.block_size >= progress.settled_tokens
        pair.step(pair.first)
        later = pair.first.progress(request)
        assert later is not None and later.settled_tokens == progress.settled_tokens + 1

    def test_nobody_is_described_and_nothing_happens_to_unknown_requests(self, pair: EnginePair) -> None:
        engine = pair.first
        assert engine.describe(UNKNOWN) is None
        assert engine.progress(UNKNOWN) is None
        assert engine.try_stop(UNKNOWN) in (NotStopped.FINISHED, NotStopped.ABORTED)
        engine.resume(UNKNOWN)
        assert engine.release(UNKNOWN) is False
        engine.abort((UNKNOWN,))
        engine.check_integrity()

    def test_a_stopped_request_stands_still_and_goes_on_when_resumed(self, pair: EnginePair) -> None:
        shape = Shape(45, 30, prompt_key=14)
        expected = pair.run_alone(pair.first, shape)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 7)
        stopped = pair.stop(pair.first, request)
        assert isinstance(stopped, StoppedRequest)
        assert stopped.num_output_tokens == len(pair.tokens(request))
        assert pair.first.requests()[0].status is RequestStatus.MIGRATING_OUT
        bystander = pair.add(pair.first, Shape(20, 5, prompt_key=15))
        pair.finish(pair.first, bystander)
        assert len(pair.tokens(request)) == stopped.num_output_tokens
        pair.first.resume(request)
        pair.finish(pair.first, request)
        assert pair.tokens(request) == expected

    def test_a_released_request_is_gone_without_output(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 30, prompt_key=16))
        pair.decode_until(pair.first, request, 7)
        assert isinstance(pair.stop(pair.first, request), StoppedRequest)
        count = len(pair.outputs[request])
        assert pair.first.release(request) is True
        assert pair.first.release(request) is False
        while pair.first.has_work():
            pair.step(pair.first)
        assert len(pair.outputs[request]) == count
        assert pair.first.load().free_blocks == pair.first.facts.total_blocks

    def test_a_stopped_request_can_be_aborted_and_release_says_so(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(45, 30, prompt_key=17))
        pair.decode_until(pair.first, request, 3)
        pair.stop(pair.first, request)
        pair.first.abort((request,))
        assert pair.first.try_stop(request) is NotStopped.ABORTED
        assert pair.first.release(request) is False
        assert pair.first.requests() == ()
        pair.first.check_integrity()

    def test_a_finished_request_cannot_be_stopped(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(20, 2, prompt_key=18))
        pair.finish(pair.first, request)
        assert pair.first.try_stop(request) is NotStopped.FINISHED

    # ---- destination
    def test_a_reservation_holds_blocks_until_it_is_cancelled(self, pair: EnginePair) -> None:
        size = pair.first.facts.block_size
        request = pair.add(pair.first, Shape(3 * size + 5, 40, prompt_key=19))
        pair.decode_until(pair.first, request, 2)
        free = pair.second.load().free_blocks
        migration, reservation = pair.reserve(pair.second, pair.describe(pair.first, request), slack_blocks=2)
        assert reservation.num_blocks == len(reservation.block_table[0]) >= 4
        held = pair.second.load()
        assert held.reserved_blocks == reservation.num_blocks
        assert held.free_blocks == free - held.reserved_blocks
        assert pair.second.requests() == ()
        pair.second.cancel(migration)
        pair.second.cancel(migration)
        assert (pair.second.load().free_blocks, pair.second.load().reserved_blocks) == (free, 0)
        pair.second.check_integrity()

    def test_a_reservation_grows_and_a_refused_growth_changes_nothing(self, pair: EnginePair) -> None:
        size, total = pair.second.facts.block_size, pair.second.facts.total_blocks
        for i in range(2):
            other = pair.add(pair.second, Shape(a_large_share_of(pair.second), 20, prompt_key=27 + i))
            pair.decode_until(pair.second, other, 1)
        request = pair.add(pair.first, Shape(2 * size, 40, prompt_key=20))
        pair.decode_until(pair.first, request, 2)
        migration, before = pair.reserve(pair.second, pair.describe(pair.first, request), slack_blocks=0)
        grown = pair.second.grow(migration, (before.num_blocks + 1) * size)
        assert isinstance(grown, Reservation) and grown.num_blocks == before.num_blocks + 1
        assert grown.block_table[0][: before.num_blocks] == before.block_table[0]
        assert grown.num_cached_tokens == before.num_cached_tokens
        assert isinstance(pair.second.grow(migration, (total + 1) * size), Refusal)
        pair.second.check_integrity()
        assert pair.second.load().reserved_blocks == grown.num_blocks
        assert isinstance(pair.second.grow(migration, 1), Reservation), (
            "it never shrinks, and asking for less is no error"
        )
        assert pair.second.load().reserved_blocks == grown.num_blocks
        pair.second.cancel(migration)

    def test_room_asked_for_beyond_the_longest_context_is_the_room_of_the_longest_context(
        self, pair: EnginePair
    ) -> None:
        """A source asks for slack: near the end of the context it reaches beyond it, and the request still moves."""
        longest = pair.second.facts.max_model_len
        request = pair.add(pair.first, Shape(40, 20, prompt_key=29))
        pair.decode_until(pair.first, request, 2)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        grown = pair.second.grow(migration, longest + 2 * pair.second.facts.block_size)
        assert isinstance(grown, Reservation) and grown.num_blocks >= longest // pair.second.facts.block_size
        pair.second.check_integrity()
        pair.second.cancel(migration)

    def test_a_reservation_is_refused_when_the_blocks_are_taken(self, pair: EnginePair) -> None:
        share = a_large_share_of(pair.second)
        mine = pair.add(pair.first, Shape(share, 20, prompt_key=21))
        pair.decode_until(pair.first, mine, 1)
        theirs = [pair.add(pair.second, Shape(share, 20, prompt_key=22 + i)) for i in range(2)]
        for request in theirs:
            pair.decode_until(pair.second, request, 1)
        free = pair.second.load().free_blocks
        refusal = pair.second.reserve(pair.new_migration(), pair.describe(pair.first, mine), 0)
        assert isinstance(refusal, Refusal) and refusal.reason
        assert (pair.second.load().free_blocks, pair.second.load().reserved_blocks) == (free, 0)
        pair.second.check_integrity()

    def test_a_reservation_is_refused_when_the_kv_memory_is_of_another_kind(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=24))
        pair.decode_until(pair.first, request, 1)
        description = pair.describe(pair.first, request)
        known = handshake.decode(description.kv_fingerprint)
        other = handshake.encode(msgspec.structs.replace(known, kv_dtype="of another kind"))
        both = f"the source keeps KV as of another kind, this instance {known.kv_dtype}"
        for fingerprint, why in ((other, both), ("another", "hand-shake cannot be read")):
            foreign = dataclasses.replace(description, kv_fingerprint=fingerprint)
            refusal = pair.second.reserve(pair.new_migration(), foreign, 0)
            assert isinstance(refusal, Refusal) and why in refusal.reason

    def test_a_request_that_is_already_here_or_coming_is_refused(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=25))
        pair.decode_until(pair.first, request, 1)
        description = pair.describe(pair.first, request)
        assert isinstance(pair.first.reserve(pair.new_migration(), description, 0), Refusal)
        migration, _ = pair.reserve(pair.second, description)
        assert isinstance(pair.second.reserve(pair.new_migration(), description, 0), Refusal)
        pair.second.cancel(migration)
        assert pair.second.load().reserved_blocks == 0

    def test_a_submission_of_a_request_that_is_coming_is_refused_for_now(self, pair: EnginePair) -> None:
        shape = Shape(40, 20, prompt_key=27)
        request = pair.add(pair.first, shape)
        pair.decode_until(pair.first, request, 1)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        refusal = pair.second.add(pair.kit.submission(request, shape))
        assert refusal is not None and not refusal.final
        pair.second.check_integrity()
        pair.second.cancel(migration)

    def test_an_unknown_migration_is_refused(self, pair: EnginePair) -> None:
        assert isinstance(pair.first.grow(UNKNOWN_MIGRATION, 10), Refusal)
        assert isinstance(pair.first.is_ready(UNKNOWN_MIGRATION), Refusal)
        assert isinstance(pair.first.commit(UNKNOWN_MIGRATION, b""), Refusal)
        pair.first.cancel(UNKNOWN_MIGRATION)

    def test_a_commit_with_unreadable_state_is_refused_and_cancels_the_reservation(self, pair: EnginePair) -> None:
        request = pair.add(pair.first, Shape(40, 20, prompt_key=26))
        pair.decode_until(pair.first, request, 1)
        migration, _ = pair.reserve(pair.second, pair.describe(pair.first, request))
        assert isinstance(pair.second.commit(migration, b"\xff not a state"), Refusal)
        assert pair.second.load().reserved_blocks == 0
        assert isinstance(pair.second.is_ready(migration), Refusal)
        pair.second.check_integrity()
