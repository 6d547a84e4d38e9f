"""How are KV blocks held for a request that is in no queue? Over vLLM's KV cache manager, in every group alike.

A group is full attention or a sliding window, all of one block size, so each has one table entry a block of tokens. A
window's entries before its first block in use are vLLM's null block, which nobody reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from vllm.v1.request import Request

T = TypeVar("T")


class NoRoom(Exception):
    """The blocks (or the sequence or adapter slot) asked for are not to be had; nothing has changed."""


def managers_of(manager: Any) -> tuple[Any, ...]:
    """Of each KV-cache group. `manager`, here and below: vLLM's KVCacheManager."""
    return tuple(manager.coordinator.single_type_managers)


def hold(manager: Any, request: Request, settled_tokens: int, kept_free: int) -> int:
    """Hold blocks for `settled_tokens`; returns the leading tokens that the prefix cache holds already.

    Exactly so many: a window's null entries are those of the tokens told, and one told too far would lack blocks that
    its request still reads. Raises `NoRoom`.
    """
    cached, hit = _cached(manager, request, settled_tokens)
    allocated = _without_zeroing(
        manager,
        lambda: manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=hit,
            new_computed_blocks=cached,
            num_external_computed_tokens=settled_tokens - hit,
            delay_cache_blocks=True,
            reserved_blocks=kept_free,
        ),
    )
    if allocated is None:
        raise NoRoom(f"no free KV blocks for {settled_tokens} tokens")
    return hit


def _cached(manager: Any, request: Request, settled_tokens: int) -> tuple[Any, int]:
    """Blocks of the longest prefix, within `settled_tokens`, that every group holds; and its tokens."""
    if manager.prefix_cache_lookup_enabled(request):
        longest = min(settled_tokens, request.num_tokens - 1)
        blocks, hit, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, longest)
        if hit and all(hit % group.block_size == 0 for group in managers_of(manager)):
            return manager.create_kv_cache_blocks(blocks), int(hit)
    return manager.empty_kv_cache_blocks, 0


def grow(manager: Any, request_id: str, num_tokens: int, kept_free: int) -> None:
    """Hold blocks for `num_tokens` in each group. Raises `NoRoom`, with all as it was."""
    groups = managers_of(manager)
    missing = [-(-num_tokens // group.block_size) - len(group.req_to_blocks[request_id]) for group in groups]
    num_more = sum(max(0, count) for count in missing)
    if num_more > manager.block_pool.get_num_free_blocks() - kept_free:
        raise NoRoom(f"no {num_more} more free KV blocks")
    for group, count in zip(groups, missing, strict=True):
        if count > 0:  # not recorded for zeroing: they are written to at once
            group.req_to_blocks[request_id].extend(group.block_pool.get_new_blocks(count))


def settle(manager: Any, request: Request) -> None:
    """Everything has arrived: give back all but what its KV and its next token need.

    vLLM would take more blocks for tokens already there. What has left a window was perhaps never copied: it must be
    gone before the blocks are cached.
    """
    computed, request_id = request.num_computed_tokens, request.request_id
    for group in managers_of(manager):
        held = group.req_to_blocks[request_id]
        num_kept = -(-min(computed + 1, request.num_tokens) // group.block_size) if computed else 0
        surplus = held[num_kept:]
        del held[num_kept:]
        group.block_pool.free_blocks(reversed(surplus))
    if not computed:
        manager.free(request)  # forgets the empty entries and their counts of cached blocks
        return
    manager.coordinator.remove_skipped_blocks(request_id, computed)
    manager.cache_blocks(request, computed)


def _without_zeroing(manager: Any, allocate: Callable[[], T]) -> T:
    """Blocks vLLM hands out may be queued for zeroing at the next step, which would wipe what is copied in by then."""
    groups = managers_of(manager)
    recorded = [group.new_block_ids for group in groups]
    for group in groups:
        group.new_block_ids = []
    try:
        return allocate()
    finally:
        for group, block_ids in zip(groups, recorded, strict=True):
            group.new_block_ids = block_ids


# ---- counting
def table_of(manager: Any, request_id: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in manager.get_block_ids(request_id))


def num_needed(manager: Any, num_tokens: int) -> int:
    """Blocks that a request of so many tokens holds, all groups together; a window holds no more than its own."""
    total = 0
    for group in managers_of(manager):
        blocks, most = -(-num_tokens // group.block_size), group.max_admission_blocks_per_request
        total += blocks if most is None else min(blocks, most)
    return total


def held_by(manager: Any, request_ids: Iterable[str]) -> set[int]:
    """Physical ids, in all groups; the null block is nobody's."""
    null = manager.block_pool.null_block.block_id
    return {
        block
        for request_id in request_ids
        for group in manager.get_block_ids(request_id)
        for block in group
        if block != null
    }


def check_counts(manager: Any, owners: set[str], deferred_frees: Iterable[Any]) -> None:
    """Raise AssertionError unless free + held + reserved = total, and only `owners` hold blocks."""
    pool = manager.block_pool
    references: Counter[int] = Counter()
    for group in managers_of(manager):
        for request_id, blocks in group.req_to_blocks.items():
            assert not blocks or request_id in owners, f"blocks of {request_id}, who is gone"
            references.update(block.block_id for block in blocks if not block.is_null)
    for _, blocks in deferred_frees:
        references.update(block.block_id for block in blocks if not block.is_null)
    for block in pool.blocks:
        assert block.is_null or block.ref_cnt == references[block.block_id], f"block {block.block_id} miscounted"
    assert pool.get_num_free_blocks() + len(references) == pool.num_gpu_blocks - 1, "free + held + reserved != total"
