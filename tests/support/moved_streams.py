"""How does a test move an answer that is being streamed by `kvferry serve`? An OpenAI client, and `kvferry migrate`."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import openai

from tests.support.serving import Serving

MODEL = "tiny"
Sampling = dict[str, Any]
GREEDY: Sampling = {"temperature": 0.0}
OTHER = {"instance-0": "instance-1", "instance-1": "instance-0"}


def client(serving: Serving) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=serving.base_url, api_key="none", max_retries=0, timeout=120)


async def texts_of(serving: Serving, request_id: str, num_tokens: int, sampling: Sampling = GREEDY) -> tuple[str, ...]:
    """The text of each choice of one streamed completion, in order of their index, with `finish_reason` at its end.

    Of a chat where `sampling` holds its `messages`.
    """
    messages: Any = sampling.get("messages")
    asked: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": num_tokens,
        "stream": True,
        "extra_body": {"ignore_eos": True, **{name: value for name, value in sampling.items() if name != "messages"}},
        "extra_headers": {"x-request-id": request_id},
    }
    texts: dict[int, list[str]] = defaultdict(list)
    async with client(serving) as api:
        if messages is None:
            pieces = await api.completions.create(prompt="Once upon a time", **asked)
        else:
            pieces = await api.chat.completions.create(messages=messages, **asked)
        async for piece in pieces:
            for choice in piece.choices:
                texts[choice.index].append(choice.text if messages is None else choice.delta.content or "")
                if choice.finish_reason is not None:
                    texts[choice.index].append(f"<{choice.finish_reason}>")
    return tuple("".join(texts[index]) for index in sorted(texts))


async def text_of(serving: Serving, request_id: str, num_tokens: int, sampling: Sampling = GREEDY) -> str:
    (text,) = await texts_of(serving, request_id, num_tokens, sampling)
    return text


async def owners_of(
    serving: Serving, request_id: str, is_so: Callable[[dict[str, str]], bool] = bool
) -> dict[str, str]:
    """Where each of its engine requests (one for each choice) runs, as the orchestrator sees it; waits until `is_so`"""
    async with asyncio.timeout(20):
        while True:  # another process: there is no event to wait for
            listed = (await asyncio.to_thread(serving.status))["requests"]
            owners = {
                item["name"].removeprefix("requests/"): str(item["instance"].removeprefix("instances/"))
                for item in listed
                if request_id in item["external_id"] or request_id in item["name"]
            }
            if is_so(owners):
                return owners
            await asyncio.sleep(0.05)


async def moved_texts(
    serving: Serving, request_id: str, num_tokens: int, sampling: Sampling, num_hops: int
) -> tuple[tuple[str, ...], int]:
    """The texts of a completion whose choices are all moved there and back while it runs, and how many moves were
    committed. Raises AssertionError when it ends before its moves."""
    reading = asyncio.create_task(texts_of(serving, request_id, num_tokens, sampling))
    num_choices = int(sampling.get("n", 1))
    owners = await owners_of(serving, request_id, lambda owners: len(owners) == num_choices)
    num_committed = 0
    for _hop in range(num_hops):
        owners = {name: OTHER[owner] for name, owner in owners.items()}
        for name, owner in owners.items():
            done = await asyncio.to_thread(serving.command, "migrate", name, "--to", owner)
            assert not reading.done(), f"the stream must outlive its moves: {done}"
            assert done.status == 0, done
            num_committed += "committed" in done.out
        # The next hop starts from where the orchestrator knows them to be.
        await owners_of(serving, request_id, owners.__eq__)
    return await reading, num_committed
