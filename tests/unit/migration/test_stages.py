"""Which blocks are copied when? The arithmetic of the stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.params import IncomingParams, MigrationParams, Mode
from migration.stages import (
    Landing,
    StopReason,
    chunks_of,
    copy_blocks_per_s,
    expected_downtime_s,
    next_stage,
    num_blocks_for,
    num_full_blocks,
    tail_blocks,
)
from migration.types import BlockRange, StageReport

PARAMS = MigrationParams()


def stage(num_blocks: int, duration_s: float = 0.1) -> StageReport:
    return StageReport(num_blocks, num_blocks * 100, duration_s)


def test_only_full_blocks_are_copied_while_decoding_goes_on() -> None:
    assert next_stage(Landing(0, ()), num_full_blocks(16 * 5 + 15, 16), PARAMS) == BlockRange(0, 5)


def test_blocks_that_have_landed_are_not_copied_again() -> None:
    assert next_stage(Landing(5, (stage(5),)), 8, PARAMS) == BlockRange(5, 8)


def test_one_full_block_left_is_few_enough_to_stop() -> None:
    assert next_stage(Landing(5, (stage(5),)), 6, PARAMS) is StopReason.FEW_BLOCKS_LEFT
    assert next_stage(Landing(5, (stage(5),)), 7, PARAMS) == BlockRange(5, 7)


def test_stages_are_bounded() -> None:
    stages = tuple(stage(100 - i) for i in range(PARAMS.max_stages))
    assert next_stage(Landing(500, stages), 510, PARAMS) is StopReason.MAX_STAGES


def test_a_stage_that_leaves_no_less_than_it_copied_is_the_last() -> None:
    assert next_stage(Landing(10, (stage(10),)), 20, PARAMS) is StopReason.NOT_CONVERGING
    assert next_stage(Landing(10, (stage(10),)), 19, PARAMS) == BlockRange(10, 19)


@pytest.mark.parametrize("mode", [Mode.BLOCKING, Mode.RECOMPUTE])
def test_other_modes_stop_at_once(mode: Mode) -> None:
    assert next_stage(Landing(0, ()), 100, MigrationParams(mode=mode)) is StopReason.MODE


@given(st.integers(0, 40), st.integers(0, 400), st.integers(1, 32))
def test_stages_and_tail_cover_every_block_once(num_landed: int, settled_tokens: int, block_size: int) -> None:
    full = num_full_blocks(settled_tokens, block_size)
    step = next_stage(Landing(min(num_landed, full), ()), full, PARAMS)
    copied = step if isinstance(step, BlockRange) else BlockRange(min(num_landed, full), min(num_landed, full))
    tail = tail_blocks(copied.end, settled_tokens, block_size)
    assert tail.first == copied.end and tail.end == num_blocks_for(settled_tokens, block_size)
    assert tail.end * block_size >= settled_tokens > (tail.end - 1) * block_size


def test_a_cached_prefix_longer_than_what_is_settled_leaves_an_empty_tail() -> None:
    assert len(tail_blocks(9, 100, 16)) == 0


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_chunks_join_to_the_range(first: int, count: int, chunk_blocks: int) -> None:
    chunks = chunks_of(BlockRange(first, first + count), chunk_blocks)
    assert [i for chunk in chunks for i in range(chunk.first, chunk.end)] == list(range(first, first + count))
    assert all(1 <= len(chunk) <= chunk_blocks for chunk in chunks)


def test_the_expected_downtime_is_the_tail_at_the_measured_rate_and_a_fixed_part() -> None:
    rate = copy_blocks_per_s((stage(30, 0.2), stage(10, 0.2)))
    assert rate == pytest.approx(100.0)
    assert expected_downtime_s(BlockRange(0, 5), rate, 0.003) == pytest.approx(0.053)
    assert expected_downtime_s(BlockRange(5, 5), None, 0.003) == 0.003
    assert expected_downtime_s(BlockRange(0, 5), copy_blocks_per_s(()), 0.003) is None


@pytest.mark.parametrize(
    "wrong",
    [{"max_stages": -1}, {"resend_s": 0.0}, {"max_cancel_sends": 0}, {"deadline_s": -1.0}],
)
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        MigrationParams(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        IncomingParams(max_incoming=0)
