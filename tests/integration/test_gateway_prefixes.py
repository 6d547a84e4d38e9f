"""Do prompts go to where their beginning is cached, from the client's side? Instances say whatever the test wants."""

from __future__ import annotations

from typing import Any

from tests.integration.test_gateway import MODEL, Front, eventually, front, model
from tests.support.engine_hashes import hashes_of, request_of
from tests.support.word_model import words

__all__ = ["front", "model"]

BLOCK_SIZE = 16
BEGINNING = tuple(range(100, 180))
"""Five blocks."""
OTHER = tuple(range(300, 380))


async def asked(front: Front, *prompt: int, **more: Any) -> None:
    await front.openai.completions.create(model=MODEL, prompt=words(*prompt), max_tokens=3, **more)


async def b_has(front: Front, *tokens: int, **more: Any) -> None:
    """Instance b says so, and the gateway knows it. (The next subscription asks it: a second.)"""
    front.b.cached = hashes_of(request_of(tokens, **more), BLOCK_SIZE)
    await eventually(lambda: front.service.loop.router.hashed_block_size == BLOCK_SIZE)


async def test_prompts_go_to_the_instance_that_has_their_beginning(front: Front) -> None:
    await b_has(front, *BEGINNING)
    for number in range(3):
        await asked(front, *BEGINNING, 900 + number)
    assert (len(front.a.submitted), len(front.b.submitted)) == (0, 3)
    await asked(front, *OTHER)
    assert len(front.a.submitted) == 1, "nobody has that: a wins the tie"


async def test_control_without_the_news_they_go_to_whom_ties_favour(front: Front) -> None:
    await asked(front, *BEGINNING, 900)
    assert (len(front.a.submitted), len(front.b.submitted)) == (1, 0)


async def test_what_is_cached_under_another_salt_is_not_the_same(front: Front) -> None:
    await b_has(front, *BEGINNING, cache_salt="ours")
    await asked(front, *BEGINNING, 900)
    assert (len(front.a.submitted), len(front.b.submitted)) == (1, 0)
    await asked(front, *BEGINNING, 900, extra_body={"cache_salt": "ours"})
    assert (len(front.a.submitted), len(front.b.submitted)) == (1, 1)
