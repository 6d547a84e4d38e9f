"""What must an engine do with prompts that are longer than a step? The fixture `pair` is of engines in small chunks."""

from __future__ import annotations

from instance.types import RequestStatus
from tests.support.pair import EnginePair, Shape


class ChunkContract:
    """Subclass as `class TestSomething(ChunkContract)` with a fixture `pair`."""

    def test_a_prompt_is_begun_only_where_all_of_it_fits(self, pair: EnginePair) -> None:
        facts = pair.first.facts
        size, total = facts.block_size, facts.total_blocks
        assert facts.max_num_batched_tokens < 0.1 * total * size, "else the first chunk is no smaller than the room"
        shapes = [Shape(int(share * total) * size, 40, prompt_key=key) for share, key in ((0.4, 3), (0.35, 5))]
        running = [pair.add(pair.first, shape) for shape in shapes]
        for request in running:
            pair.decode_until(pair.first, request, 3)
        late = pair.add(pair.first, Shape(int(0.4 * total) * size, 2, prompt_key=4))
        for _ in range(5):
            pair.step(pair.first)
        view = next(view for view in pair.first.requests() if view.request_id == late)
        assert pair.first.load().free_blocks * size > 2 * facts.max_num_batched_tokens, "a chunk of it would fit"
        assert (view.status, view.num_blocks) == (RequestStatus.WAITING, 0)
        pair.finish(pair.first, *running, late)
        assert len(pair.tokens(late)) == 2
