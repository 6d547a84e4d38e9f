"""What is copied next, when is it time to stop, and what will the stop cost? Arithmetic over blocks; no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from migration.params import MigrationParams, Mode
from migration.types import BlockRange, StageReport


def num_full_blocks(settled_tokens: int, block_size: int) -> int:
    """Blocks wholly under the settled mark: they can never change again."""
    return settled_tokens // block_size


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens, the last one perhaps in part."""
    return -(-num_tokens // block_size)


def chunks_of(blocks: BlockRange, chunk_blocks: int) -> tuple[BlockRange, ...]:
    """The range in order, cut into pieces of at most `chunk_blocks`."""
    if chunk_blocks < 1:
        raise ValueError("chunk_blocks must be at least 1")
    firsts = range(blocks.first, blocks.end, chunk_blocks)
    return tuple(BlockRange(first, min(first + chunk_blocks, blocks.end)) for first in firsts)


class StopReason(Enum):
    """Why the request is stopped now rather than after another stage."""

    MODE = "mode"
    FEW_BLOCKS_LEFT = "few_blocks_left"
    MAX_STAGES = "max_stages"
    NOT_CONVERGING = "not_converging"
    """The last stage copied no more than was decoded meanwhile: another one would not leave less."""


@dataclass(frozen=True, slots=True)
class Landing:
    """How far the copy is. A stage is what one look found missing; a long one lands in several pushes."""

    num_landed: int = 0
    """Leading blocks that are at the destination (cached there or copied)."""
    stages: tuple[StageReport, ...] = ()
    """The last one may not have landed to its end yet."""
    stage_end: int = 0
    """Where the last stage ends; above `num_landed` it is under way."""
    last_push: StageReport | None = None

    def after(self, push: StageReport, full_blocks: int) -> Landing:
        """The push that `next_push` gave for `full_blocks` has landed."""
        num_landed = self.num_landed + push.num_blocks
        if self.num_landed >= self.stage_end:
            return Landing(num_landed, (*self.stages, push), full_blocks, push)
        stage = self.stages[-1]
        joined = StageReport(
            stage.num_blocks + push.num_blocks, stage.num_bytes + push.num_bytes, stage.duration_s + push.duration_s
        )
        return Landing(num_landed, (*self.stages[:-1], joined), self.stage_end, push)


def next_push(landing: Landing, full_blocks: int, params: MigrationParams) -> BlockRange | StopReason:
    """What to do at this look at the request: go on with the stage under way, begin the next, or stop the request.

    One push is bounded in time, so that a long stage is no reason for a time-out and a stuck push still is.
    """
    if landing.num_landed < landing.stage_end:
        stage = BlockRange(landing.num_landed, landing.stage_end)
    else:
        step = next_stage(landing, full_blocks, params)
        if isinstance(step, StopReason):
            return step
        stage = step
    return BlockRange(stage.first, min(stage.end, stage.first + max_push_blocks(landing.last_push, params)))


def max_push_blocks(last: StageReport | None, params: MigrationParams) -> int:
    """What takes about `push_s` at the last push's rate. It grows step by step: a short push tells little of the rate,
    for its first bytes are never paced."""
    if last is None:
        return params.first_push_blocks
    grown = max(params.first_push_blocks, last.num_blocks * params.push_growth)
    if last.duration_s <= 0:
        return grown
    return max(1, min(grown, int(last.num_blocks / last.duration_s * params.push_s)))


def next_stage(landing: Landing, full_blocks: int, params: MigrationParams) -> BlockRange | StopReason:
    """With no stage under way: the next one (these full blocks, while it decodes), or why to stop."""
    if params.mode is not Mode.LIVE:
        return StopReason.MODE
    left = BlockRange(landing.num_landed, full_blocks)
    if len(left) <= params.stop_when_blocks_left:
        return StopReason.FEW_BLOCKS_LEFT
    if len(landing.stages) >= params.max_stages:
        return StopReason.MAX_STAGES
    if landing.stages and len(left) >= landing.stages[-1].num_blocks:
        return StopReason.NOT_CONVERGING
    return left


def tail_blocks(num_landed: int, settled_tokens: int, block_size: int) -> BlockRange:
    """What is copied while the request stands still: all that has not landed, the partial last block included."""
    end = num_blocks_for(settled_tokens, block_size)
    return BlockRange(min(num_landed, end), end)


def copy_blocks_per_s(stages: Sequence[StageReport]) -> float | None:
    """The measured copy rate; None before anything was copied in a measurable time."""
    duration_s = sum(stage.duration_s for stage in stages)
    num_blocks = sum(stage.num_blocks for stage in stages)
    return num_blocks / duration_s if duration_s > 0 and num_blocks else None


def expected_downtime_s(tail: BlockRange, blocks_per_s: float | None, fixed_s: float) -> float | None:
    """Time of the tail's copy plus `fixed_s` (stop, commit, first step). None: something to copy, no rate known."""
    if not len(tail):
        return fixed_s
    return None if blocks_per_s is None else fixed_s + len(tail) / blocks_per_s
